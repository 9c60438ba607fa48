"""A Run on made-up data: its steps, its best epoch, its clock, its files; and optimisation.py and journal.py, alone."""

import copy
import csv
import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import plain, same_tensors
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

import checkpoints
import common
import journal
import optimisation
import plots
import samplers
import training
from common import UserError
from training import RunSettings

CPU = torch.device("cpu")
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.0, "persons": [], "holdout": []}
FACTS |= {"selected_on": "val", "template": "mean", "pretrained": "None"}
REAL_CURVES = plots.curves


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Drawing three axes after each epoch would take most of the time here."""
    figure = Figure(figsize=(0.1, 0.1))
    monkeypatch.setattr(plots, "curves", lambda history, steps: figure)


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
        training.train_loader(items, Listed(batches), 0, CPU),
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
    return {n: {k: v for k, v in p.items() if not k.endswith("num_batches_tracked")} for n, p in parts.items()}


def last(run_dir: Path) -> dict:
    return checkpoints.read_checkpoint(run_dir / "last.pt")


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(run_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_csv(run_dir / "steps.csv")]


def listed_files(caplog) -> list[list[str]]:
    """The files that each warning about a skipped step lists."""
    found = [record.getMessage() for record in caplog.records if "the step is skipped" in record.getMessage()]
    return [[line.strip() for line in message.splitlines()[1:]] for message in found]


# --- steps that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_loss, message",
    [
        (lambda: bad_at(2, value=math.nan), "the loss is nan"),
        (lambda: bad_at(2, value=-math.inf), "the loss is -inf"),
        (lambda: gradient_bad_at(2), "the norm of the gradient is nan"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_only_its_files_are_listed(tmp_path, caplog, make_loss, message):
    run = small_run(tmp_path, RunSettings(epochs=1, ema_decay=0.9, grad_clip=1.0))
    states, loss = [], make_loss()

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched, after_step=lambda: states.append(state(run)))
    before, after = states[2:4]  # of the second step
    assert before["optimizer"]["state"]
    assert plain(after) == plain(before)
    for step in (0, 4, 6):  # the others did change everything
        assert not same_tensors(states[step]["model"], states[step + 1]["model"])
        assert not same_tensors(states[step]["ema"], states[step + 1]["ema"])
    assert len(states) == 8  # the run went on

    assert f"epoch 1, batch 2: {message}" in caplog.text
    assert listed_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert column(tmp_path, "skipped") == [0, 1, 0, 0]
    (row,) = read_csv(tmp_path / "log.csv")[1:]
    assert float(row["skipped"]) == 1
    for name in ("loss", "gradient_norm"):  # means of the steps that counted
        values = column(tmp_path, name)
        assert float(row[name]) == pytest.approx((values[0] + values[2] + values[3]) / 3)


def test_a_photo_of_nan_leaves_no_trace_in_the_batchnorm_statistics(tmp_path, caplog):
    run = small_run(tmp_path, RunSettings(epochs=1))
    run.loader.dataset.inputs[6] = math.nan
    fit(run)
    assert listed_files(caplog) == [[f"item_{i}.png" for i in (4, 5, 6, 7)]]
    assert all(value.isfinite().all() for value in run.learner.networks["model"].state_dict().values())


def test_a_skipped_update_takes_back_all_its_batches_and_lists_the_files_of_all(tmp_path, caplog):
    run = small_run(tmp_path, RunSettings(epochs=1, accumulate=2), batches=6)
    states, loss = [], bad_at(4)

    def watched(model, *batch):
        states.append(state(run))
        return loss(model, *batch)

    fit(run, watched)
    assert plain(states[4]) == plain(states[2])  # before batch 5 all is as before batch 3
    assert listed_files(caplog) == [[f"item_{i}.png" for i in range(8, 16)]]
    assert column(tmp_path, "skipped") == [0, 1, 0]


def test_skipped_steps_are_counted_for_each_epoch_also_where_all_of_them_are(tmp_path):
    run = small_run(tmp_path, RunSettings(epochs=3), batches=2)
    fit(run, bad_at(2, 5, 6))
    assert [row["skipped"] for row in run.history[1:]] == [1, 0, 2]
    assert "loss" not in run.history[3]


@pytest.mark.parametrize("bad, make_loss", [((5, 6, 7), gradient_bad_at), ((4, 5, 6), bad_at)])
def test_three_bad_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path, caplog, bad, make_loss):
    run, earlier = small_run(tmp_path, RunSettings(epochs=2)), signal.getsignal(signal.SIGINT)
    kept, loss = [], make_loss(*bad)

    def watched(model, *batch):
        if (run.epoch, run.batch) == (2, 0):
            kept.append((tmp_path / "last.pt").read_bytes())
        return loss(model, *batch)

    with pytest.raises(UserError, match="3 times in a row; the last good checkpoint is kept") as error:
        fit(run, watched)
    assert f"epoch 2, batch {bad[-1] - 4}: the " in str(error.value) and "lower the learning rates" in str(error.value)
    assert (tmp_path / "last.pt").read_bytes() == kept[0]
    saved = last(tmp_path)
    assert saved["epoch"] == 1 and saved["bad_in_a_row"] == sum(step <= 4 for step in bad)
    for weights in (saved["model"], run.learner.networks["model"].state_dict()):
        assert all(value.isfinite().all() for value in weights.values())
    assert len(listed_files(caplog)) == 3
    assert signal.getsignal(signal.SIGINT) is earlier


def test_two_bad_steps_a_good_one_and_two_bad_ones_do_not_stop_the_run(tmp_path):
    fit(small_run(tmp_path, RunSettings(epochs=1), batches=6), bad_at(1, 2, 4, 5))
    assert column(tmp_path, "skipped") == [1, 1, 0, 1, 1, 0]


# --- one update -------------------------------------------------------------------------------------------------------


def linear(*weights: float) -> nn.Module:
    layer = nn.Linear(len(weights), 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return nn.Sequential(nn.Flatten(), layer)


def points(*rows) -> Items:
    return Items(torch.tensor(rows)[:, :, None, None], torch.zeros(len(rows)))


def output(model, images, _):
    return model(images).mean()  # its gradient is the mean of the inputs


@pytest.mark.parametrize("clip, change", [(1.0, (0.6, 0.8)), (math.inf, (3.0, 4.0))])
def test_the_gradient_is_clipped_and_its_norm_before_that_is_logged(tmp_path, clip, change):
    model = linear(1.0, 1.0)
    items = points((2.0, 5.0), (4.0, 3.0), (0.0, 1.0), (0.0, 0.0))  # mean (3, 4), then (0, 0.5)
    run = make_run(tmp_path, model, sgd(model), items, [[0, 1], [2, 3]], RunSettings(epochs=1, grad_clip=clip))
    weights = []
    fit(run, output, after_step=lambda: weights.append(model[1].weight[0].tolist()))
    assert column(tmp_path, "gradient_norm") == pytest.approx([5.0, 0.5])
    assert weights[0] == pytest.approx([1 - change[0], 1 - change[1]], abs=1e-5)
    assert weights[1] == pytest.approx([1 - change[0], 1 - change[1] - 0.5], abs=1e-5)
    assert run.history[1]["gradient_norm"] == pytest.approx(2.75)


def test_the_norm_is_that_of_the_whole_update_and_of_all_groups_of_parameters(tmp_path):
    model = linear(1.0, 1.0)
    model.append(nn.Linear(1, 1, bias=False))
    model[2].weight.data.fill_(2.0)
    groups = [{"name": name, "params": model[i].parameters()} for name, i in (("a", 1), ("b", 2))]
    items = points((6.0, 8.0), (0.0, 2.0), (0.0, 0.0))  # mean (2, 10 / 3): outputs 14, 2 and 0 before the last layer
    settings = RunSettings(epochs=1, accumulate=2, grad_clip=1.0)
    fit(make_run(tmp_path, model, torch.optim.SGD(groups, lr=1.0), items, [[0], [1, 2]], settings), output)
    norm = math.hypot(2 * 2, 2 * 10 / 3, 16 / 3)
    assert column(tmp_path, "gradient_norm") == pytest.approx([norm])
    assert column(tmp_path, "loss") == pytest.approx([2 * 16 / 3])
    assert model[1].weight[0].tolist() == pytest.approx([1 - 4 / norm, 1 - 20 / 3 / norm], abs=1e-5)
    assert model[2].weight.item() == pytest.approx(2 - 16 / 3 / norm, abs=1e-5)


@pytest.mark.parametrize("optimizer", [adamw, sgd])
@pytest.mark.parametrize("rest", [[[16, 17, 18, 19], [20]], [[16, 17, 18, 19, 20]]], ids=["smaller", "alone"])
def test_two_accumulated_batches_of_4_train_as_one_of_8(tmp_path, optimizer, rest):
    def train(name: str, batches, accumulate: int) -> training.Run:
        model = small_net().eval()  # BatchNorm's statistics as they are, as with FREEZE_BATCHNORM
        model.train = lambda mode=True: model
        settings = RunSettings(epochs=2, accumulate=accumulate, grad_clip=1.0)
        run = make_run(tmp_path / name, model, optimizer(model), small_items(21), batches, settings)
        fit(run)
        return run

    fours = [list(range(i, i + 4)) for i in (0, 4, 8, 12)]
    whole = train("whole", [list(range(8)), list(range(8, 16)), list(range(16, 21))], 1)
    parts = train("parts", fours + rest, 2)
    assert not same_tensors(whole.learner.networks["model"].state_dict(), small_net().state_dict())
    weights = [run.learner.networks["model"].state_dict() for run in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    assert whole.updates == parts.updates == 2 * 3
    assert column(tmp_path / "parts", "batch") == [2, 4, len(fours + rest)] * 2
    for name in ("loss", "gradient_norm"):
        assert column(tmp_path / "parts", name) == pytest.approx(column(tmp_path / "whole", name), rel=1e-3)
    assert parts.history[2]["loss"] == pytest.approx(whole.history[2]["loss"], rel=1e-3)


def draws(run_dir: Path, seed: int, epoch: int, disturbed: bool = False) -> list[tuple[float, ...]]:
    """What a model could draw, as dropout does, in each of the two steps of an epoch."""
    run = small_run(run_dir, RunSettings(epochs=epoch), batches=2, facts=FACTS | {"seed": seed})
    run.epoch, drawn = epoch - 1, []
    assert next(run.epochs()) == epoch
    for batch in run.steps():
        drawn.append(tuple(torch.rand(4).tolist()))
        if disturbed:
            torch.rand(100)
        run.step(squared(run.learner.networks["model"], *batch))
    return drawn


def test_random_numbers_depend_on_seed_epoch_and_step_alone(tmp_path):
    cases = [(0, 1), (0, 2), (0, 999), (1, 1), (1, 2), (1, 999), (2**32, 999)]
    streams = {stream for seed, epoch in cases for stream in draws(tmp_path, seed, epoch)}
    assert len(streams) == 2 * len(cases)
    assert draws(tmp_path, 1, 2, disturbed=True) == draws(tmp_path, 1, 2)


# --- learning rates, BatchNorm, precision -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "warmup_steps, total_steps, expected",
    [
        (3, 7, [0.25, 0.5, 0.75, 1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]),  # 0 also after the end
        (0, 4, [1.0, 0.853553, 0.5, 0.146447, 0.0]),
        (50, 4, [1 / 3, 2 / 3, 1.0, 0.5, 0.0]),  # shorter than the warm-up: half of it rises
        (50, 1, [1.0, 0.0]),
    ],
)
def test_the_learning_rate_rises_linearly_and_falls_along_half_a_cosine(warmup_steps, total_steps, expected):
    optimizer = sgd(linear(0.0))
    scheduler = optimisation.warmup_cosine(optimizer, warmup_steps, total_steps)
    rates = []
    for _ in expected:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-6)


def test_frozen_batchnorm_keeps_its_statistics_while_the_rest_trains():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    optimisation.freeze_batchnorm(model)
    before = copy.deepcopy(model.state_dict())
    model(5 + torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    assert same_tensors(model.state_dict(), before)
    assert model[1].training and model[0].weight.requires_grad


@pytest.mark.parametrize(
    "device, has_bfloat16, amp, dtype",
    [
        *(("cpu", False, "auto", None), ("cpu", False, None, None), ("cpu", False, "bf16", torch.bfloat16)),
        *(("cuda", True, "auto", torch.bfloat16), ("cuda", False, "auto", torch.float16)),  # before Ampere: none
        *(("cuda", True, "fp16", torch.float16), ("cuda", False, "bf16", torch.bfloat16), ("cuda", True, None, None)),
    ],
)
def test_precision_is_the_one_selected_or_the_best_of_the_device(monkeypatch, device, has_bfloat16, amp, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    assert optimisation.precision(torch.device(device), amp) is dtype
    if device == "cpu":
        with optimisation.autocast(CPU, amp):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("ask", [optimisation.precision, optimisation.autocast])
def test_a_precision_that_is_unknown_or_that_the_device_lacks_is_refused(ask):
    with pytest.raises(UserError, match=r"^AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU"):
        ask(CPU, "fp16")
    for amp in (True, False, "float16", "FP16", "", 16):
        for device in (CPU, torch.device("cuda")):
            with pytest.raises(UserError, match=f"^AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None"):
                ask(device, amp)


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
    run = small_run(tmp_path, RunSettings(epochs=1, ema_decay=0.25, accumulate=2), batches=6)
    model, weights = run.learner.networks["model"], []
    start = copy.deepcopy(dict(model.named_parameters()))
    fit(run, bad_at(3), after_step=lambda: weights.append(copy.deepcopy(dict(model.named_parameters()))))
    for name, expected in start.items():
        for n, after in ((1, weights[1]), (2, weights[5])):  # the update of batches 3 and 4 was skipped
            d = min(0.25, (1 + n) / (10 + n))
            expected = d * expected + (1 - d) * after[name]
        assert torch.allclose(run.learner.ema.module.get_parameter(name), expected, atol=1e-6)


# --- the best epoch ---------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_highest_top1_and_the_earlier_where_equal(tmp_path, capsys):
    run, top1 = small_run(tmp_path, RunSettings(epochs=3), batches=1), iter([0.5, 0.75, 0.75, 0.625])
    fit(run, validate=lambda network: (next(top1), {"top1_clean": 0.25}))
    run.report_best()
    best, end = checkpoints.read_checkpoint(tmp_path / "best.pt"), last(tmp_path)
    assert (best["epoch"], best["top1"], end["epoch"], end["top1"]) == (1, 0.75, 3, 0.625)
    assert end["best"] == {"epoch": 1, "top1": 0.75}
    assert not same_tensors(best["model"], end["model"])
    assert "optimizer" in end and "optimizer" not in best
    lines = [line.partition("  top-1 ")[2] for line in capsys.readouterr().out.splitlines()[:4]]
    assert lines[0] == "0.5000 *  clean 0.2500"
    assert [line.startswith("0.7500 * ") for line in lines[1:]] == [True, False, False]


@pytest.mark.parametrize("drop, kept", [(0.0, 1), (2.0, 2), (3.0, 3), (100.0, 4)])
def test_an_epoch_that_forgot_clean_photos_is_not_kept_as_the_best(tmp_path, drop, kept, capsys):
    run = small_run(tmp_path, RunSettings(epochs=4, max_clean_drop=drop), batches=1)
    found = iter([(0.5, 0.95), (0.6, 0.95), (0.7, 0.93), (0.8, 0.92), (0.9, 0.5)])  # 0, 2, 3 and 45 points lost

    def validate(network):
        top1, clean = next(found)
        return top1, {"top1_clean": clean}

    fit(run, validate=validate)
    best = checkpoints.read_checkpoint(tmp_path / "best.pt")
    assert (best["epoch"], best["top1"]) == (kept, pytest.approx(0.5 + kept / 10))
    lines = capsys.readouterr().out.splitlines()
    assert ("(forgot 45.0 points of clean photos, not kept)" in lines[4]) == (kept < 4)
    assert sum("forgot" in line for line in lines) == 4 - kept


@pytest.mark.parametrize(
    "of_model, of_average, clean, best, best_ema",
    [
        ((0.5, 0.75, 0.25), (0.4, 0.6), (0.9, 0.9, 0.9, 0.9, 0.9), (1, 0.75), (2, 0.6)),
        ((0.5, 0.75, 0.25), (0.8, 0.9), (0.9, 0.9, 0.5, 0.9, 0.5), (1, 0.75), (0, 0.5)),  # the average forgot
    ],
)
def test_the_best_epoch_of_the_average_is_chosen_on_its_own(tmp_path, of_model, of_average, clean, best, best_ema):
    run = small_run(tmp_path, RunSettings(epochs=2, ema_decay=0.9, max_clean_drop=2.0), batches=1)
    of_model, of_average, clean = iter(of_model), iter(of_average), iter(clean)
    models = lambda network: next(of_average) if network is run.learner.ema.module else next(of_model)  # noqa: E731
    fit(run, validate=lambda network: (models(network), {"top1_clean": next(clean)}))
    for name, expected in (("best.pt", best), ("best_ema.pt", best_ema)):
        saved = checkpoints.read_checkpoint(tmp_path / name)
        assert (saved["epoch"], saved["top1"]) == expected


@pytest.mark.parametrize(
    "top1, cross, warned", [(0.9, 0.4, True), (0.9, 0.5, False), (0.5, 0.4, False), (0.9, None, False)]
)
def test_finding_photos_better_and_persons_worse_is_warned_of(tmp_path, caplog, top1, cross, warned):
    rows = iter([{"top1_mean": 0.5, "top1_cross": 0.5}, {"top1_mean": top1} | ({"top1_cross": cross} if cross else {})])
    fit(small_run(tmp_path, RunSettings(epochs=1)), validate=lambda network: (0.5, next(rows)))
    message = "epoch 1 finds photos better than the network as loaded (same: 0.5000, now 0.9000), and persons worse"
    assert (message in caplog.text) == warned


@pytest.mark.parametrize(
    "patience, top1, end",
    [
        (2, [0.5] * 9, 2),
        (0, [0.5] * 9, 8),
        (2, [0.1, 0.2, 0.2, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9], 5),
        (8, [0.5] * 9, 8),
    ],
)
def test_patience_stops_a_run_that_does_not_improve(tmp_path, capsys, patience, top1, end):
    run, validations = small_run(tmp_path, RunSettings(epochs=8, patience=patience), batches=1), iter(top1)
    fit(run, validate=lambda network: (next(validations), {}))
    assert [row["epoch"] for row in run.history] == list(range(end + 1))
    message = f"stopped early: {patience} epochs without a better top-1 (PATIENCE = {patience})"
    assert (message in capsys.readouterr().out) == (end < 8)


def test_an_average_that_improves_keeps_a_patient_run_going(tmp_path):
    run = small_run(tmp_path, RunSettings(epochs=6, patience=2, ema_decay=0.9), batches=1)
    averages = iter(range(1, 9))
    fit(run, validate=lambda net: (0.5 + next(averages) / 100 if net is run.learner.ema.module else 0.5, {}))
    assert run.epoch == 6


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time stands still, but for what a test adds to `now`; saving a file takes 0.5 s."""
    clock, save = SimpleNamespace(now=100.0), training.save_checkpoint

    def slow_save(*args):
        clock.now += 0.5
        save(*args)

    monkeypatch.setattr(journal.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(training, "save_checkpoint", slow_save)
    return clock


def fit_timed(run: training.Run, clock: SimpleNamespace) -> None:
    """Of each of the 2 steps loading takes 1 s (4 photos) and training 2 s; validation takes 4 s and finds nothing."""

    def spend(seconds: float, result):
        clock.now += seconds
        return result

    read = run.loader.dataset.__class__.__getitem__
    run.loader.dataset.__class__ = type("Slow", (Items,), {"__getitem__": lambda s, i: spend(0.25, read(s, i))})
    fit(run, lambda *args: spend(2, squared(*args)), validate=lambda network: spend(4, (0.0, {})))


def test_the_log_states_what_the_time_of_each_epoch_was_spent_on(tmp_path, clock, capsys):
    run = small_run(tmp_path, RunSettings(epochs=2), batches=2)
    fit_timed(run, clock)
    run.report_best()
    rows = [{name: float(row[name]) for name in ("seconds", *journal.ACTIVITIES)} for row in run.history]
    assert rows[0] == pytest.approx(
        {"seconds": 4.5, "training": 0, "loading": 0, "validation": 4 / 4.5, "saving": 1 / 9}
    )
    # An epoch's own last.pt is saved after its row is made, and counts for the next one.
    shares = {"training": 4 / 10.5, "loading": 2 / 10.5, "validation": 4 / 10.5, "saving": 0.5 / 10.5}
    assert rows[1] == rows[2] == pytest.approx({"seconds": 10.5} | shares)
    assert [float(row["training"]) for row in read_csv(tmp_path / "log.csv")] == [row["training"] for row in rows]
    assert run.history[1]["images_per_second"] == pytest.approx(8 / 6)
    assert column(tmp_path, "images_per_second") == pytest.approx([4 / 3] * 4)
    assert column(tmp_path, "loading") == pytest.approx([1 / 3] * 4)
    *_, best, times = capsys.readouterr().out.splitlines()
    assert best == f"best: the network as loaded, no epoch was better, top-1 0.0000 on val: {tmp_path / 'best.pt'}"
    # 26 s: 8 training, 4 loading, 12 validation, 2 saving, the last of them after the last row
    assert times == "time: training 31 %, loading 15 %, validation 46 %, saving 8 % of 0.4 min"


def test_a_resumed_run_adds_its_time_to_what_was_spent_before(tmp_path, clock):
    def killed(*args):
        clock.now += 2
        if count.pop():
            raise InterruptedError
        return squared(*args)

    count = [True, False]
    with pytest.raises(InterruptedError):
        fit(small_run(tmp_path, RunSettings(epochs=1, save_every=1), batches=2), killed)
    run = small_run(tmp_path, RunSettings(epochs=1, save_every=1), batches=2)
    clock.now += 1000  # between the two runs
    run.resume()
    assert (run.batch, run.meter.seen) == (1, 4)
    fit_timed(run, clock)
    row = run.history[1]
    spent = {name: row[name] * row["seconds"] for name in journal.ACTIVITIES}
    # Of the first run a step, and the save at the end of epoch 0; of the second a step, and the save after it.
    assert spent == pytest.approx({"training": 4, "loading": 1, "validation": 4, "saving": 0.5 + 0.5})


def test_a_checkpoint_without_times_can_be_resumed(tmp_path):
    """As runs wrote it before the log had shares."""
    fit(small_run(tmp_path, RunSettings(epochs=1)))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    saved["meter"] = {"images": 0, "sums": {}, "seen": 0, "seconds": 0.0, "waited": 0.0}
    saved["history"] = [{"epoch": row["epoch"], "top1": row["top1"], "loading": 0.5} for row in saved["history"]]
    torch.save(saved, tmp_path / "last.pt")
    run = small_run(tmp_path, RunSettings(epochs=2))
    run.resume()
    fit(run)
    run.report_best()
    assert "seconds" not in run.history[1] and run.history[2]["seconds"] > 0


def test_the_meter_weighs_each_step_by_its_images(clock):
    meter = journal.Meter()
    for images, loss, accuracy in ((2, 1.0, 1.0), (6, 3.0, 0.5)):
        meter.add(images, {"loss": loss, "accuracy": accuracy})
        meter.seen += images
        clock.now += images
        assert meter.lap("training") == images
    assert meter.means() == pytest.approx({"loss": (2 + 18) / 8, "accuracy": (2 + 3) / 8, "images_per_second": 1.0})
    assert str(meter) == "loss 2.500, accuracy 0.625, 1.0 images/s"


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_run_notes_its_constants(tmp_path):
    constants = {"EPOCHS": 4, "DATA_DIR": Path("Task_B"), "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    constants |= {"SKIP_KINDS": ("sunny",), "F": math, "main": 3}
    training.start_run(tmp_path / "runs" / "new", False, constants)
    noted = json.loads((tmp_path / "runs" / "new" / "constants.json").read_text())
    expected = {"EPOCHS": 4, "DATA_DIR": "Task_B", "RESUME": False, "AMP": "auto", "PRETRAINED": None}
    assert noted == expected | {"SKIP_KINDS": ["sunny"]}


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_an_earlier_run_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "constants.json").write_text("of the earlier run")
    message = f"{tmp_path}: .*set RESUME = True to go on with it, or give RUN_DIR another name"
    with pytest.raises(UserError, match=message):
        training.start_run(tmp_path, False, {"EPOCHS": 4})
    training.start_run(tmp_path, True, {"EPOCHS": 4})
    assert (tmp_path / "constants.json").read_text() == "of the earlier run"


def test_a_constant_below_or_above_its_range_is_refused_before_anything_is_written(tmp_path):
    for name, (kind, low, high) in common.RANGES.items():
        step = 1 if kind is int else 1e-9
        article = "a whole number" if kind is int else "a number"
        for value in (low - step, high + step, math.nan, None, "3", kind is int):
            if value == math.inf:
                continue
            with pytest.raises(UserError) as error:
                training.start_run(tmp_path / "run", False, {name: value})
            assert str(error.value) == f"{name} = {value!r}: expected {article}, {low}..{high}"
        training.start_run(tmp_path / "ends", False, {name: low})
        training.start_run(tmp_path / "ends", False, {name: low if high == math.inf and kind is int else high})
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"EPOCHS = 4.0: expected a whole number, 1..999"):
        training.start_run(tmp_path / "run", False, {"EPOCHS": 4.0})


