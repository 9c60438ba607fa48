"""The benchmark's arithmetic and its cases, at a size where speed means nothing."""

import os

import pytest
import torch
from conftest import TinyNet

import benchmark
import train_stage1

SETTINGS = {"batch_size": 4, "image_size": 76, "steps": 3, "persons": 4}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Photos for three steps of four, TinyNet in stage 1; returns the tree."""
    monkeypatch.setattr(train_stage1, "FaceNet", TinyNet)
    monkeypatch.setattr(train_stage1, "NUM_WORKERS", 0)
    for name in ("DATA_DIR", "RUN_DIR", "RESUME", "CHECK_IMAGES", "EPOCHS", "PRETRAINED", "IMAGE_SIZE", "BATCH_SIZE"):
        monkeypatch.setattr(train_stage1, name, getattr(train_stage1, name))  # put back afterwards
    for name in ("SAVE_EVERY", "HOLDOUT_PERSONS", "FREEZE_UNTIL", "BACKBONE_LR"):
        monkeypatch.setattr(train_stage1, name, getattr(train_stage1, name))
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


def test_the_table_gives_medians_their_ratios_and_the_share_of_the_gemm_rate(monkeypatch, capsys):
    speeds = {benchmark.plain_training: [9.0, 10.0, 50.0], benchmark.plain_embedding: [20.0]}

    def pretended(measure, *arguments):
        if measure is benchmark.gemm_rate:
            return 1e12
        ours = {benchmark.stage1: [40.0 if arguments[-1:] == ("mixed_6a",) else 15.0], benchmark.our_embedding: [30.0]}
        speed = (speeds | ours)[measure]
        return {"images_per_second": speed, "loading": 0.02, "peak": 3 * 2**20, "flops": 5e9}

    monkeypatch.setattr(benchmark, "in_own_process", pretended)
    monkeypatch.setattr(benchmark, "write_photos", lambda folder: None)
    results = benchmark.main()
    assert [r["ratio"] for r in results.values()] == [1.0, 1.5, 4.0, 1.0, 1.5]
    assert results["stage 1"]["gemm"] == pytest.approx(15 * 5e9 / 1e12)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stage 1, frozen"))
    assert line.split()[-5:] == ["40.0", "4.00", "2.0%", "3", "20%"]


def test_a_case_runs_in_a_process_of_its_own():
    assert benchmark.in_own_process(abs, -3) == 3
    assert benchmark.in_own_process(os.getpid) != os.getpid()
