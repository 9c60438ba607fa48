"""The arithmetic of the benchmark and its cases, at a size where speed means nothing."""

import math
import os
import pickle

import pytest
import torch
from tiny_net import TinyNet

import common
import train_stage1
from common import UserError
from tools import benchmark, benchmark_search

SETTINGS = benchmark.Settings(batch_size=4, image_size=76, steps=3, persons=4)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Photos for three steps of four, and TinyNet everywhere; returns the tree."""
    for name in [name for name in vars(train_stage1) if name.isupper()]:
        monkeypatch.setattr(train_stage1, name, getattr(train_stage1, name))  # put back afterwards
    monkeypatch.setattr(train_stage1, "NUM_WORKERS", 0)
    monkeypatch.setattr(train_stage1, "FaceNet", TinyNet)
    monkeypatch.setattr(benchmark, "FaceNet", TinyNet)
    monkeypatch.setattr(benchmark, "flops", lambda image_size, freeze_until, training: 1e9)
    for name, value in {"STEPS": 2, "BATCH_SIZE": 4, "PERSONS": 4}.items():
        monkeypatch.setattr(benchmark, name, value)
    benchmark.write_photos(tmp_path / "Task_B")
    return tmp_path / "Task_B"


def test_stage_1_is_measured_step_by_step_in_the_script_itself(small):
    found = benchmark.stage1(small, SETTINGS, "mixed_6a")
    assert len(found["images_per_second"]) == 2  # three steps, the first is not timed
    assert all(speed > 0 for speed in found["images_per_second"])
    assert 0 <= found["loading"] <= 1 and found["peak"] > 2**20
    assert train_stage1.FREEZE_UNTIL == "mixed_6a"


def test_the_plain_cases_give_a_speed_for_every_timed_step(small):
    assert len(benchmark.plain_training(small, SETTINGS)["images_per_second"]) == 3
    assert len(benchmark.plain_embedding(small, SETTINGS)["images_per_second"]) == 3
    assert benchmark.plain_search(small, SETTINGS, persons=5)["images_per_second"][0] > 0


def test_operations_are_those_of_the_network_and_a_frozen_trunk_saves_most_of_its_backward():
    layer = torch.nn.Linear(10, 20, bias=False)
    with benchmark.FlopCounterMode(display=False) as counter:
        layer(torch.zeros(3, 10))
    assert counter.get_total_flops() == 2 * 3 * 10 * 20  # a multiplication and an addition count as two
    forward = benchmark.flops(160, None, training=False)
    assert 2.5e9 < forward < 3.2e9  # about 1.4 billion multiply-adds at 160 pixels
    whole = benchmark.flops(160, None, training=True)
    assert 2.9 * forward < whole <= 3 * forward  # backward: by weights and by inputs, but the images need none
    assert forward < benchmark.flops(160, "mixed_6a", training=True) < 0.75 * whole


def test_the_machines_rate_of_matrix_products_is_plausible(monkeypatch):
    monkeypatch.setattr(benchmark, "GEMM_SIZE", 256)
    assert 1e8 < benchmark.gemm_rate() < 1e16


@pytest.fixture
def pretended(monkeypatch):
    """Speeds out of nowhere instead of measured ones."""
    speeds = {
        benchmark.plain_training: [9.0, 10.0, 50.0],
        benchmark.stage1: [15.0],
        benchmark.plain_embedding: [20.0],
        benchmark.our_embedding: [30.0],
        benchmark.session_embedding: [50.0],
        benchmark.file_embedding: [25.0],
        benchmark.plain_search: [2.0],
        benchmark.our_search: [40.0],
    }

    def measured(measure, *arguments):
        if measure is benchmark.gemm_rate:
            return 1e12
        if measure is common.check_compiler:
            return None
        frozen = getattr(measure, "keywords", {}).get("freeze_until")
        speed = [40.0] if frozen else speeds[getattr(measure, "func", measure)]
        return {"images_per_second": speed, "loading": 0.02, "peak": 3 * 2**20, "flops": 5e9}

    monkeypatch.setattr(benchmark, "in_own_process", measured)
    monkeypatch.setattr(benchmark, "write_photos", lambda folder: None)
    monkeypatch.setattr(benchmark, "NUM_WORKERS", (0, 2))
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: object())


def test_the_table_gives_medians_the_ratios_to_the_row_it_names_and_the_share_of_the_gemm_rate(pretended, capsys):
    results = benchmark.main()
    ratios = {name: figures["ratio"] for name, figures in results.items()}
    assert ratios == {
        "plain training loop": 1.0,
        "stage 1": 1.5,
        "stage 1, frozen up to mixed_6a": 4.0,
        "plain embedding": 1.0,
        "embedding, fused": 1.5,
        "embedding, compiled": 1.5,
        "onnxruntime's own session": 2.5,
        "embedding, onnxruntime": 1.5,
        "embedding, openvino": 1.5,
        "embedding, openvino-int8": 1.5,
        "embedding.embed, torch, 0 workers": 1.25,
        "embedding.embed, torch, 2 workers": 1.25,
        "embedding.embed, onnxruntime, 0 workers": 1.25,
        "embedding.embed, onnxruntime, 2 workers": 1.25,
        "plain search, image by image": 1.0,
        "our search, onnxruntime": 20.0,
    }
    assert results["stage 1"]["gemm"] == pytest.approx(15 * 5e9 / 1e12)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("stage 1, frozen"))
    assert line.split()[-8:] == ["40.0", "4.00", "2.0%", "3", "20%", "plain", "training", "loop"]
    assert next(line for line in lines if line.startswith("our search")).endswith("plain search, image by image")


@pytest.mark.parametrize(
    "constant, value, device, message",
    [
        ("FAST_BACKEND", "tpu", "cpu", "FAST_BACKEND: 'tpu' is none of 'torch', 'fused', "),
        ("FAST_BACKEND", "openvino-int8", "cpu", "FAST_BACKEND = 'openvino-int8': measured among RUNTIMES only; set "),
        ("RUNTIMES", ("onnx",), "cpu", "RUNTIMES: 'onnx' is none of 'torch', 'fused', "),
        ("RUNTIMES", ("openvino",), "cuda", "RUNTIMES: 'openvino' runs on the CPU only; set RUNTIMES = () and FAST_"),
    ],
)
def test_a_backend_that_cannot_work_is_refused_by_its_constant_before_anything_is_measured(
    pretended, monkeypatch, constant, value, device, message
):
    monkeypatch.setattr(benchmark, constant, value)
    monkeypatch.setattr(benchmark, "plain_device", lambda: torch.device(device))
    monkeypatch.setattr(benchmark, "write_photos", lambda folder: pytest.fail("it began"))
    with pytest.raises(UserError) as error:
        benchmark.main()
    assert str(error.value).startswith(message)


def test_without_onnxruntime_its_rows_say_so_and_the_others_are_measured(pretended, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    results = benchmark.main()
    assert {"embedding, fused", "embedding, openvino"} <= results.keys()
    assert not any("onnxruntime" in name for name in results)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out, not installed: onnxruntime;" in line]
    assert len(lines) == 5 and all("onnxruntime" in line[:40] for line in lines)


def test_without_the_quantizer_its_row_alone_says_so(pretended, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None if name == "nncf" else object())
    results = benchmark.main()
    assert "embedding, openvino" in results and "embedding, openvino-int8" not in results
    assert "left out, not installed: nncf; pip install nncf" in capsys.readouterr().out


def test_a_peak_that_is_not_known_is_a_dash(pretended, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "resource", None)  # as on Windows
    assert math.isnan(benchmark.peak_memory())
    measured = benchmark.in_own_process

    def without_peak(measure, *arguments):
        found = measured(measure, *arguments)
        return found | {"peak": benchmark.peak_memory()} if isinstance(found, dict) else found

    monkeypatch.setattr(benchmark, "in_own_process", without_peak)
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.startswith("stage 1, frozen"))
    assert line.split()[-8:] == ["40.0", "4.00", "2.0%", "-", "20%", "plain", "training", "loop"]


@pytest.mark.parametrize("decimals", [0, 2])
def test_memory_is_printed_in_the_given_unit(decimals):
    assert benchmark.memory_text(3 * 2**20, unit=2**20, decimals=decimals) == f"{3:.{decimals}f}"
    assert benchmark.memory_text(math.nan, unit=2**20, decimals=decimals) == "-"


def test_compiling_can_be_left_out(monkeypatch):
    monkeypatch.setattr(benchmark, "COMPILED", False)
    assert "embedding, compiled" not in benchmark.cases() and "embedding, fused" in benchmark.cases()


@pytest.mark.parametrize("backend", ["fused", "onnxruntime", "openvino"])
def test_the_embedding_cases_give_a_speed_from_memory_from_files_and_of_the_search(small, monkeypatch, backend):
    if backend != "fused":
        pytest.importorskip("onnx")
        pytest.importorskip(backend)
    embedded, embed = [], benchmark.embed

    def counting(model, paths, *args, **options):
        embedded.append(len(paths))
        return embed(model, paths, *args, **options)

    monkeypatch.setattr(benchmark, "embed", counting)
    assert len(benchmark.our_embedding(small, SETTINGS, backend)["images_per_second"]) == 3
    assert benchmark.file_embedding(small, SETTINGS, backend, num_workers=0, photos=6)["images_per_second"][0] > 0
    assert benchmark.our_search(small, SETTINGS, backend, persons=5)["images_per_second"][0] > 0
    assert embedded == [4, 6, 4, 4]  # a batch to warm up, then what is timed


def test_the_cases_in_8_bits_and_of_onnxruntime_alone_give_a_speed_too(small):
    for package in ("onnx", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    assert len(benchmark.our_embedding(small, SETTINGS, "openvino-int8")["images_per_second"]) == 3
    assert len(benchmark.session_embedding(small, SETTINGS)["images_per_second"]) == 3


def test_settings_and_cases_can_be_sent_to_another_process():
    for sent in (benchmark.current_settings(), benchmark_search.current_settings()):
        assert pickle.loads(pickle.dumps(sent)) == sent
    assert all(pickle.dumps(case.measure) for case in benchmark.cases().values())


def test_a_case_runs_in_a_process_of_its_own():
    assert benchmark.in_own_process(eval, "__import__('os').getpid()") != os.getpid()
