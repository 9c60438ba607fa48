"""What surrounds a training step: skipped steps, accumulation, averages, early stops, saves, the journal, precision."""

import copy
import csv
import math
import shutil
import signal
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, TinyNet, same_tensors
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

import checkpoints
import common
import datasets
import journal
import optimisation
import plots
import samplers
import train_stage1
import training
import transforms
from common import UserError

CPU = torch.device("cpu")
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.0, "persons": [], "holdout": []}
FACTS |= {"selected_on": "val"}
REAL_CURVES = plots.curves
CLOCK = ("images_per_second", "loading", "training", "validation", "saving", "seconds")


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Drawing three axes after each epoch would take most of the time here."""
    figure = Figure(figsize=(0.1, 0.1))
    monkeypatch.setattr(plots, "curves", lambda history, steps: figure)


# --- a Run of made-up data --------------------------------------------------------------------------------------------


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


class SmallNet(nn.Module):
    """(B, 3, 4, 4) -> (B, 1), with BatchNorm in it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))
        )

    def forward(self, images):
        return self.layers(images)


def small_net() -> SmallNet:
    torch.manual_seed(1)
    return SmallNet()


def small_items(count: int) -> Items:
    generator = torch.Generator().manual_seed(2)
    return Items(torch.randn(count, 3, 4, 4, generator=generator), torch.randn(count, 1, generator=generator))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"name": "backbone", "params": model.parameters(), "lr": 0.01}], fused=True)


def sgd(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"name": "backbone", "params": model.parameters(), "lr": rate}])


def make_run(run_dir: Path, model, optimizer, items: Items, batches, **options) -> training.Run:
    """A Run whose learning rates stay as they are."""
    loader = training.train_loader(items, Listed(batches), 0, CPU)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = training.RunSettings(**{"epochs": 1} | options)
    return training.Run(run_dir, FACTS, {"model": model}, optimizer, scheduler, loader, device=CPU, settings=settings)


def small_run(run_dir: Path, batches: int = 4, **options) -> training.Run:
    model = small_net()
    listed = [[4 * i + k for k in range(4)] for i in range(batches)]
    return make_run(run_dir, model, adamw(model), small_items(4 * batches), listed, **options)


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


def bad_at(*steps: int, value: float = math.nan):
    """A loss that is `value` at these steps of the run, counted from 1."""
    count = iter(range(1, 1000))
    return lambda model, *batch: squared(model, *batch) * (value if next(count) in steps else 1.0)


def gradient_bad_at(*steps: int):
    """A finite loss whose gradient is not finite at these steps: 0 * the infinite slope of sqrt at 0."""
    count = iter(range(1, 1000))

    def loss(model, *batch):
        nothing = (0 * next(model.parameters()).sum()).sqrt() if next(count) in steps else 0.0
        return squared(model, *batch) + nothing

    return loss


def state(run: training.Run) -> dict:
    """Everything that a skipped step must leave alone."""
    parts = {name: copy.deepcopy(part.state_dict()) for name, part in run.learner.parts().items()}
    # A count of forward passes, which nothing reads where BatchNorm has a momentum.
    for part in parts.values():
        for name in [name for name in part if name.endswith("num_batches_tracked")]:
            del part[name]
    return parts


