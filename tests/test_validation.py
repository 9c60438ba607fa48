"""Validation: the figure that chooses the best epoch, its row in the log, and quick validation."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_plain
from torchvision.transforms.functional import pil_to_tensor

from datasets import Person, scan_persons
from folders import distortion_kind
from gallery import build_gallery, evaluate
from validation import QUICK_STRIDE, ValidationSet, check_data, summary, thinned, validate


class MeanColour(torch.nn.Module):
    """(B, 3, H, W) -> (B, 3), an image's mean colour: its embedding is that vector over its norm."""

    def __init__(self):
        super().__init__()
        self.mirror, self.seen = True, []  # seen: for each photo, whether it was to be mirrored too

    def forward(self, images):
        self.seen += [self.mirror] * len(images)
        return images.float().mean((2, 3))


TWO_WORLDS = {
    "ann/clean/ann_1.png": (200, 0, 0),
    "ann/clean/ann_2.png": (0, 200, 0),
    "bob/clean/bob_1.png": (200, 40, 0),
    "ann/distortion/ann_1_foggy.png": (200, 0, 0),  # like its own photo, and so like bob without it
    "ann/distortion/ann_1_rainy.png": (20, 200, 0),  # like ann's other photo
    "bob/distortion/bob_1_foggy.png": (200, 40, 0),
}


@pytest.fixture
def two_worlds(tmp_path) -> Path:
    for name, colour in TWO_WORLDS.items():
        write_plain(tmp_path / name, colour)
    return tmp_path


def on(root, *, transform=pil_to_tensor, degraded=(pil_to_tensor,), template="best", quick=False) -> ValidationSet:
    persons = scan_persons(root) if isinstance(root, Path) else root
    return ValidationSet(persons, transform, degraded, torch.device("cpu"), template=template, quick=quick)


def validated(root, quick: bool = False, model: torch.nn.Module | None = None) -> tuple[float, dict[str, float]]:
    return validate(model or MeanColour(), on(root, quick=quick))


# --- the choice of an epoch -------------------------------------------------------------------------------------------


def test_an_epoch_is_chosen_by_the_mean_of_same_and_cross(two_worlds):
    top1, row = validated(two_worlds)
    assert row["top1_best"] == 1  # every copy is next to a photo of its person
    # Without its source, ann's foggy query is nearest to bob, who has one photo, and so are both of hers, "degraded".
    assert row["top1_cross"] == 1 / 4
    assert row["top1_clean"] == 0  # her two photos are at a right angle, bob's is nearer to both
    assert top1 == (1 + 1 / 4) / 2


def test_clean_photos_are_queries_too_degraded_on_the_fly(two_worlds):
    def invert(image):
        return 255 - pil_to_tensor(image)

    _, row = validate(MeanColour(), on(two_worlds, degraded=[invert, pil_to_tensor]))
    assert row["top1_degraded"] == pytest.approx((1 + 3) / 6) and row["top1_foggy"] == row["top1_rainy"] == 1
    assert row["top1_best"] == pytest.approx((3 + 1 + 3) / 9)


def test_without_a_distorted_photo_the_degraded_ones_alone_count(two_worlds, caplog):
    persons = [replace(person, distorted=()) for person in scan_persons(two_worlds)]
    check_data(["cy", "di"], persons, max_clean_drop=2.0)
    assert validated(persons)[1]["top1_best"] == validated(persons)[1]["top1_degraded"] == 1
    assert any(
        "no distorted photo, so the best epoch is chosen on copies of the clean photos" in m for m in caplog.messages
    )


def test_the_row_has_the_mean_cosine_of_each_kind_to_the_source_photos_that_are_known(two_worlds):
    write_plain(two_worlds / "bob/distortion/other_9_rainy.png", (0, 0, 200))  # its source is unknown
    cosines = {name: value for name, value in validated(two_worlds)[1].items() if name.startswith("cosine_")}
    assert cosines == {
        "cosine_degraded": pytest.approx(1),
        "cosine_foggy": pytest.approx(1),  # ann_1's and bob_1's, each of its photo's colour
        "cosine_rainy": pytest.approx(20 / math.hypot(20, 200)),  # ann_1's alone
    }


