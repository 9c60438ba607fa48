"""What test_processes.py starts: a script that ends while a loader with workers still lives.

    python exit_with_workers.py STATUS main|child

STATUS 0: after an epoch, else in the middle of one. child: in a process that multiprocessing has started.
"""

import multiprocessing
import sys

import torch
from made_up_run import small_items

import training
from samplers import ShuffledBatches


def main(status: int) -> None:
    # A spawned process would spawn its workers, too.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    batches = ShuffledBatches([0, 0, 1, 1], 2, seed=0)
    loader = training.train_loader(small_items(4), batches, 1, torch.device("cpu"), epochs=99)
    assert loader.num_workers == 1
    loader.itself = loader  # a reference cycle: only Python's exit ends it
    for _ in loader:
        if status:
            sys.exit(status)


if __name__ == "__main__":
    if sys.argv[2] == "main":
        main(int(sys.argv[1]))
    else:
        child = multiprocessing.get_context("spawn").Process(target=main, args=(int(sys.argv[1]),))
        child.start()
        child.join()
        sys.exit(child.exitcode)