def assert_same(a, b) -> None:
    """That two nested containers are equal, tensors bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(run_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_csv(run_dir / "steps.csv")]


def told_files(caplog) -> list[list[str]]:
    """The files that each warning about a skipped step names."""
    told = [record.getMessage() for record in caplog.records if "the step is skipped" in record.getMessage()]
    return [[line.strip() for line in message.splitlines()[1:]] for message in told]


# --- whole runs of both stages ----------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch) -> list[training.Run]:
    """Fills up with the Run objects that the scripts make."""
    made = []

    class Watched(training.Run):
        def __init__(self, *args, **options):
            made.append(self)
            super().__init__(*args, **options)

    monkeypatch.setattr(training, "Run", Watched)
    return made


@pytest.fixture
def trained(tiny_runs, monkeypatch, runs):
    """trained(script, run name, CONSTANT=...) runs the script, its other constants as in `tiny_runs`, and returns
    its last.pt."""
    root = tiny_runs[0].RUN_DIR.parent
    others = ("F", "DISTORTIONS")  # capitals that are no constants, for tests to replace
    usual = {s: {n: value for n, value in vars(s).items() if n.isupper() and n not in others} for s in tiny_runs}

    def train(script, name: str, **constants) -> dict:
        assert constants.keys() <= usual[script].keys()
        for constant, value in (usual[script] | {"RUN_DIR": root / name} | constants).items():
            monkeypatch.setattr(script, constant, value)
        script.main()
        return checkpoints.read_checkpoint(root / name / "last.pt")

    return train


@pytest.fixture
def killed_after(trained, monkeypatch):
    """killed_after(steps, script, run name, ...): as `trained`, but an exception ends it after so many steps."""

    def train(steps: int, script, name: str, **constants) -> None:
        count, step = iter(range(1, 1000)), training.Run.step

        def until(run, *args, **values):
            step(run, *args, **values)
            if next(count) == steps:
                raise InterruptedError

        with monkeypatch.context() as context, pytest.raises(InterruptedError):
            context.setattr(training.Run, "step", until)
            trained(script, name, **constants)

    return train


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """Fills up with the photos that are opened."""
    paths, load_image = [], transforms.load_image
    monkeypatch.setattr(datasets, "load_image", lambda path: paths.append(path) or load_image(path))
    return paths


def without_clock(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


# --- steps that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss, told",
    [
        (lambda: bad_at(2, value=math.nan), "the loss is nan"),
        (lambda: bad_at(2, value=math.inf), "the loss is inf"),
        (lambda: bad_at(2, value=-math.inf), "the loss is -inf"),
        (lambda: gradient_bad_at(2), "the norm of the gradient is nan"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_files_alone(tmp_path, caplog, loss, told):
    run = small_run(tmp_path, ema_decay=0.9, grad_clip=1.0)
    states, loss = [], loss()

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched, after_step=lambda: states.append(state(run)))
    before, after = states[2:4]  # of the second step
    assert before["optimizer"]["state"]
    assert_same(after, before)
    for step in (0, 4, 6):  # the others did change everything
        assert not same_tensors(states[step]["model"], states[step + 1]["model"])
        assert not same_tensors(states[step]["ema"], states[step + 1]["ema"])
    assert len(states) == 8  # the run went on

    assert f"epoch 1, batch 2: {told}" in caplog.text
    assert told_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert column(tmp_path, "skipped") == [0, 1, 0, 0]
    (row,) = read_csv(tmp_path / "log.csv")[1:]
    assert float(row["skipped"]) == 1
    losses = column(tmp_path, "loss")
    assert float(row["loss"]) == pytest.approx((losses[0] + losses[2] + losses[3]) / 3)
    norms = column(tmp_path, "gradient_norm")
    assert float(row["gradient_norm"]) == pytest.approx((norms[0] + norms[2] + norms[3]) / 3)


def test_a_photo_of_nan_leaves_no_trace_in_the_batchnorm_statistics(tmp_path, caplog):
    run = small_run(tmp_path)
    run.loader.dataset.inputs[6] = math.nan
    fit(run)
    assert told_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert all(value.isfinite().all() for value in run.learner.networks["model"].state_dict().values())


def test_a_skipped_update_is_of_all_its_accumulated_batches_and_names_the_files_of_them_all(tmp_path, caplog):
    run = small_run(tmp_path, batches=6, accumulate=2)
    states, loss = [], bad_at(4)

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched)
    assert_same(states[4], states[2])  # before batch 5 all is as before batch 3
    assert told_files(caplog) == [[f"item_{i}.png" for i in range(8, 16)]]
    assert column(tmp_path, "skipped") == [0, 1, 0]


def test_skipped_steps_are_counted_for_each_epoch(tmp_path):
    run = small_run(tmp_path, epochs=3)
    fit(run, bad_at(2, 4, 9))  # of 4 in each epoch
    assert [row["skipped"] for row in run.history[1:]] == [2, 0, 1]


def test_an_epoch_of_skipped_steps_alone_is_logged_with_their_number(tmp_path):
    run = small_run(tmp_path, batches=2)
    fit(run, bad_at(1, 2))
    assert run.history[1].get("skipped") == 2
    assert not math.isnan(run.history[1].get("loss", 0.0))


@pytest.mark.parametrize("bad, loss", [((5, 6, 7), bad_at), ((5, 6, 7), gradient_bad_at), ((4, 5, 6), bad_at)])
def test_three_bad_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path, caplog, bad, loss):
    run, earlier = small_run(tmp_path, epochs=2), signal.getsignal(signal.SIGINT)
    kept = []
    loss = loss(*bad)

    def watched(model, *batch):
        if (run.epoch, run.batch) == (2, 0):
            kept.append((tmp_path / "last.pt").read_bytes())
        return loss(model, *batch)

    with pytest.raises(UserError, match="3 times in a row; the last good checkpoint is kept") as error:
        fit(run, watched)
    assert f"epoch 2, batch {bad[-1] - 4}: the " in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == kept[0]
    last = checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert last["epoch"] == 1 and last["bad_in_a_row"] == sum(step <= 4 for step in bad)
    for weights in (last["model"], run.learner.networks["model"].state_dict()):
        assert all(value.isfinite().all() for value in weights.values())
    assert len(told_files(caplog)) == 3
    assert signal.getsignal(signal.SIGINT) is earlier


def test_two_bad_steps_a_good_one_and_two_bad_ones_do_not_stop_the_run(tmp_path, caplog):
    run = small_run(tmp_path, batches=6)
    fit(run, bad_at(1, 2, 4, 5))
    assert column(tmp_path, "skipped") == [1, 1, 0, 1, 1, 0]
    assert len(told_files(caplog)) == 4 and run.history[1]["skipped"] == 4


def test_a_nan_loss_in_stage_1_names_the_photos_of_its_batch(tiny_runs, trained, monkeypatch, caplog, opened):
    stage1, _ = tiny_runs
    of_batch, cross_entropy = [], nn.functional.cross_entropy

    def loss(*args):
        of_batch.append([str(path) for path in opened])
        opened.clear()
        return cross_entropy(*args) * (math.nan if len(of_batch) in (3, 8) else 1.0)

    monkeypatch.setattr(stage1, "F", SimpleNamespace(cross_entropy=loss))
    opened.clear()
    last = trained(stage1, "run", EMA_DECAY=0.9)  # 6 batches an epoch
    told = told_files(caplog)
    assert len(of_batch) == 12
    assert told[0] == of_batch[2] and 3 <= len(told[0]) <= 4  # in the order of the batch
    assert told[1] == of_batch[7]
    assert "epoch 1, batch 3: the loss is nan" in caplog.text and "epoch 2, batch 2: the loss is nan" in caplog.text
    assert [row.get("skipped") for row in last["history"]] == [None, 1, 1]
    assert all(math.isfinite(row["loss"]) for row in last["history"][1:])
    assert column(stage1.RUN_DIR, "skipped") == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("wide_weight", [0.0, 0.5])
def test_a_nan_loss_in_stage_2_names_the_pairs_of_its_batch(
    tiny_runs, trained, monkeypatch, caplog, opened, wide_weight
):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    of_batch = []

    class Loss(stage2.ContrastiveLoss):
        def forward(self, *embeddings):
            of_batch.append([str(path) for path in opened])
            opened.clear()
            return super().forward(*embeddings) * (math.nan if len(of_batch) == 3 else 1.0)

    monkeypatch.setattr(stage2, "ContrastiveLoss", Loss)
    trained(stage2, "stage2", WIDE_WEIGHT=wide_weight, CLEAN=0.0, DISTORT=0.0)  # 2 batches of 3 persons an epoch
    assert told_files(caplog) == [of_batch[2][-3 * 2 :]]  # validation came before it
    assert "epoch 2, batch 1: the loss is nan" in caplog.text


# --- clipping ---------------------------------------------------------------------------------------------------------


def linear(*weights: float) -> nn.Module:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return nn.Sequential(nn.Flatten(), layer)


def points(*rows) -> Items:
    return Items(torch.tensor(rows)[:, :, None, None], torch.zeros(len(rows)))


def output(model, images, _):
    return model(images).mean()  # its gradient is the mean of the inputs


@pytest.mark.parametrize("clip, change", [(1.0, (0.6, 0.8)), (10.0, (3.0, 4.0)), (math.inf, (3.0, 4.0))])
def test_the_gradient_is_clipped_and_its_norm_before_that_is_logged(tmp_path, clip, change):
    model = linear(1.0, 1.0)
    items = points((2.0, 5.0), (4.0, 3.0), (0.0, 1.0), (0.0, 0.0))  # mean (3, 4), then (0, 0.5)
    run = make_run(tmp_path, model, sgd(model, 1.0), items, [[0, 1], [2, 3]], grad_clip=clip)
    weights = []
    fit(run, output, after_step=lambda: weights.append(model[1].weight[0].tolist()))
    assert column(tmp_path, "gradient_norm") == pytest.approx([5.0, 0.5])
    assert weights[0] == pytest.approx([1 - change[0], 1 - change[1]], abs=1e-5)
    assert weights[1] == pytest.approx([1 - change[0], 1 - change[1] - 0.5], abs=1e-5)
    assert run.history[1]["gradient_norm"] == pytest.approx(2.75)


def test_the_norm_is_that_of_the_whole_update_and_the_loss_its_mean(tmp_path):
    model = linear(1.0, 1.0)
    items = points((6.0, 8.0), (0.0, 2.0), (0.0, 0.0))
    run = make_run(tmp_path, model, sgd(model, 1.0), items, [[0], [1, 2]], accumulate=2, grad_clip=1.0)
    fit(run, output)
    assert column(tmp_path, "gradient_norm") == pytest.approx([math.hypot(2, 10 / 3)])  # mean of the three rows
    assert column(tmp_path, "loss") == pytest.approx([16 / 3])
    change = (2 / math.hypot(2, 10 / 3), 10 / 3 / math.hypot(2, 10 / 3))
    assert model[1].weight[0].tolist() == pytest.approx([1 - change[0], 1 - change[1]], abs=1e-5)


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [adamw, lambda model: sgd(model, 0.1)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("last", [[[16, 17, 18, 19], [20]], [[16, 17, 18, 19, 20]]], ids=["smaller", "alone"])
def test_two_accumulated_batches_of_4_train_as_one_of_8(tmp_path, optimizer, last):
    def train(name: str, batches, accumulate: int) -> training.Run:
        model = small_net().eval()  # BatchNorm's statistics as they are, as with FREEZE_BATCHNORM
        model.train = lambda mode=True: model
        run = make_run(
            *(tmp_path / name, model, optimizer(model), small_items(21), batches),
            **{"epochs": 2, "accumulate": accumulate, "grad_clip": 1.0},
        )
        fit(run)
        return run

    fours = [list(range(i, i + 4)) for i in (0, 4, 8, 12)]
    whole = train("whole", [list(range(8)), list(range(8, 16)), list(range(16, 21))], 1)
    parts = train("parts", fours + last, 2)
    start, a, b = small_net(), whole.networks["model"].state_dict(), parts.networks["model"].state_dict()
    assert not same_tensors(a, start.state_dict())
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-6), name
    assert whole.updates == parts.updates == 2 * 3
    assert column(tmp_path / "parts", "batch") == [2, 4, len(fours + last)] * 2
    for name in ("loss", "gradient_norm"):
        assert column(tmp_path / "parts", name) == pytest.approx(column(tmp_path / "whole", name), rel=1e-4)
    assert parts.history[2]["loss"] == pytest.approx(whole.history[2]["loss"], rel=1e-4)


@pytest.mark.parametrize("accumulate, updates", [(1, 6), (2, 3), (4, 2), (5, 2), (7, 1)])
def test_stage_1_updates_once_for_each_group_of_batches_begun(tiny_runs, trained, runs, accumulate, updates):
    stage1, _ = tiny_runs
    last = trained(stage1, "run", EPOCHS=1, ACCUMULATE=accumulate)  # 21 photos, 6 batches
    assert last["updates"] == len(column(stage1.RUN_DIR, "update")) == updates
    assert last["scheduler"]["last_epoch"] == updates
    assert runs[0].learner.optimizer.param_groups[0]["lr"] == pytest.approx(
        0, abs=1e-12
    )  # the schedule came to its end


# --- the average of the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_follows_its_formula(decay):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    model[0].weight.data.fill_(1.0)
    average = optimisation.moving_average(model, decay)
    expected = 1.0
    for n, new in enumerate((5.0, -3.0, 2.0, 7.0), start=1):
        model[0].weight.data.fill_(new)
        model[1].running_mean.fill_(10 * new)
        model[1].running_var.fill_(20 + new)
        average.update_parameters(model)
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * new
        assert average.module[0].weight.item() == pytest.approx(expected, rel=1e-6)
        assert average.module[1].running_mean.item() == 10 * new
        assert average.module[1].running_var.item() == 20 + new
    assert model[0].weight.item() == 7.0


def test_a_run_averages_after_each_update_that_counts_and_no_other(tmp_path):
    run = small_run(tmp_path, batches=6, ema_decay=0.25, accumulate=2)
    model, weights = run.learner.networks["model"], []
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    watched = lambda: weights.append({n: v.detach().clone() for n, v in model.named_parameters()})  # noqa: E731
    fit(run, bad_at(3), after_step=watched)
    for name, expected in start.items():
        for n, after in ((1, weights[1]), (2, weights[5])):  # the update of batches 3 and 4 was skipped
            d = min(0.25, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * after[name]
        assert torch.allclose(run.learner.ema.module.get_parameter(name), expected, atol=1e-6)


def rising(monkeypatch, script, top1=lambda call: call / 100) -> list[float]:
    """Makes the script's top-1 a function of how many validations there were; returns those told so far."""
    told, validate = [], script.gallery.validate

    def validated(*args, **options):
        _, row = validate(*args, **options)
        told.append(top1(len(told)))
        return told[-1], row

    monkeypatch.setattr(script.gallery, "validate", validated)
    return told


