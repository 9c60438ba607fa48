"""train_stage1.py, whole runs on a few photos: its log, its batches, its class centres, held-out persons."""

import math
import shutil
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, KINDS, embedded
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_net import TinyNet

import checkpoints
import journal
import plots

REAL_CURVES = plots.curves


def test_stage_1_logs_steps_epochs_events_and_curves(stages, train, monkeypatch):
    monkeypatch.setattr(plots, "curves", REAL_CURVES)
    trained = train(stages[0], "run", {"EPOCHS": 2})
    folder = trained.run.run_dir
    assert (folder / "steps.csv").read_text().splitlines()[0].split(",") == [
        *("update", "epoch", "batch", "loss", "accuracy", "target_logit", "gradient_norm"),
        *("backbone_lr", "head_lr", "images_per_second", "loading", "skipped"),
    ]
    steps, log = trained.rows("steps.csv"), trained.rows("log.csv")
    assert trained.column("update") == list(range(1, 13))
    assert [(int(row["epoch"]), int(row["batch"])) for row in steps] == [(e, b) for e in (1, 2) for b in range(1, 7)]
    for row in steps:
        assert 0 <= float(row["accuracy"]) <= 1 and -32 <= float(row["target_logit"]) <= 32
    factors = [1 / 2, *(0.5 * (1 + math.cos(math.pi * done / 11)) for done in range(11))]  # WARMUP_STEPS = 1
    assert trained.column("backbone_lr") == pytest.approx([3e-4 * factor for factor in factors])
    assert trained.column("head_lr") == pytest.approx([1e-2 * factor for factor in factors])

    assert [row["epoch"] for row in log] == ["0", "1", "2"]
    assert log[0]["loss"] == "" and float(log[2]["loss"]) == trained.last["history"][2]["loss"]
    assert {"top1_mean", "top1_best", "target_logit", "gradient_norm", *(f"top1_{k}" for k in KINDS)} <= log[0].keys()
    losses = zip([4, 4, 4, 3, 3, 3], trained.column("loss")[6:], strict=True)  # photos per batch
    assert float(log[2]["loss"]) == pytest.approx(sum(size * loss for size, loss in losses) / 21)
    for row in trained.last["history"]:
        assert sum(row[activity] for activity in journal.ACTIVITIES) == pytest.approx(1) and row["seconds"] > 0

    scalars = EventAccumulator(str(folder / "tensorboard"))
    scalars.Reload()
    for name in ("loss", "gradient_norm", "target_logit", "skipped", "head_lr"):
        found = scalars.Scalars(f"step/{name}")
        assert [event.step for event in found] == list(range(1, 13))
        assert [event.value for event in found] == pytest.approx(trained.column(name), rel=1e-5)
    found = scalars.Scalars("epoch/top1_mean")
    assert [event.step for event in found] == [0, 1, 2]
    assert [event.value for event in found] == pytest.approx([float(row["top1_mean"]) for row in log])
    with Image.open(folder / "curves.png") as image:
        image.load()
        assert image.width > 300


@pytest.mark.parametrize("accumulate, updates", [(1, 6), (4, 2), (7, 1)])
def test_stage_1_updates_once_for_each_group_of_batches_begun(stages, train, accumulate, updates):
    trained = train(stages[0], "run", {"ACCUMULATE": accumulate})  # 21 photos, 6 batches
    assert trained.last["updates"] == len(trained.column("update")) == updates
    assert trained.last["scheduler"]["last_epoch"] == updates
    rates = [group["lr"] for group in trained.run.learner.optimizer.param_groups]
    assert rates == pytest.approx([0, 0], abs=1e-12)  # the schedule came to its end


def test_training_learns_the_train_persons(stages, train):
    history = train(stages[0], "run", {"EPOCHS": 4, "BACKBONE_LR": 1e-2, "HEAD_LR": 1e-1}).last["history"]
    assert history[4]["loss"] < history[1]["loss"]


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_balance_reaches_the_batches_of_stage_1(stages, train, opened, balance):
    train(stages[0], "run", {"BALANCE": balance, "CENTRES_FROM_MEANS": False})  # which reads photos, too
    seen = Counter(path.parents[1].name for path in opened if path.is_relative_to(stages[0].DATA_DIR / "train"))
    assert sum(seen.values()) == 21
    if balance:
        assert all(4 <= seen[person] <= 7 for person in ("ann", "bob", "cy", "di"))  # 21 / 4, photo by photo rounded
    else:
        assert seen == {"ann": 3, "bob": 6, "cy": 9, "di": 3}


