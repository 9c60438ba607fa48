"""train_stage2.py, whole runs on a few photos: its pairs, its two networks, its bank and losses."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CPU,
    TinyNet,
    Trained,
    embedded,
    same_weights,
    widened,
    write_photo,
)
from PIL import Image

import checkpoints
import extra_faces
from common import UserError


def pairs_of_an_epoch(trained: Trained) -> int:
    return sum(len(batch) for batch in trained.run.loader.batch_sampler.batches())


def test_distort_reaches_the_positives_of_stage_2_alone(stages, train, distorted):
    constants = {"CLEAN": 0.0, "DISTORT_MOST": 1, "WITHOUT_FAMILIES": ("sunny",)}
    train(stages[1], "never", constants | {"DISTORT": 0.0})
    assert not distorted
    trained = train(stages[1], "always", constants | {"DISTORT": 1.0})
    assert distorted == {"fog": pairs_of_an_epoch(trained)}
    assert [trained.last["constants"][name] for name in ("DISTORT", "WITHOUT_FAMILIES")] == [1.0, ["sunny"]]


def test_clean_positives_and_those_distorted_on_the_fly_open_no_distorted_file(stages, train, opened):
    train_dir = stages[1].DATA_DIR / "train"
    for clean, distort in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        opened.clear()
        trained = train(stages[1], f"{clean} {distort}", {"CLEAN": clean, "DISTORT": distort})
        folders = Counter(path.parent.name for path in opened if path.is_relative_to(train_dir))
        pairs, anchors = pairs_of_an_epoch(trained), 7  # each anchor is opened once more for the bank
        twice = clean * pairs  # an anchor that is distorted on the fly is opened once
        assert folders == Counter(clean=anchors + pairs + twice, distortion=0 if clean or distort else pairs)
    dataset = trained.run.loader.dataset
    files = [dataset.files(index) for index in range(10 * len(dataset))]
    assert all(positive.stem.startswith(anchor.stem) for anchor, positive in files)  # its own copies, no other photo's


def test_photos_per_person_and_persons_per_batch_make_the_batches_of_stage_2(stages, train, forwards):
    train(stages[1], "stage2", {"PERSONS_PER_BATCH": 4, "PHOTOS_PER_PERSON": 6})
    # 7 clean photos fill one batch of 4 x 3 pairs; faces are those of the distorted photos alone.
    assert [(len(seen.images), seen.part) for seen in forwards] == [(4 * 3, "face"), (4 * 6, "wide")]


WIDE = {"face": 0.8, "wide_size": 76, "wide_weight": 0.5, "hidden": 0.8}


@pytest.mark.parametrize("wide_weight, frame", [(0.0, (76, 0.8, None)), (0.5, (95, 1.0, WIDE))])
def test_stage_2_starts_from_stage_1_and_takes_over_its_crop_or_the_frame_around_it(
    stages, train, stage1_best, forwards, wide_weight, frame
):
    before = checkpoints.read_checkpoint(stage1_best)
    start = widened(before["model"]) if wide_weight else before["model"]
    trained = train(stages[1], "stage2", {"BACKBONE_LR": 0.0, "WIDE_LR": 0.0, "WIDE_WEIGHT": wide_weight})
    best, row = trained.best, trained.last["history"][1]
    assert same_weights(trained.last, start)
    assert (best["stage"], best["teacher"]) == (2, "None")
    assert (best["pretrained"], best["holdout"]) == (before["pretrained"], before["holdout"])
    assert (best["dropout"], best["mirror"]) == (stages[1].DROPOUT, stages[1].MIRROR)
    assert (best["image_size"], best["face_crop"], best["crops"]) == frame
    assert ("instance_loss" in row) == bool(wide_weight) and "contrastive_loss" in row
    if not wide_weight:
        assert {(seen.part, *seen.images.shape[1:]) for seen in forwards} == {("face", 3, 76, 76)}
    model, _ = checkpoints.load_facenet(stages[1].RUN_DIR / "best.pt", CPU)
    assert model.mirror and not checkpoints.load_facenet(stage1_best, CPU)[0].mirror
    assert (model.crops and vars(model.crops)) == frame[2]
    assert model.eval()(torch.zeros(2, 3, frame[0], frame[0])).shape == (2, 1024 if wide_weight else 512)


def test_stage_2_refuses_to_start_from_a_checkpoint_of_stage_2(stages, train):
    train(stages[1], "stage2")
    path = stages[1].RUN_DIR / "best.pt"
    with pytest.raises(UserError, match=f"^STAGE1_CHECKPOINT = {path}: of stage 2, expected one of stage 1"):
        train(stages[1], "again", {"STAGE1_CHECKPOINT": path})


@pytest.mark.parametrize("still, moves", [("backbone", "wide"), ("wide", "backbone")])
def test_face_and_frame_learn_at_rates_of_their_own(stages, train, stage1_best, still, moves):
    last = train(stages[1], "stage2", {f"{still.upper()}_LR": 0.0, f"{moves.upper()}_LR": 1e-2}).last
    start = widened(checkpoints.read_checkpoint(stage1_best)["model"])
    learned = {name for name in start if name.endswith("weight") and not torch.equal(last["model"][name], start[name])}
    assert learned and {name.split(".")[0] for name in learned} == {moves}


def test_stage_2_is_never_below_the_network_it_loaded_even_where_training_ruins_it(stages, train, monkeypatch):
    stage1, stage2 = stages
    first = train(stage1, "stage1", {"EPOCHS": 2})
    whole = stage2.train_one_epoch

    def ruinous(run, model, *args):
        whole(run, model, *args)
        for network in (model.backbone, model.wide):
            network[6].weight.data.zero_()  # every photo has the same embedding now, and eve is the nearest of all

    monkeypatch.setattr(stage2, "train_one_epoch", ruinous)
    checkpoint = {"STAGE1_CHECKPOINT": stage1.RUN_DIR / "best.pt"}
    second = train(stage2, "stage2", checkpoint | {"BACKBONE_LR": 1e3, "WIDE_LR": 1e3, "WIDE_WEIGHT": 0.5})
    assert [row["top1_mean"] for row in second.last["history"]] == pytest.approx([1, 4 / 6])  # 4 of 6 queries are eve's
    assert (second.best["epoch"], first.best["top1"]) == (0, 1)
    assert same_weights(second.best, widened(first.best["model"]))
    assert not same_weights(second.last, widened(first.best["model"]))


@pytest.fixture
def banks(monkeypatch, stages) -> list[SimpleNamespace]:
    """Fills up with the banks that stage 2 makes, and the arguments of its contrastive loss: calls."""
    made, losses, forward = [], stages[1].Losses.__init__, stages[1].ContrastiveLoss.forward

    def watched_bank(self, bank, labels, persons):
        made.append(SimpleNamespace(bank=bank, labels=labels, calls=[]))
        losses(self, bank, labels, persons)

    def watched_loss(self, anchor, positive, negative, weight):
        made[-1].calls.append([part.detach() for part in (anchor, positive, negative, weight)])
        return forward(self, anchor=anchor, positive=positive, negative=negative, weight=weight)

    monkeypatch.setattr(stages[1].Losses, "__init__", watched_bank)
    monkeypatch.setattr(stages[1].ContrastiveLoss, "forward", watched_loss)
    return made


@pytest.mark.parametrize(
    "teacher, wide_weight, mirror", [(None, 0.5, True), ("vggface2", 0.5, False), ("vggface2", 0.0, True)]
)
def test_the_bank_is_every_clean_face_as_the_teacher_sees_it(
    stages, train, stage1_best, monkeypatch, banks, teacher, wide_weight, mirror
):
    expected, _ = checkpoints.load_facenet(stage1_best, CPU)
    if teacher:
        expected, sources = TinyNet(), []

        def loaded(source, dropout, mirror, constant):
            sources.append(source)
            network = copy.deepcopy(expected)
            network.mirror = mirror
            return network

        monkeypatch.setattr(stages[1], "FaceNet", loaded)
    constants = {"TEACHER": teacher, "WIDE_WEIGHT": wide_weight, "MIRROR": mirror}
    last = train(stages[1], "stage2", constants | {"BACKBONE_LR": 1e-2, "WIDE_LR": 1e-2}).last
    expected.mirror = mirror
    paths = sorted((stages[1].DATA_DIR / "train").glob("*/clean/*.png"))
    assert len(paths) == 7 and last["persons"] == ["ann", "bob", "cy", "di"]
    (made,) = banks
    torch.testing.assert_close(made.bank, embedded(expected, paths), rtol=0, atol=1e-5)
    assert made.labels.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert not made.bank.requires_grad
    assert last["teacher"] == str(teacher)
    assert not teacher or sources == ["vggface2"]


def test_stage_2_pulls_to_the_photos_row_of_the_bank_and_pushes_the_nearest_row_of_another_person(stages, train, banks):
    trained = train(stages[1], "stage2", {"BACKBONE_LR": 1e-2, "WIDE_LR": 1e-2})
    (made,), steps = banks, trained.rows("steps.csv")
    assert len(steps) == len(made.calls) == 2
    for (anchor, face, negative, gate), row in zip(made.calls, steps, strict=True):
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
    row = trained.last["history"][1]
    terms = (("CONTRASTIVE_WEIGHT", "contrastive_loss"), ("INSTANCE_WEIGHT", "instance_loss"))
    loss = sum(getattr(stages[1], weight) * row[name] for weight, name in terms)
    assert row["loss"] == pytest.approx(loss, rel=1e-4)


def test_faces_that_do_not_show_are_out_of_the_loss_on_faces_and_stay_in_that_on_frames(stages, train, banks):
    for path in (stages[1].DATA_DIR / "train").glob("*/distortion/*.png"):
        Image.new("RGB", (40, 40), "white").save(path)
    row = train(stages[1], "stage2", {"CLEAN": 0.0, "DISTORT": 0.0}).last["history"][1]
    assert [gate.tolist() for *_, gate in banks[0].calls] == [[0.0] * 3] * 2
    assert (row["contrastive_loss"], row["positive_distance"]) == (0, 0)
    assert row["instance_loss"] > 0 and row["skipped"] == 0
    assert row["loss"] == pytest.approx(stages[1].INSTANCE_WEIGHT * row["instance_loss"])


@pytest.mark.parametrize("margin, active", [(1e-6, 0), (2.0, 1)])
def test_active_negatives_are_those_within_the_margin(stages, train, margin, active):
    assert train(stages[1], "run", {"CONTRASTIVE_MARGIN": margin}).last["history"][1]["active_negatives"] == active


# --- photos without names or without distorted copies -----------------------------------------------------------------


@pytest.fixture
def extra(stages, monkeypatch):
    """A folder of 5 photos of nobody in particular, in each of which a face is found."""
    monkeypatch.setattr(extra_faces, "FaceDetector", lambda device, min_face: SimpleNamespace(find=lambda image: [1]))
    folder = stages[1].DATA_DIR.parent / "extra"
    for number in range(5):
        write_photo(folder / f"sub{number % 2}" / f"{number}.png", (200, 50 * number, 90), seed=500 + number, side=60)
    return folder


def test_extra_faces_are_anchors_of_their_own_at_the_end_of_the_bank(stages, train, extra, banks, distorted, capsys):
    constants = {"EXTRA_FACES": extra, "MAYBE_SAME": 1.0, "PERSONS_PER_BATCH": 4, "CLEAN": 0.0, "DISTORT_MOST": 1}
    trained = train(stages[1], "run", constants)
    (made,) = banks
    assert made.labels.tolist() == [0, 1, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    paths = [path for path, _ in trained.run.loader.dataset.anchors]
    assert paths[7:] == sorted(extra.glob("*/*.png")) and trained.last["photos"] == 12
    assert trained.last["persons"] == ["ann", "bob", "cy", "di"]
    assert [len(batch) for batch in trained.run.loader.batch_sampler.batches()] == [4, 4, 4]
    assert sum(distorted.values()) == 5  # each once in the epoch
    printed = capsys.readouterr().out
    assert f"{extra}: 5 of 5 photos are used\n" in printed
    assert "train: 4 persons, 12 anchors (5 of EXTRA_FACES), 3 steps per epoch\n" in printed


def rows_of(*angles: int) -> torch.Tensor:
    """Unit vectors in the plane, at these degrees."""
    radians = torch.tensor(angles).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


# Persons 0, 0, 1, and three photos without a person: 3 looks like person 0, 4 like 3 and person 1, 5 like nobody.
BANK, LABELS = rows_of(0, 100, 80, 10, 45, 200), torch.tensor([0, 0, 1, 2, 3, 4])
SAME = [{0, 1, 3, 4}, {0, 1, 4}, {2, 4}, {0, 3, 4}, {0, 1, 2, 3, 4}, {5}]


def test_photos_without_a_person_are_no_negatives_of_what_looks_like_them(stages, monkeypatch):
    monkeypatch.setattr(stages[1], "MAYBE_SAME", 0.5)  # 60 degrees
    losses = stages[1].Losses(BANK, LABELS, persons=2)
    every = torch.arange(6)
    assert [set(row.nonzero()[:, 0].tolist()) for row in losses.same_person(every)] == SAME
    some = torch.tensor([4, 2, 5])
    assert torch.equal(losses.same_person(some, among=some), losses.same_person(every)[some][:, some])
    # Nearest to 3's own row is 0's, then 4's: both may be the same person, so that 2 is the negative. It is 70 degrees
    # away, more than a margin of 1: nothing pushes.
    _, values = losses.of_faces(BANK[[3]], torch.ones(1), torch.tensor([3]))
    assert values["negative_distance"].item() == pytest.approx(2 * torch.tensor(35.0).deg2rad().sin().item(), abs=1e-5)
    assert values["contrastive_loss"].item() == pytest.approx(0, abs=1e-6)
    # In a batch of the two that look alike, neither frame is a wrong answer for the other.
    _, values = losses.of_frames(BANK[[0, 3]], BANK[[0, 3]], torch.tensor([0, 3]))
    assert values["instance_loss"].item() == 0


def test_where_all_photos_have_a_person_the_labels_alone_say_who_is_the_same(stages, monkeypatch):
    for maybe_same in (-1.0, 1.0):
        monkeypatch.setattr(stages[1], "MAYBE_SAME", maybe_same)
        same = stages[1].Losses(BANK, LABELS, persons=5).same_person(torch.arange(6))
        assert torch.equal(same, LABELS[:, None] == LABELS[None, :])


def test_without_extra_faces_maybe_same_changes_nothing_of_a_run(stages, train):
    runs = [train(stages[1], str(value), {"MAYBE_SAME": value}) for value in (-1.0, 1.0)]
    first, second = (run.state() | {"constants": None} for run in runs)
    assert first == second


def test_extra_faces_may_move_but_a_resumed_run_needs_the_same_ones(stages, train, extra):
    constants = {"EXTRA_FACES": extra, "MAYBE_SAME": 1.0}
    train(stages[1], "run", constants)
    moved = extra.rename(extra.with_name("moved"))
    resumed = train(stages[1], "run", constants | {"EXTRA_FACES": moved, "RESUME": True, "EPOCHS": 2})
    assert resumed.last["epoch"] == 2
    photo = moved / "sub0" / "0.png"
    photo.rename(photo.with_name("00.png"))
    for other in (moved, None):
        with pytest.raises(UserError, match=r"last\.pt: "):
            train(stages[1], "run", constants | {"EXTRA_FACES": other, "RESUME": True, "EPOCHS": 3})


@pytest.mark.parametrize("extra_too", [False, True])
def test_clean_photos_alone_are_enough_to_train_on(stages, train, extra, distorted, caplog, extra_too):
    train_dir = stages[1].DATA_DIR / "train"
    for path in train_dir.glob("*/distortion/*.png"):
        path.unlink()
    constants = {"CLEAN": 0.0, "DISTORT": 0.0, "DISTORT_MOST": 1, "MAYBE_SAME": 1.0}
    trained = train(stages[1], "run", constants | {"EXTRA_FACES": extra if extra_too else None})
    assert sum(distorted.values()) == pairs_of_an_epoch(trained)
    assert any(
        message.startswith(f"{train_dir}: 4 of 4 persons have no distorted photo") for message in caplog.messages
    )