def test_without_a_query_under_cross_an_epoch_is_chosen_by_same_with_a_warning(two_worlds, caplog):
    ann, bob = scan_persons(two_worlds)
    for persons, others in (([bob], set()), ([replace(ann, clean=ann.clean[:1], distorted=()), bob], set())):
        top1, row = validated(persons)
        assert top1 == row["top1_best"] == 1 and {"top1_cross", "top1_clean"} & row.keys() == others
    [message] = caplog.messages
    assert message.startswith(f"{two_worlds}: no distorted photo shows a person with a second clean photo")


def test_a_kind_called_like_a_figure_does_not_replace_it(two_worlds):
    for name in ("mean", "best", "cross", "clean"):
        write_plain(two_worlds / f"bob/distortion/bob_1_{name}.png", (0, 200, 0))  # ann's colour
    top1, row = validated(two_worlds)
    assert row["top1_best"] == 6 / 10 and (row["top1_cross"], row["top1_clean"]) == (1 / 4, 0)
    assert top1 == (6 / 10 + 1 / 4) / 2


@pytest.mark.parametrize("template", ["mean", "best"])
def test_without_quick_the_figures_are_those_of_evaluate(two_worlds, template):
    model = MeanColour()
    gallery = build_gallery(model, two_worlds, pil_to_tensor, "cpu", template=template)
    _, details = evaluate(model, gallery, two_worlds, pil_to_tensor, "cpu")
    _, row = validate(model, on(two_worlds, template=template))
    kinds = {name: value for name, value in summary(details).items() if name not in ("top1_mean", "top1_best")}
    assert kinds.items() <= row.items() and set(kinds) == {"top1_foggy", "top1_rainy"}
    assert len(model.seen) == 2 * len(TWO_WORLDS) + 3 and all(model.seen)  # with its mirror image


@pytest.mark.parametrize("template, foggy", [("mean", 0.5), ("best", 1.0)])
def test_the_summary_has_each_kind_under_the_chosen_template(template, foggy):
    per_kind = {"foggy": {"queries": 2, "top1": {"mean": 0.5, "best": 1.0}}}
    details = {"template": template, "top1": {"mean": 0.25, "best": 0.75}, "per_kind": per_kind}
    assert summary(details) == {"top1_mean": 0.25, "top1_best": 0.75, "top1_foggy": foggy}


# --- quick validation ------------------------------------------------------------------------------------------------


def person(name: str, photos: int, kinds: str) -> Person:
    clean = [Path(f"{name}/{n}.png") for n in range(photos)]
    return Person(name, tuple(clean), tuple(Path(f"{name}/distortion/{p.stem}_{k}.png") for p in clean for k in kinds))


@pytest.mark.parametrize("kinds", ["a", "ab", "abc", "abcdef", "abcdefg"])
def test_thinning_keeps_all_clean_photos_and_a_third_of_each_kind_across_persons(kinds):
    persons = [person(f"p{number}", photos, kinds) for number, photos in enumerate((1, 2, 1, 4, 1, 1, 2))]
    kept = thinned(persons, QUICK_STRIDE)
    for some, full in zip(kept, persons, strict=True):
        assert (some.name, some.clean) == (full.name, full.clean) and set(some.distorted) <= set(full.distorted)
    photos = [path for some in kept for path in some.distorted]
    assert Counter(map(distortion_kind, photos)) == dict.fromkeys(kinds, 4)
    if len(kinds) == 7:  # the same as every third photo of all
        assert photos == [path for full in persons for path in full.distorted][::QUICK_STRIDE]


def test_quick_validation_embeds_a_third_of_the_distorted_photos_without_mirror_images(two_worlds):
    model = MeanColour()
    top1, row = validated(two_worlds, quick=True, model=model)
    assert model.seen == [False] * (3 + 3 + 1) and model.mirror  # clean photos, degraded ones and the first foggy one
    assert (row["top1_best"], row["top1_cross"], top1) == (1, 0, 1 / 2) and "top1_rainy" not in row


def test_quick_validation_that_fails_restores_the_mirroring(two_worlds):
    model = MeanColour()
    with pytest.raises(ZeroDivisionError):
        validate(model, on(two_worlds, transform=lambda image: 1 / 0, quick=True))
    assert model.mirror