def test_the_best_average_is_a_checkpoint_of_its_own(tiny_runs, trained, runs, monkeypatch, capsys):
    stage1, stage2 = tiny_runs
    told = rising(monkeypatch, stage1)
    last = trained(stage1, "run", EMA_DECAY=0.9)
    model, saved = checkpoints.load_facenet(stage1.RUN_DIR / "best_ema.pt", CPU)
    assert same_tensors(model.state_dict(), runs[0].learner.ema.module.state_dict())
    best = checkpoints.read_checkpoint(stage1.RUN_DIR / "best.pt")
    assert same_tensors(best["model"], runs[0].learner.networks["model"].state_dict())
    assert not torch.equal(model.backbone[6].weight, best["model"]["backbone.6.weight"])
    assert (saved["epoch"], saved["top1"], saved["ema_decay"]) == (2, told[-1], 0.9)
    assert last["best_ema"] == {"epoch": 2, "top1": told[-1]} and last["best"]["top1"] == told[-2]
    rows = read_csv(stage1.RUN_DIR / "log.csv")
    assert all(0 <= float(row["ema_top1_mean"]) <= 1 for row in rows) and "ema_top1_blurred" in rows[0]
    assert f"on val: {stage1.RUN_DIR / 'best_ema.pt'}" in capsys.readouterr().out
    # Stage 2 can start from it.
    last = trained(
        stage2, "stage2", STAGE1_CHECKPOINT=stage1.RUN_DIR / "best_ema.pt", EPOCHS=1, BACKBONE_LR=0.0, WIDE_LR=0.0
    )
    assert torch.equal(last["model"]["backbone.6.weight"], model.backbone[6].weight)


def test_best_and_best_average_are_chosen_each_on_its_own(tmp_path):
    run = small_run(tmp_path, epochs=2, ema_decay=0.9)
    of_model, of_average = iter([0.5, 0.75, 0.25]), iter([0.4, 0.6])
    fit(run, validate=lambda net: (next(of_average) if net is run.learner.ema.module else next(of_model), {}))
    best, best_ema = (checkpoints.read_checkpoint(tmp_path / name) for name in ("best.pt", "best_ema.pt"))
    assert (best["epoch"], best["top1"]) == (1, 0.75)
    assert (best_ema["epoch"], best_ema["top1"]) == (2, 0.6)


def test_an_average_that_forgot_is_not_kept_either(tmp_path):
    run = small_run(tmp_path, epochs=1, ema_decay=0.9, max_clean_drop=2.0)
    rows = iter([0.9, 0.9, 0.8])  # as loaded, then the model, then its average
    fit(run, validate=lambda net: (1.0 if net is run.learner.ema.module else run.epoch / 2, {"top1_clean": next(rows)}))
    epochs = [checkpoints.read_checkpoint(tmp_path / name)["epoch"] for name in ("best.pt", "best_ema.pt")]
    assert epochs == [1, 0]


def test_without_an_average_there_is_no_file_and_no_column_of_it(tiny_runs, trained):
    last = trained(tiny_runs[0], "run", EPOCHS=1)
    assert not (tiny_runs[0].RUN_DIR / "best_ema.pt").exists() and "ema" not in last
    assert not any(name.startswith("ema") for row in last["history"] for name in row)