def test_distort_reaches_the_photos_of_stage_1_without_the_families_left_out(stages, train, distorted):
    train(stages[0], "never", {"DISTORT": 0.0, "DISTORT_MOST": 1})
    assert not distorted
    last = train(stages[0], "fog", {"DISTORT": 1.0, "DISTORT_MOST": 1, "WITHOUT_FAMILIES": ("sunny",)}).last
    assert distorted == {"fog": 21} and last["constants"]["DISTORT"] == 1.0
    train(stages[0], "both", {"DISTORT": 1.0, "DISTORT_MOST": 1, "WITHOUT_FAMILIES": ()})
    assert distorted.total() == 2 * 21 and distorted["sunny"]


def test_class_centres_start_at_the_persons_means_or_at_random(stages, train):
    still = {"HEAD_LR": 0.0, "BACKBONE_LR": 0.0, "FREEZE_BATCHNORM": True}
    centres = train(stages[0], "means", still | {"CENTRES_FROM_MEANS": True}).last["head"]["weight"]
    model, _ = checkpoints.load_facenet(stages[0].RUN_DIR / "last.pt", CPU)
    folders = [stages[0].DATA_DIR / "train" / name / "clean" for name in ("ann", "bob", "cy", "di")]
    means = torch.stack([embedded(model, sorted(folder.iterdir())).mean(0) for folder in folders])
    torch.testing.assert_close(centres, F.normalize(means), rtol=0, atol=1e-5)
    centres = train(stages[0], "random", still | {"CENTRES_FROM_MEANS": False}).last["head"]["weight"]
    assert torch.cosine_similarity(centres, means).abs().max() < 0.5


def test_held_out_persons_choose_the_epoch_without_a_val_folder_and_train_in_neither_stage(
    stages, train, monkeypatch, opened
):
    seen = {}
    for script in stages:

        def watched(*args, script=script, whole=script.train_one_epoch):
            opened.clear()
            whole(*args)
            seen[script] = {path.parents[1].name for path in opened}

        monkeypatch.setattr(script, "train_one_epoch", watched)
    shutil.rmtree(stages[0].DATA_DIR / "val")
    first = train(stages[0], "stage1", {"HOLDOUT_PERSONS": 2})
    checkpoint = {"STAGE1_CHECKPOINT": stages[0].RUN_DIR / "best.pt"}
    second = train(stages[1], "stage2", checkpoint | {"PERSONS_PER_BATCH": 2})
    held_out = set(first.best["holdout"])
    assert len(held_out) == 2 and set(first.best["persons"]) == {"ann", "bob", "cy", "di"} - held_out
    assert seen[stages[0]] == seen[stages[1]] == set(first.best["persons"])
    for saved in (first.best, second.best):
        assert (saved["persons"], saved["holdout"]) == (first.best["persons"], first.best["holdout"])
        assert saved["selected_on"] == "2 persons held out of train"
    assert first.best["head"]["weight"].shape == (2, 512)
    assert "val_clean_accuracy" not in first.last["history"][1] and "top1_mean" in first.last["history"][1]


def test_accuracy_on_clean_val_photos_is_logged_where_all_val_persons_were_trained(stages, train):
    root = stages[0].DATA_DIR
    shutil.rmtree(root / "val" / "fay")
    shutil.copytree(root / "train" / "ann", root / "val" / "ann")
    history = train(stages[0], "one unknown").last["history"]
    assert "val_clean_accuracy" not in history[1] and "top1_mean" in history[1]
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    last = train(stages[0], "all known").last
    assert [("val_clean_accuracy" in row) for row in last["history"]] == [False, True]
    model, photos = TinyNet(), sorted((root / "val").glob("*/clean/*.png"))
    model.load_state_dict(last["model"])
    cosines = F.normalize(embedded(model, photos)) @ F.normalize(last["head"]["weight"]).T
    named = [last["persons"][row.argmax()] for row in cosines]
    right = sum(name == path.parents[1].name for name, path in zip(named, photos, strict=True))
    assert len(photos) == 7 and last["history"][1]["val_clean_accuracy"] == pytest.approx(right / 7)
