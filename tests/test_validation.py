"""The figure that the best epoch is chosen by, on trees whose answers can be worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from datasets import Person, scan_persons
from validation import QUICK_STRIDE, thinned, validate


class MeanColour(nn.Module):
    """(B, 3, H, W) -> (B, 3), an image's mean colour: its embedding is that vector over its norm."""

    mirror = True

    def __init__(self):
        super().__init__()
        self.mirrored = []  # of each call

    def forward(self, images):
        self.mirrored.append(self.mirror)
        return images.mean((2, 3))


def as_float(image: Image.Image) -> torch.Tensor:
    return pil_to_tensor(image).float()


def write(path: Path, colour) -> None:
    """A photo of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


@pytest.fixture
def two_persons(tmp_path) -> Path:
    """Ann's photos are red and green, bob's only one is yellowish. Of ann's two copies one looks like its own photo,
    and so like bob without it; the other like her other photo. Bob's looks like his."""
    write(tmp_path / "ann/clean/ann_1.png", (200, 0, 0))
    write(tmp_path / "ann/clean/ann_2.png", (0, 200, 0))
    write(tmp_path / "bob/clean/bob_1.png", (200, 40, 0))
    write(tmp_path / "ann/distortion/ann_1_foggy.png", (200, 0, 0))
    write(tmp_path / "ann/distortion/ann_1_rainy.png", (20, 200, 0))
    write(tmp_path / "bob/distortion/bob_1_foggy.png", (200, 40, 0))
    return tmp_path


def test_the_figure_is_the_mean_of_same_and_cross_and_the_row_holds_every_part(two_persons):
    write(two_persons / "bob/distortion/other_9_rainy.png", (200, 40, 10))  # its source is unknown
    figure, row = validate(MeanColour(), two_persons, as_float, "cpu", template="best")
    assert row == {
        "top1_mean": 3 / 4,  # ann's foggy copy is nearer to bob than to her mean
        "top1_best": 1,  # every copy is next to a photo of its person
        "top1_foggy": 1,
        "top1_rainy": 1,
        "top1_cross": 2 / 3,  # ann's foggy copy goes to bob where its own photo does not count
        "top1_clean": 0,  # her two photos are at a right angle, bob's is nearer to both
        "cosine_foggy": pytest.approx(1),  # ann_1's and bob_1's, each of its photo's colour
        "cosine_rainy": pytest.approx(20 / math.hypot(20, 200)),  # ann_1's only
    }
    assert figure == (1 + 2 / 3) / 2
    figure, row = validate(MeanColour(), two_persons, as_float, "cpu", template="mean")
    assert (row["top1_foggy"], row["top1_rainy"]) == (1 / 2, 1) and figure == (3 / 4 + row["top1_cross"]) / 2


def test_without_a_second_clean_photo_the_figure_is_that_of_same_with_a_warning(two_persons, caplog):
    bob = [person for person in scan_persons(two_persons) if person.name == "bob"]
    figure, row = validate(MeanColour(), bob, as_float, "cpu", template="best")
    assert figure == row["top1_best"] == 1 and not {"top1_cross", "top1_clean"} & row.keys()
    assert f"{two_persons}: no person has a second clean photo, so the best epoch is chosen by" in caplog.text


def test_a_person_with_two_clean_photos_and_no_distorted_one_is_in_clean_only(two_persons):
    for path in (two_persons / "ann/distortion").iterdir():
        path.unlink()
    figure, row = validate(MeanColour(), two_persons, as_float, "cpu", template="best")
    assert figure == row["top1_best"] == 1 and "top1_cross" not in row and row["top1_clean"] == 0


def test_a_kind_called_like_a_figure_does_not_replace_it(two_persons):
    for name in ("mean", "best", "cross", "clean"):
        write(two_persons / f"bob/distortion/bob_1_{name}.png", (0, 200, 0))  # ann's
    figure, row = validate(MeanColour(), two_persons, as_float, "cpu", template="best")
    assert row["top1_best"] == 3 / 7 and (row["top1_cross"], row["top1_clean"]) == (1 / 2, 0)
    assert figure == (3 / 7 + 1 / 2) / 2


def test_quick_validation_takes_every_third_distorted_photo_of_every_kind_without_mirror_images(two_persons):
    seven = [Path(f"{number}_kind{number % 7}.png") for number in range(70)]
    persons = [Person("ann", (), seven[:32]), Person("bob", (), seven[32:33]), Person("cy", (), seven[33:])]
    found = thinned(persons, QUICK_STRIDE)
    assert [path for person in found for path in person.distorted] == seven[::3]
    assert {path.stem.split("_")[1] for person in found for path in person.distorted} == {f"kind{n}" for n in range(7)}
    whole, quick = MeanColour(), MeanColour()
    validate(whole, two_persons, as_float, "cpu", template="best")
    _, row = validate(quick, two_persons, as_float, "cpu", template="best", quick=True)
    assert set(whole.mirrored) == {True} and set(quick.mirrored) == {False} and quick.mirror
    assert row["top1_foggy"] == 1 and "top1_rainy" not in row  # the first of three copies