@pytest.mark.parametrize("every, expected", [(0, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_save_every_writes_last_pt_within_an_epoch(tmp_path, every, expected):
    run, seen = small_run(tmp_path, RunSettings(epochs=1, save_every=every)), []

    def watched(model, *batch):
        seen.append(last(tmp_path))
        return squared(model, *batch)

    fit(run, watched)
    assert [saved["batch"] for saved in seen] == [saved["updates"] for saved in seen] == expected
    assert all(saved["epoch"] == 0 for saved in seen)
    saved = last(tmp_path)
    assert (saved["epoch"], saved["batch"], saved["updates"]) == (1, 0, 4)


def test_a_fact_that_is_not_declared_is_refused_and_a_changed_one_too(tmp_path):
    with pytest.raises(ValueError, match=r"facts \['colour'\]: list each of them in MUST_EQUAL or in MAY_CHANGE"):
        small_run(tmp_path, RunSettings(epochs=1), facts=FACTS | {"colour": "red"})
    fit(small_run(tmp_path, RunSettings(epochs=1), facts=FACTS | {"persons": ["ann", "bob"]}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for fact, now, change in (
        ("face_crop", 0.7, "0.52 then, 0.7 now"),
        ("persons", ["bob", "cy", "di"], "ann then, cy, di now"),
        ("holdout", ["cy"], "none then, cy now"),
    ):
        run = small_run(tmp_path, RunSettings(epochs=2), facts=FACTS | {"persons": ["ann", "bob"], fact: now})
        message = f"{tmp_path / 'last.pt'}: cannot be resumed, {fact} has changed .{change}.; set it back"
        with pytest.raises(UserError, match=message):
            run.resume()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def free(monkeypatch, size: float) -> None:
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**15, free=size))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_needs_as_much_free_disk_as_its_checkpoints_take(tmp_path, monkeypatch, ema):
    def start(name: str) -> training.Run:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10000))
        settings = RunSettings(epochs=1, ema_decay=ema)
        return make_run(tmp_path / name, model, adamw(model), small_items(2), [[0, 1]], settings)

    fit(start("there"), lambda model, images, _: model(images).square().mean())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "there").glob("*.pt")}
    most = sum(sizes.values()) + sizes["last.pt"]  # while last.pt is replaced
    for name, needed in (("new", most), ("there", sizes["last.pt"])):  # the others are there already
        free(monkeypatch, 0.97 * needed)
        with pytest.raises(UserError, match=rf"{tmp_path / name}: \d+ MiB free, the checkpoints need \d+; make room"):
            start(name)
        free(monkeypatch, 1.03 * needed)
        start(name)
    assert not (tmp_path / "new").exists()


