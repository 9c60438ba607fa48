"""A Run of a small network on made-up data, for the tests of what surrounds a training step."""

import copy
import csv
import math
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

import checkpoints
import samplers
import training
from training import RunSettings

CPU = torch.device("cpu")
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.0, "persons": [], "holdout": []}
FACTS |= {"selected_on": "val", "template": "mean", "pretrained": "None", "constants": {}, "pretrained_weights": None}


class Items(Dataset):
    """Item i: inputs[i] (C, H, W), targets[i]; its file is item_<i>.png."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index], self.targets[index]

    def files(self, index):
        return [Path(f"item_{index}.png")]

    def set_epoch(self, epoch):
        pass


class Listed(samplers.EpochBatches):
    """The same batches in each epoch."""

    def __init__(self, listed):
        super().__init__(0)
        self.listed = listed

    def __len__(self):
        return len(self.listed)

    def batches(self):
        return self.listed


def small_net() -> nn.Module:
    """(B, 3, 4, 4) -> (B, 1), with BatchNorm in it; always the same."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
    )


def small_items(count: int) -> Items:
    generator = torch.Generator().manual_seed(2)
    return Items(torch.randn(count, 3, 4, 4, generator=generator), torch.randn(count, 1, generator=generator))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"name": "backbone", "params": model.parameters(), "lr": 0.01}], fused=True)


def sgd(model: nn.Module, rate: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"name": "backbone", "params": model.parameters(), "lr": rate}])


def make_run(run_dir, model, optimizer, items, batches, settings, facts=FACTS) -> training.Run:
    """A Run whose learning rates stay as they are."""
    return training.Run(
        run_dir,
        facts,
        {"model": model},
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        training.train_loader(items, Listed(batches), 0, CPU, epochs=settings.epochs),
        device=CPU,
        settings=settings,
    )


def small_run(run_dir: Path, settings: RunSettings, batches: int = 4, facts=FACTS) -> training.Run:
    """Epochs of `batches` batches of 4."""
    model, listed = small_net(), [list(range(4 * i, 4 * i + 4)) for i in range(batches)]
    return make_run(run_dir, model, adamw(model), small_items(4 * batches), listed, settings, facts)


def squared(model, images, targets):
    return (model(images) - targets).square().mean()


def fit(run: training.Run, loss=squared, validate=lambda network: (0.0, {}), after_step=lambda: None) -> None:
    """The loop of both scripts. loss: (model, *batch) -> scalar."""
    model = run.learner.networks["model"]
    if not run.history:
        run.finish_epoch(validate)
    for _ in run.epochs():
        model.train()
        for batch in run.steps():
            run.step(loss(model, *batch))
            after_step()
        run.finish_epoch(validate)


def state(run: training.Run) -> dict:
    """Everything that a skipped step must leave alone."""
    parts = {name: copy.deepcopy(part.state_dict()) for name, part in run.learner.parts().items()}
    # A count of forward passes, which nothing reads where BatchNorm has a momentum.
    return {n: {k: v for k, v in p.items() if not k.endswith("num_batches_tracked")} for n, p in parts.items()}


def last(run_dir: Path) -> dict:
    return checkpoints.read_checkpoint(run_dir / "last.pt")


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(run_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_csv(run_dir / "steps.csv")]


def bad_at(*steps: int, value: float = math.nan):
    """A loss that is `value` at these steps of the run, counted from 1."""
    count = iter(range(1, 1000))
    return lambda model, *batch: squared(model, *batch) * (value if next(count) in steps else 1.0)