def test_a_resumed_run_equals_a_whole_one_averages_and_journal_included(tiny_runs, trained, killed_after, runs):
    """Killed within epoch 2, three batches after the last save."""
    stage1, _ = tiny_runs
    constants = {"EMA_DECAY": 0.9, "ACCUMULATE": 2, "SAVE_EVERY": 2, "BATCH_SIZE": 3, "CHECK_IMAGES": False}
    whole = trained(stage1, "whole", **constants)  # 7 batches, 4 updates an epoch
    rows = without_clock(read_csv(stage1.RUN_DIR / "steps.csv"))
    averages = copy.deepcopy(runs[-1].learner.ema.state_dict())
    killed_after(13, stage1, "killed", **constants)
    between = checkpoints.read_checkpoint(stage1.RUN_DIR / "last.pt")
    assert (between["epoch"], between["batch"], between["updates"]) == (1, 4, 6)
    resumed = trained(stage1, "killed", RESUME=True, **constants)
    for part in ("model", "head", "optimizer", "scheduler", "ema", "best", "best_ema", "updates"):
        assert_same(resumed[part], whole[part])
    assert same_tensors(runs[-1].learner.ema.state_dict(), averages) and int(averages["n_averaged"]) == 1 + 8
    assert without_clock(resumed["history"]) == without_clock(whole["history"])
    assert without_clock(read_csv(stage1.RUN_DIR / "steps.csv")) == rows
    assert [row["update"] for row in rows] == [str(i) for i in range(1, 9)]


# --- early stop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patience, top1, last",
    [
        (2, [0.5] * 9, 2),
        (1, [0.5] * 9, 1),
        (0, [0.5] * 9, 8),
        (2, [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9], 5),
        (8, [0.5] * 9, 8),
    ],
)
def test_patience_stops_a_run_that_does_not_improve(tmp_path, capsys, patience, top1, last):
    run, validations = small_run(tmp_path, batches=1, epochs=8, patience=patience), iter(top1)
    fit(run, validate=lambda network: (next(validations), {}))
    assert [row["epoch"] for row in run.history] == list(range(last + 1))
    told = f"stopped early: {patience} epochs without a better top-1 (PATIENCE = {patience})"
    assert (told in capsys.readouterr().out) == (last < 8)


def test_an_average_that_improves_keeps_a_patient_run_going(tmp_path):
    run, averages = small_run(tmp_path, batches=1, epochs=6, patience=2, ema_decay=0.9), iter(range(1, 9))
    fit(run, validate=lambda network: (0.5 + next(averages) / 100 if network is run.learner.ema.module else 0.5, {}))
    assert run.epoch == 6


@pytest.mark.parametrize("patience, last", [(1, 1), (0, 3)])
def test_patience_reaches_the_runs_of_both_stages(tiny_runs, trained, monkeypatch, capsys, patience, last):
    for script in tiny_runs:
        rising(monkeypatch, script, top1=lambda call: 0.5)
        saved = trained(script, script.RUN_DIR.name, EPOCHS=3, PATIENCE=patience)
        assert saved["epoch"] == last
        assert ("stopped early: 1 epochs without" in capsys.readouterr().out) == bool(patience)


# --- saves and free disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, expected", [(0, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_save_every_writes_last_within_an_epoch(tmp_path, every, expected):
    run, seen = small_run(tmp_path, save_every=every), []

    def watched(model, *batch):
        seen.append(checkpoints.read_checkpoint(tmp_path / "last.pt"))
        return squared(model, *batch)

    fit(run, watched)
    assert [last["batch"] for last in seen] == [last["updates"] for last in seen] == expected
    assert all(last["epoch"] == 0 for last in seen)
    last = checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert (last["epoch"], last["batch"], last["updates"]) == (1, 0, 4)


@pytest.mark.parametrize("every, batches", [(0, {0}), (1, {0, 1, 2, 3, 4, 5})])
def test_save_every_reaches_stage_1(tiny_runs, trained, monkeypatch, every, batches):
    stage1, _ = tiny_runs
    seen, cross_entropy, root = set(), nn.functional.cross_entropy, stage1.RUN_DIR.parent
    read = lambda: seen.add(checkpoints.read_checkpoint(root / "run" / "last.pt")["batch"])  # noqa: E731
    monkeypatch.setattr(stage1, "F", SimpleNamespace(cross_entropy=lambda *args: read() or cross_entropy(*args)))
    trained(stage1, "run", EPOCHS=1, SAVE_EVERY=every)
    assert seen == batches


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**15, free=size))


def test_too_little_free_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    free(monkeypatch, 3 * 2**20)
    model = nn.Linear(1000, 1000)
    with pytest.raises(UserError, match=r"3 MiB free, the checkpoints need \d\d; make room") as error:
        make_run(tmp_path / "runs" / "a", model, adamw(model), small_items(4), [[0, 1, 2, 3]])
    assert str(tmp_path / "runs" / "a") in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_free_disk_that_is_asked_for_is_what_the_checkpoints_take(tmp_path, monkeypatch, ema):
    def start(name: str) -> training.Run:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10000))
        return make_run(tmp_path / name, model, adamw(model), small_items(2), [[0, 1]], ema_decay=ema)

    fit(start("there"), lambda model, images, _: model(images).square().mean())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "there").glob("*.pt")}
    most = sum(sizes.values()) + sizes["last.pt"]  # while last.pt is replaced
    free(monkeypatch, 0.97 * most)
    with pytest.raises(UserError, match="MiB free"):
        start("new")
    free(monkeypatch, 1.03 * most)
    start("new")
    free(monkeypatch, 1.03 * sizes["last.pt"])  # the others are there already
    start("there")
    free(monkeypatch, 0.97 * sizes["last.pt"])
    with pytest.raises(UserError, match="MiB free"):
        start("there")


def test_a_full_disk_stops_both_stages_before_the_first_checkpoint(tiny_runs, trained, monkeypatch):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    free(monkeypatch, 1000)
    for script, name in ((stage1, "full1"), (stage2, "full2")):
        with pytest.raises(UserError, match=rf"{name}: 0 MiB free"):
            trained(script, name)
        assert not list(script.RUN_DIR.glob("*.pt")) and not (script.RUN_DIR / "steps.csv").exists()


