"""optimisation.py, alone and in a Run: one update, learning rates, precision, the average of the weights."""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import same_tensors
from made_up_run import (
    CPU,
    FACTS,
    Items,
    adamw,
    bad_at,
    column,
    fit,
    make_run,
    sgd,
    small_items,
    small_net,
    small_run,
    squared,
)
from torch import nn

import optimisation
import training
from common import UserError
from optimisation import multiplies_bfloat16
from training import RunSettings

pytestmark = pytest.mark.usefixtures("quick_curves")


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
    optimisation.set_training(model, frozen_batchnorm=True)
    before = copy.deepcopy(model.state_dict())
    model(5 + torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    assert same_tensors(model.state_dict(), before)
    assert model[1].training and model[0].weight.requires_grad


@pytest.mark.parametrize(
    "device, has_bfloat16, amp, dtype",
    [
        *(("cpu", False, "auto", None), ("cpu", False, None, None), ("cpu", False, "bf16", torch.bfloat16)),
        *(("cpu", True, "auto", torch.bfloat16), ("cpu", True, None, None), ("mps", True, "auto", None)),
        *(("cuda", True, "auto", torch.bfloat16), ("cuda", False, "auto", torch.float16)),  # before Ampere: none
        *(("cuda", True, "fp16", torch.float16), ("cuda", False, "bf16", torch.bfloat16), ("cuda", True, None, None)),
    ],
)
def test_precision_is_the_one_selected_or_the_best_of_the_device(monkeypatch, device, has_bfloat16, amp, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    monkeypatch.setattr(optimisation, "multiplies_bfloat16", lambda: has_bfloat16)
    assert optimisation.precision(torch.device(device), amp) is dtype
    if device == "cpu":
        with optimisation.autocast(CPU, amp):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("amx", [True, False, None])
def test_a_cpu_says_whether_it_multiplies_bfloat16_and_an_old_torch_does_not(monkeypatch, amx):
    if amx is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx})
    assert multiplies_bfloat16() is bool(amx)


@pytest.mark.parametrize("select", [optimisation.precision, optimisation.autocast])
def test_a_precision_that_is_unknown_or_that_the_device_lacks_is_refused(select):
    with pytest.raises(UserError, match=r"^AMP = 'fp16': float16 is for GPUs; 'bf16' or None works on the CPU"):
        select(CPU, "fp16")
    for amp in (True, False, "float16", "FP16", "", 16):
        for device in (CPU, torch.device("cuda")):
            with pytest.raises(UserError, match=f"^AMP = {amp!r}: expected 'auto', 'bf16', 'fp16' or None"):
                select(device, amp)


# --- the average of the weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_the_average_follows_its_formula(decay):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    model[0].weight.data.fill_(1.0)
    average = optimisation.MovingAverage(model, decay)
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


@pytest.fixture
def recorded(monkeypatch) -> list:
    """Stands in for CUDA graphs; what was run in `forward` by replay."""
    replays = []

    def make(network, examples, allow_unused_input):
        usual = network.forward
        usual(*examples)  # the trial runs

        def replay(images):
            replays.append(images.shape)
            return usual(images)

        network.forward = replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return replays


def test_recorded_passes_serve_training_batches_of_their_shape_alone(recorded):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    mean = network[1].running_mean.clone()
    optimisation.record(network, (2, 3, 8, 8), torch.device("cpu"), amp=None)
    assert same_tensors({"mean": mean}, {"mean": network[1].running_mean})  # the trial runs left no trace
    network(torch.ones(2, 3, 8, 8))
    network(torch.ones(3, 3, 8, 8))
    network.eval()(torch.ones(2, 3, 8, 8))
    assert recorded == [(2, 3, 8, 8)]


def test_where_passes_cannot_be_recorded_training_goes_the_usual_way(monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    network = nn.Conv2d(3, 4, 3)
    optimisation.record(network, (2, 3, 8, 8), torch.device("cpu"), amp=None)
    assert network(torch.ones(2, 3, 8, 8)).shape == (2, 4, 6, 6)
    assert "CUDA graphs do not work here, so steps take longer (operation not permitted" in caplog.text


@pytest.mark.parametrize(
    ("device", "accumulate", "expected"), [("cuda", 1, True), ("cuda", 2, False), ("cpu", 1, False)]
)
def test_passes_are_recorded_on_a_gpu_where_gradients_are_not_added_up(device, accumulate, expected):
    assert optimisation.recordable(torch.device(device), accumulate) is expected