# --- the journal ------------------------------------------------------------------------------------------------------


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


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
    assert REAL_CURVES([{"epoch": 0, "top1": 0.5, "top1_mean": 0.5}], []).axes  # before the first step


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
    again.step({"update": 4} | ROW | {"loss": 2.5})
    again.flush()
    assert column(tmp_path, "update") == [1, 2, 3, 4]
    assert column(tmp_path, "loss") == [1.5, 1.5, 1.5, 2.5]
    found = events(tmp_path).Scalars("step/loss")
    assert [(event.step, event.value) for event in found] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 2.5)]


def test_a_new_run_starts_its_own_table_where_an_earlier_ones_checkpoints_were_deleted(tmp_path):
    written_journal(tmp_path, range(1, 6))
    fit(small_run(tmp_path, RunSettings(epochs=1)))
    assert column(tmp_path, "update") == [1, 2, 3, 4]
    assert "backbone_lr" in read_csv(tmp_path / "steps.csv")[0]  # its columns are its own, too


@pytest.mark.parametrize("cut", ["1", "12,", "12,1,4,1.", "12,1,4,1.5,"])
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


# --- the loader -------------------------------------------------------------------------------------------------------


class Numbers(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index


def test_workers_stay_and_fetch_ahead_and_memory_is_pinned_for_a_gpu_only():
    batches = Listed([[0, 1], [2, 3]])
    alone, with_worker = (training.train_loader(Numbers(), batches, workers, CPU) for workers in (0, 1))
    assert with_worker.num_workers == 1 and with_worker.persistent_workers
    assert with_worker.prefetch_factor == training.PREFETCH > 2
    assert alone.num_workers == 0 and not alone.persistent_workers and alone.prefetch_factor is None
    assert not alone.pin_memory and not with_worker.pin_memory
    assert training.train_loader(Numbers(), batches, 0, torch.device("cuda")).pin_memory


def test_an_epoch_draws_the_same_batches_whether_or_not_one_went_before_and_for_any_workers():
    """A loader draws a base seed for its workers: once if it keeps them, else in each epoch."""

    def second_epoch(num_workers: int, first: bool) -> list:
        batches = samplers.ShuffledBatches([0] * 12, 4, seed=0)
        loader = training.train_loader(Numbers(), batches, num_workers, CPU)
        torch.manual_seed(0)
        for epoch in (1, 2) if first else (2,):
            batches.set_epoch(epoch)
            found = [batch.tolist() for batch in loader]
        assert sorted(index for batch in found for index in batch) == list(range(12))
        return [*found, torch.rand(1).item()]  # dropout draws from the common stream

    expected = second_epoch(0, first=True)
    assert second_epoch(0, first=False) == expected
    assert second_epoch(1, first=False) == expected
    assert second_epoch(1, first=True) == expected