# --- the journal ------------------------------------------------------------------------------------------------------


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_stage_1_logs_steps_epochs_events_and_curves(tiny_runs, trained, monkeypatch):
    monkeypatch.setattr(plots, "curves", REAL_CURVES)
    stage1, _ = tiny_runs
    last = trained(stage1, "run")
    steps = read_csv(stage1.RUN_DIR / "steps.csv")
    assert list(steps[0]) == [
        *("update", "epoch", "batch", "loss", "accuracy", "target_logit", "gradient_norm"),
        *("backbone_lr", "head_lr", "images_per_second", "loading", "skipped"),
    ]
    assert [int(row["update"]) for row in steps] == list(range(1, 13))
    assert [(int(row["epoch"]), int(row["batch"])) for row in steps] == [(e, b) for e in (1, 2) for b in range(1, 7)]
    for row in steps:
        assert 0 <= float(row["accuracy"]) <= 1 and -32 <= float(row["target_logit"]) <= 32
        assert 0 <= float(row["loading"]) <= 1 < float(row["images_per_second"])
    factors = [1 / 2, *(0.5 * (1 + math.cos(math.pi * done / 11)) for done in range(11))]  # WARMUP_STEPS = 1
    assert column(stage1.RUN_DIR, "backbone_lr") == pytest.approx([3e-4 * factor for factor in factors])
    assert column(stage1.RUN_DIR, "head_lr") == pytest.approx([1e-2 * factor for factor in factors])

    log = read_csv(stage1.RUN_DIR / "log.csv")
    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert log[0]["loss"] == "" and float(log[2]["loss"]) == last["history"][2]["loss"]
    assert {"top1_mean", "top1_best", "target_logit", "gradient_norm", *(f"top1_{k}" for k in KINDS)} <= log[0].keys()
    sizes = [4, 4, 4, 3, 3, 3]
    losses = column(stage1.RUN_DIR, "loss")[6:]
    assert float(log[2]["loss"]) == pytest.approx(sum(s * x for s, x in zip(sizes, losses, strict=True)) / 21)

    scalars = events(stage1.RUN_DIR)
    for name in ("loss", "gradient_norm", "target_logit", "skipped", "head_lr"):
        told = scalars.Scalars(f"step/{name}")
        assert [event.step for event in told] == list(range(1, 13))
        assert [event.value for event in told] == pytest.approx(column(stage1.RUN_DIR, name), rel=1e-5)
    for name in ("top1_mean", "top1_blurred"):
        told = scalars.Scalars(f"epoch/{name}")
        assert [event.step for event in told] == [0, 1, 2]
        assert [event.value for event in told] == pytest.approx([float(row[name]) for row in log])

    with Image.open(stage1.RUN_DIR / "curves.png") as image:
        image.load()
        assert image.width > 300


def test_curves_are_drawn_of_every_step_and_kind_and_of_the_averages():
    steps = [
        {"update": str(i), "loss": "nan" if i == 5 else str(9 - i / 10), "backbone_lr": "1e-4", "head_lr": "1e-2"}
        for i in range(1, 31)
    ]
    kinds = {"top1_mean": 0.5, "top1_best": 0.25, "top1_blurred": 0.75}
    averaged = {f"ema_{name}": value for name, value in kinds.items()}
    history = [{"epoch": e, "top1": 0.5} | kinds | averaged for e in (0, 1, 2)]
    loss, top1, kind, rates = REAL_CURVES(history, steps).axes
    assert list(loss.lines[0].get_xdata()) == list(range(1, 31)) and loss.lines[0].get_ydata()[29] == 6.0
    assert len(rates.lines) == 2
    assert {line.get_label() for line in top1.lines} == {"mean", "best", "averaged: mean", "averaged: best"}
    assert {line.get_label() for line in kind.lines} == {"blurred", "averaged: blurred"}
    assert list(kind.lines[0].get_ydata()) == [75, 75, 75]


def test_curves_can_be_drawn_before_the_first_step():
    assert REAL_CURVES([{"epoch": 0, "top1": 0.5, "top1_mean": 0.5}], []).axes


ROW = {"epoch": 1, "batch": 1, "loss": 1.5, "skipped": 0}


def written_journal(run_dir: Path, updates) -> journal.Journal:
    written = journal.Journal(run_dir)
    for update in updates:
        written.step({"update": update} | ROW)
    written.flush()
    return written


def test_rewind_drops_the_steps_after_an_update_from_table_and_events(tmp_path):
    written_journal(tmp_path, range(1, 6))
    again = journal.Journal(tmp_path)
    again.rewind(3)
    assert [row["update"] for row in again.steps()] == ["1", "2", "3"]
    again.step({"update": 4} | ROW | {"loss": 2.5})
    again.flush()
    assert column(tmp_path, "update") == [1, 2, 3, 4]
    assert column(tmp_path, "loss") == [1.5, 1.5, 1.5, 2.5]
    told = events(tmp_path).Scalars("step/loss")
    assert [(event.step, event.value) for event in told] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 2.5)]


def test_rewind_to_the_start_leaves_no_step_and_the_columns_free(tmp_path):
    again = written_journal(tmp_path, range(1, 6))
    again.rewind(0)
    again.step({"update": 1, "epoch": 1, "batch": 1, "loss": 3.5, "active_negatives": 0.5})
    again.flush()
    (row,) = read_csv(tmp_path / "steps.csv")
    assert row == {"update": "1", "epoch": "1", "batch": "1", "loss": "3.5", "active_negatives": "0.5"}


def test_a_new_run_starts_its_own_table_where_an_earlier_ones_checkpoints_were_deleted(tmp_path):
    written_journal(tmp_path, range(1, 6))
    fit(small_run(tmp_path))
    assert column(tmp_path, "update") == [1, 2, 3, 4]


@pytest.mark.parametrize("cut", ["1", "12", "12,", "12,1,4,1.", "12,1,4,1.5", "12,1,4,1.5,"])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    written_journal(tmp_path, range(1, 12))
    with open(tmp_path / "steps.csv", "a") as file:
        file.write(cut)
    again = journal.Journal(tmp_path)
    assert [row["update"] for row in again.steps()] == [str(i) for i in range(1, 12)]
    again.rewind(12)
    again.step({"update": 12} | ROW)
    again.flush()
    assert column(tmp_path, "update") == list(range(1, 13))
    assert column(tmp_path, "skipped") == [0] * 12


def test_a_resumed_run_has_each_update_once_in_table_and_events(tiny_runs, trained, killed_after):
    stage1, _ = tiny_runs
    killed_after(9, stage1, "run", SAVE_EVERY=4)  # steps 1..8 are saved and written
    with open(stage1.RUN_DIR / "steps.csv", "a") as file:
        file.write("9,2,3,4.")  # as if it had been killed while it wrote the next
    trained(stage1, "run", SAVE_EVERY=4, RESUME=True)
    assert column(stage1.RUN_DIR, "update") == list(range(1, 13))
    told = events(stage1.RUN_DIR)
    assert [event.step for event in told.Scalars("step/loss")] == list(range(1, 13))
    assert [event.value for event in told.Scalars("step/loss")] == pytest.approx(column(stage1.RUN_DIR, "loss"))
    assert [event.step for event in told.Scalars("epoch/top1_mean")] == [0, 1, 2]


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp, dtype", [("auto", None), (None, None), ("bf16", torch.bfloat16)])
def test_precision_on_the_cpu(amp, dtype):
    assert optimisation.precision(CPU, amp) is dtype
    with optimisation.autocast(CPU, amp):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


def test_float16_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU"):
        optimisation.precision(CPU, "fp16")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("amp", ["float16", "FP16", "", True, False, 16])
def test_an_unknown_precision_is_refused(device, amp):
    with pytest.raises(ValueError, match=f"AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None"):
        optimisation.precision(torch.device(device), amp)


