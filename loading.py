"""How photos reach the network: when workers are worth their start."""

FEW_BATCHES = 4  # below it, workers take longer to start (seconds each under `spawn`) than they save


def worth_workers(num_workers: int, batches: int) -> int:
    """`num_workers`, or 0 for a pass over so few `batches` that one process is sooner done."""
    return num_workers if batches >= FEW_BATCHES else 0