@pytest.mark.parametrize("supported, auto", [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_on_a_gpu_is_bfloat16_where_it_has_that(monkeypatch, supported, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: supported)
    gpu = torch.device("cuda")
    assert optimisation.precision(gpu, "auto") is auto
    assert optimisation.precision(gpu, "bf16") is torch.bfloat16
    assert optimisation.precision(gpu, "fp16") is torch.float16
    assert optimisation.precision(gpu, None) is None


@pytest.fixture
def forwards(monkeypatch) -> list[SimpleNamespace]:
    """Fills up with what TinyNet's forward pass met in training: images, which part of the embedding was asked for,
    and autocast's type, None where it is off."""
    seen, forward = [], TinyNet.forward

    def watched(self, images, part="both"):
        if self.training:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            seen.append(SimpleNamespace(images=images, part=part, dtype=dtype))
        return forward(self, images, part)

    monkeypatch.setattr(TinyNet, "forward", watched)
    return seen


@pytest.mark.parametrize("amp, dtype", [("auto", None), ("bf16", torch.bfloat16)])
def test_both_stages_train_float32_weights_in_the_precision_asked_for(tiny_runs, trained, forwards, amp, dtype):
    for script in tiny_runs:
        forwards.clear()
        last = trained(script, script.RUN_DIR.name, EPOCHS=1, AMP=amp)
        assert {seen.dtype for seen in forwards} == {dtype}
        floating = [value for value in last["model"].values() if value.is_floating_point()]
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in floating)
        assert last["history"][1]["skipped"] == 0 and math.isfinite(last["history"][1]["loss"])


def test_a_wrong_precision_stops_a_run_before_its_first_step(tiny_runs, trained):
    with pytest.raises(ValueError, match="AMP = 'fp16'"):
        trained(tiny_runs[0], "run", AMP="fp16")
    assert not list(tiny_runs[0].RUN_DIR.glob("*.pt"))


# --- constants that reach their work ----------------------------------------------------------------------------------


def test_freeze_until_reaches_the_network_of_both_stages(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    torch.manual_seed(stage1.SEED)
    start = TinyNet().state_dict()
    for script in tiny_runs:
        if script is stage2:
            start = checkpoints.read_checkpoint(stage1.RUN_DIR / "best.pt")["model"]
        name = script.RUN_DIR.name
        free, frozen = trained(script, f"{name}_free"), trained(script, name, FREEZE_UNTIL="mixed_6a")
        for weight in ("0.weight", "1.bias"):
            assert torch.equal(frozen["model"][f"backbone.{weight}"], start[f"backbone.{weight}"])
            assert not torch.equal(free["model"][f"backbone.{weight}"], start[f"backbone.{weight}"])
            if script is stage2:  # the wide crop's network is never frozen
                assert not torch.equal(frozen["model"][f"wide.{weight}"], start[f"backbone.{weight}"])
        assert not torch.equal(frozen["model"]["backbone.6.weight"], start["backbone.6.weight"])
        for run, of_face in ((free, 6), (frozen, 2)):
            groups = {group["name"]: len(group["params"]) for group in run["optimizer"]["param_groups"]}
            assert groups == {"backbone": of_face} | ({"wide": 6} if script is stage2 else {"head": 1})
        assert frozen["freeze_until"] == "mixed_6a"


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_balance_reaches_the_batches_of_stage_1(tiny_runs, trained, opened, balance):
    trained(tiny_runs[0], "run", EPOCHS=1, BALANCE=balance, CENTRES_FROM_MEANS=False)  # which reads photos too
    seen = Counter(path.parents[1].name for path in opened if path.is_relative_to(tiny_runs[0].DATA_DIR / "train"))
    assert sum(seen.values()) == 21
    if balance:
        assert all(4 <= seen[person] <= 7 for person in ("ann", "bob", "cy", "di"))  # 21 / 4, photo by photo rounded
    else:
        assert seen == {"ann": 3, "bob": 6, "cy": 9, "di": 3}


@pytest.fixture
def distorted(monkeypatch, tiny_runs) -> Counter:
    """Counts the random distortions, of two kinds, by kind."""
    count = Counter()

    def kind(name):
        return lambda image, severity, generator: count.update([name]) or image

    for script in tiny_runs:
        monkeypatch.setattr(script, "DISTORTIONS", {name: kind(name) for name in ("fog", "sunny")})
    return count


@pytest.mark.parametrize(
    "constants, expected",
    [
        ({"DISTORT": 0.0}, {}),
        ({"DISTORT": 1.0, "SKIP_KINDS": ("sunny",), "DISTORT_MOST": 1}, {"fog": 21}),
        ({"DISTORT": 1.0, "SKIP_KINDS": (), "DISTORT_MOST": 1}, None),
    ],
)
def test_distort_reaches_the_photos_of_stage_1(tiny_runs, trained, distorted, constants, expected):
    last = trained(tiny_runs[0], "run", EPOCHS=1, **constants)
    if expected is None:
        assert distorted.total() == 21 and all(distorted.values()) and len(distorted) == 2
    else:
        assert distorted == expected
    assert last["distort"][0] == constants["DISTORT"]


def pairs_of_an_epoch(run: training.Run) -> int:
    return sum(len(batch) for batch in run.loader.batch_sampler.batches())


def test_distort_reaches_the_positives_of_stage_2_alone(tiny_runs, trained, distorted, runs):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    constants = {"EPOCHS": 1, "CLEAN": 0.0, "DISTORT_MOST": 1, "SKIP_KINDS": ("sunny",)}
    trained(stage2, "never", DISTORT=0.0, **constants)
    assert not distorted
    last = trained(stage2, "always", DISTORT=1.0, **constants)
    assert distorted == {"fog": pairs_of_an_epoch(runs[-1])}
    assert (last["distort"], last["skip_kinds"]) == ([0.0, 1.0, 1], ["sunny"])


def test_clean_positives_and_those_distorted_anew_open_the_anchor_and_no_file_of_its_copies(
    tiny_runs, trained, opened, runs
):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    train_dir = stage2.DATA_DIR / "train"
    for clean, distort in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        opened.clear()
        trained(stage2, f"{clean} {distort}", EPOCHS=1, CLEAN=clean, DISTORT=distort)
        folders = Counter(path.parent.name for path in opened if path.is_relative_to(train_dir))
        pairs, anchors = pairs_of_an_epoch(runs[-1]), 7  # each anchor is opened once more for the bank
        of_files = 0 if clean or distort else pairs
        assert folders == Counter(clean=anchors + 2 * pairs - of_files, distortion=of_files)
    dataset = runs[-1].loader.dataset
    files = [dataset.files(index) for index in range(10 * len(dataset))]
    assert all(positive.stem.startswith(anchor.stem) for anchor, positive in files)  # its own copies, no other photo's


def test_shares_of_the_positives_that_are_more_than_all_are_refused(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    with pytest.raises(ValueError, match=r"CLEAN = 0.5, DISTORT = 0.75: expected shares of 0\.\.1"):
        trained(stage2, "stage2", CLEAN=0.5, DISTORT=0.75)
    assert not list(stage2.RUN_DIR.glob("*.pt"))


@pytest.mark.parametrize("wanted", [False, True])
def test_compile_is_called_once_where_it_is_asked_for(tiny_runs, trained, monkeypatch, runs, wanted):
    compiled = []
    monkeypatch.setattr(TinyNet, "compile", lambda self, **options: compiled.append(self))
    for script in tiny_runs:
        compiled.clear()
        trained(script, script.RUN_DIR.name, EPOCHS=1, COMPILE=wanted)
        assert [network is runs[-1].learner.networks["model"] for network in compiled] == [True] * wanted


def test_a_compiled_network_trains_as_any_and_its_checkpoint_has_the_usual_names(tiny_runs, trained, monkeypatch):
    stage1, _ = tiny_runs
    constants = {"EPOCHS": 1, "EMA_DECAY": 0.9}
    usual = trained(stage1, "usual", **constants)
    monkeypatch.setattr(TinyNet, "compile", lambda self: nn.Module.compile(self, backend="eager"))
    last = trained(stage1, "compiled", COMPILE=True, **constants)
    for part in ("model", "ema"):
        assert last[part].keys() == usual[part].keys()
        assert all(torch.allclose(last[part][name], usual[part][name], atol=1e-5) for name in usual[part])
    checkpoints.load_facenet(stage1.RUN_DIR / "best_ema.pt", CPU)


@pytest.mark.parametrize(
    "constants, told",
    [
        ({"FREEZE_UNTIL": "mixed_6a"}, r"freeze_until has changed \(None then, mixed_6a now\)"),
        ({"BALANCE": 0.5}, r"balance has changed \(0.0 then, 0.5 now\)"),
        ({"EMA_DECAY": 0.9}, r"ema_decay has changed \(0.0 then, 0.9 now\)"),
        ({"ACCUMULATE": 2}, r"accumulate has changed \(1 then, 2 now\)"),
        ({"BATCH_SIZE": 5}, r"batch_size has changed \(4 then, 5 now\)"),
        ({"SEED": 1}, r"seed has changed \(0 then, 1 now\)"),
        ({"DISTORT": 0.5}, r"distort has changed \(\[0.0, 2\] then, \[0.5, 2\] now\)"),
    ],
)
def test_resume_with_another_constant_is_refused_by_its_name(tiny_runs, trained, constants, told):
    stage1, _ = tiny_runs
    trained(stage1, "run", EPOCHS=1)
    files = {p: p.read_bytes() for p in stage1.RUN_DIR.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"last.pt: cannot be resumed, {told}; set it back"):
        trained(stage1, "run", RESUME=True, **constants)
    assert {p: p.read_bytes() for p in stage1.RUN_DIR.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
    "constants, told",
    [
        ({"TEACHER": "vggface2"}, r"teacher has changed \(None then, vggface2 now\)"),
        ({"WIDE_WEIGHT": 0.75}, r"crops has changed \(.*'wide_weight': 0.5.* then, .*'wide_weight': 0.75.* now\)"),
        ({"CLEAN": 0.25}, r"distort has changed \(\[0.0, 0.0, 2\] then, \[0.25, 0.0, 2\] now\)"),
        ({"SKIP_KINDS": ("lowlight",)}, r"skip_kinds has changed \(\[\] then, \['lowlight'\] now\)"),
        ({"OFTEN": ("lowlight",)}, r"often has changed \(\[\] then, \['lowlight'\] now\)"),
        ({"MIRROR": False}, r"mirror has changed \(True then, False now\)"),
        ({"DROPOUT": 0.2}, r"dropout has changed \(0.0 then, 0.2 now\)"),
    ],
)
def test_resume_of_stage_2_with_another_constant_is_refused_by_its_name(tiny_runs, trained, constants, told):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    usual = {"WIDE_WEIGHT": 0.5, "CLEAN": 0.0}
    trained(stage2, "stage2", EPOCHS=1, **usual)
    with pytest.raises(ValueError, match=f"last.pt: cannot be resumed, {told}; set it back"):
        trained(stage2, "stage2", RESUME=True, **(usual | constants))


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def test_an_odd_number_of_photos_per_person_is_refused(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    with pytest.raises(ValueError, match="PHOTOS_PER_PERSON = 3: expected an even number, half clean, half distorted"):
        trained(stage2, "stage2", PHOTOS_PER_PERSON=3)
    assert not list(stage2.RUN_DIR.glob("*.pt"))


def test_photos_per_person_and_persons_per_batch_make_the_batches_of_stage_2(tiny_runs, trained, forwards):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    forwards.clear()
    trained(stage2, "stage2", EPOCHS=1, PERSONS_PER_BATCH=4, PHOTOS_PER_PERSON=6)
    # 7 clean photos fill one batch of 4 x 3 pairs; faces are those of the distorted photos alone.
    assert [(len(seen.images), seen.part) for seen in forwards] == [(4 * 3, "face"), (4 * 6, "wide")]


def test_a_weight_of_0_leaves_the_whole_frame_out_of_stage_2(tiny_runs, trained, forwards, runs):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    forwards.clear()
    last = trained(stage2, "stage2", EPOCHS=1, WIDE_WEIGHT=0.0)
    assert {(seen.part, *seen.images.shape[1:]) for seen in forwards} == {("face", 3, 76, 76)}
    assert runs[-1].learner.networks["model"].wide is None and not any("wide" in name for name in last["model"])
    assert "instance_loss" not in last["history"][1] and "contrastive_loss" in last["history"][1]


@pytest.fixture
def banks(monkeypatch, tiny_runs) -> list[SimpleNamespace]:
    """Fills up with the banks that stage 2 makes, and the arguments of its contrastive loss: calls."""
    made, stage2 = [], tiny_runs[1]

    class WatchedLosses(stage2.Losses):
        def __init__(self, bank, labels):
            made.append(SimpleNamespace(bank=bank, labels=labels, calls=[]))
            super().__init__(bank, labels)

    class WatchedLoss(stage2.ContrastiveLoss):
        def forward(self, *args):
            made[-1].calls.append([arg.detach() for arg in args])
            return super().forward(*args)

    monkeypatch.setattr(stage2, "Losses", WatchedLosses)
    monkeypatch.setattr(stage2, "ContrastiveLoss", WatchedLoss)
    return made


def embedded(model: nn.Module, paths: list[Path]) -> torch.Tensor:
    transform = transforms.eval_transform(76, 0.8)
    with torch.no_grad():
        return model.eval()(torch.stack([transform(transforms.load_image(path)) for path in paths]))


@pytest.mark.parametrize("wide_weight, mirror", [(0.0, True), (0.5, True), (0.5, False)])
@pytest.mark.parametrize("teacher", [None, "vggface2"])
def test_the_bank_is_every_clean_face_as_the_teacher_sees_it(
    tiny_runs, trained, monkeypatch, banks, runs, teacher, wide_weight, mirror
):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    expected, _ = checkpoints.load_facenet(stage1.RUN_DIR / "best.pt", CPU)
    if teacher:
        expected, asked = TinyNet(), []

        def loaded(source, dropout, mirror):
            asked.append(source)
            network = copy.deepcopy(expected)
            network.mirror = mirror
            return network

        monkeypatch.setattr(stage2, "FaceNet", loaded)
    constants = {"TEACHER": teacher, "WIDE_WEIGHT": wide_weight, "MIRROR": mirror}
    last = trained(stage2, "stage2", EPOCHS=1, BACKBONE_LR=1e-2, WIDE_LR=1e-2, **constants)
    expected.mirror = mirror
    paths = sorted((stage2.DATA_DIR / "train").glob("*/clean/*.png"))
    assert len(paths) == 7 and last["persons"] == ["ann", "bob", "cy", "di"]
    (made,) = banks
    torch.testing.assert_close(made.bank, embedded(expected, paths), rtol=0, atol=1e-5)
    assert made.labels.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert not made.bank.requires_grad
    assert last["teacher"] == str(teacher)
    assert not teacher or asked == ["vggface2"]


def test_stage_2_pulls_to_the_photos_row_of_the_bank_and_pushes_the_nearest_row_of_another_person(
    tiny_runs, trained, banks
):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    last = trained(stage2, "stage2", EPOCHS=1, BACKBONE_LR=1e-2, WIDE_LR=1e-2)
    (made,), steps = banks, read_csv(stage2.RUN_DIR / "steps.csv")
    assert len(steps) == len(made.calls) == 2
    for (face, anchor, negative, gate), row in zip(made.calls, steps, strict=True):
        assert gate.tolist() == [1.0] * 3
        to_bank = torch.cdist(face, made.bank)
        sources, negatives = (torch.cdist(rows, made.bank).argmin(1) for rows in (anchor, negative))
        assert torch.equal(made.bank[sources], anchor) and torch.equal(made.bank[negatives], negative)
        other = made.labels[sources][:, None] != made.labels[None, :]
        nearest = to_bank.where(other, torch.inf).amin(1)
        assert other.gather(1, negatives[:, None]).all()
        to_anchor, to_negative = (face - anchor).norm(dim=1), (face - negative).norm(dim=1)
        torch.testing.assert_close(to_negative, nearest, rtol=0, atol=1e-4)
        assert float(row["positive_distance"]) == pytest.approx(to_anchor.mean().item(), abs=1e-4)
        assert float(row["negative_distance"]) == pytest.approx(to_negative.mean().item(), abs=1e-4)
        assert float(row["accuracy"]) == pytest.approx((to_anchor < to_negative).float().mean().item())
    assert {"active_negatives", "contrastive_loss", "instance_loss", "backbone_lr"} <= steps[0].keys()
    row = last["history"][1]
    terms = (
        ("CONTRASTIVE_WEIGHT", "contrastive_loss"),
        ("INSTANCE_WEIGHT", "instance_loss"),
    )
    assert row["loss"] == pytest.approx(sum(getattr(stage2, weight) * row[name] for weight, name in terms), rel=1e-4)


def test_faces_that_do_not_show_are_out_of_the_loss_on_faces_and_stay_in_that_on_frames(tiny_runs, trained, banks):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    for path in (stage2.DATA_DIR / "train").glob("*/distortion/*.png"):
        Image.new("RGB", (40, 40), "white").save(path)
    last = trained(stage2, "stage2", EPOCHS=1, CLEAN=0.0, DISTORT=0.0)
    assert [gate.tolist() for *_, gate in banks[0].calls] == [[0.0] * 3] * 2
    row = last["history"][1]
    assert (row["contrastive_loss"], row["positive_distance"]) == (0, 0)
    assert row["instance_loss"] > 0 and row["skipped"] == 0
    assert row["loss"] == pytest.approx(stage2.INSTANCE_WEIGHT * row["instance_loss"])


def test_active_negatives_are_those_within_the_margin(tiny_runs, trained):
    stage1, stage2 = tiny_runs
    trained(stage1, "stage1", EPOCHS=1)
    far = trained(stage2, "far", EPOCHS=1, CONTRASTIVE_MARGIN=1e-6)
    near = trained(stage2, "near", EPOCHS=1, CONTRASTIVE_MARGIN=2.0)
    assert (far["history"][1]["active_negatives"], near["history"][1]["active_negatives"]) == (0, 1)


# --- data that is not as it should be ---------------------------------------------------------------------------------


def test_persons_and_images_that_lie_twice_are_told_in_both_stages(tiny_runs, trained, caplog):
    stage1, stage2 = tiny_runs
    root = stage1.DATA_DIR
    shutil.copytree(root / "train" / "ann", root / "val" / "ann")
    double = root / "train" / "bob" / "clean" / "bob_0007.png"
    shutil.copy(root / "train" / "cy" / "clean" / "cy_0002.png", double)
    for script in (stage1, stage2):
        caplog.clear()
        common.warn_once.cache_clear()
        trained(script, script.RUN_DIR.name, EPOCHS=1)
        assert "1 of 3 val persons are train persons too" in caplog.text and "(ann)" in caplog.text
        assert "1 images lie under more than one person" in caplog.text
        assert str(double) in caplog.text and "cy_0002.png" in caplog.text and "cy_0001.png" not in caplog.text


def test_data_without_doubles_is_not_warned_about(tiny_runs, trained, caplog):
    for script in tiny_runs:
        trained(script, script.RUN_DIR.name, EPOCHS=1)
    assert "more than one person" not in caplog.text and "train persons too" not in caplog.text


# --- speed ------------------------------------------------------------------------------------------------------------


def test_both_stages_use_a_fused_optimizer_and_images_in_channels_last(tiny_runs, trained, runs, forwards):
    for script in tiny_runs:
        forwards.clear()
        trained(script, script.RUN_DIR.name, EPOCHS=1)
        assert runs[-1].learner.optimizer.defaults["fused"] is True
        assert all(group["fused"] is True for group in runs[-1].learner.optimizer.param_groups)
        assert len(forwards) > 1
        for seen in forwards:
            assert seen.images.is_contiguous(memory_format=torch.channels_last)
            assert not seen.images.is_contiguous()
        network = runs[-1].learner.networks["model"]
        for layers in (network.backbone, network.wide) if network.crops else (network.backbone,):
            weight = layers[0].weight
            assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_workers_stay_and_fetch_ahead_and_memory_is_pinned_for_a_gpu_only():
    items, batches = small_items(4), Listed([[0, 1], [2, 3]])
    alone, with_worker = (training.train_loader(items, batches, workers, CPU) for workers in (0, 1))
    assert with_worker.num_workers == 1 and with_worker.persistent_workers
    assert with_worker.prefetch_factor == training.PREFETCH > 2
    assert alone.num_workers == 0 and not alone.persistent_workers and alone.prefetch_factor is None
    assert not alone.pin_memory and not with_worker.pin_memory
    assert training.train_loader(items, batches, 0, torch.device("cuda")).pin_memory


def test_num_workers_reaches_stage_1_and_changes_nothing_about_the_run(tiny_runs, trained, runs):
    stage1, _ = tiny_runs
    alone = trained(stage1, "alone")
    with_worker = trained(stage1, "worker", NUM_WORKERS=1)
    assert (runs[0].loader.num_workers, runs[1].loader.num_workers) == (0, 1)
    for part in ("model", "head", "optimizer"):
        assert_same(with_worker[part], alone[part])
    assert train_stage1.NUM_WORKERS == 1
