"""That no figure is circular: embedders that know nothing score what guessing scores, through all of evaluate.py."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate

PERSONS, PHOTOS, KINDS = 25, 3, ("blurred", "foggy", "noisy")
PROTOCOLS = ("same", "cross", "clean")


class Guesses(nn.Module):
    """Embeds each photo anywhere, wherever its person's other photos and its own copies are."""

    def forward(self, images):
        def anywhere(image):
            seed = zlib.crc32(image.contiguous().numpy().tobytes())
            return torch.randn(64, generator=torch.Generator().manual_seed(seed))

        return nn.functional.normalize(torch.stack([anywhere(image) for image in images]))


class SaysTheSame(nn.Module):
    """Embeds every photo in one and the same place."""

    def forward(self, images):
        return torch.full((len(images), 64), 1 / 8)


class Sees(nn.Module):
    """Embeds a photo by its pixels: a copy lies next to its source."""

    def forward(self, images):
        return nn.functional.normalize(nn.functional.avg_pool2d(images, 4).flatten(1))


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """evaluated(network) -> the "protocols" of figures.json; the tree is `tmp_path`/val."""
    random = np.random.default_rng(7)
    for number in range(PERSONS):
        folder = tmp_path / "val" / f"p{number:02}"
        for name in ("clean", "distortion"):
            (folder / name).mkdir(parents=True)
        for photo in range(PHOTOS):
            pixels = random.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "clean" / f"p{number:02}_{photo}.png")
            for kind in KINDS:
                noisy = np.clip(pixels + random.normal(0, 8, size=pixels.shape), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(folder / "distortion" / f"p{number:02}_{photo}_{kind}.png")
    constants = {"DATA_DIR": tmp_path, "RESULTS_DIR": tmp_path / "results", "NUM_WORKERS": 0, "PICTURES": False}
    for constant, value in (constants | {"CHECKPOINT": None, "COMPARE_WITH": None, "PROTOCOLS": PROTOCOLS}).items():
        monkeypatch.setattr(evaluate, constant, value)

    def evaluate_(network: nn.Module) -> dict:
        facts = {"stage": None, "image_size": 76, "face_crop": 1.0, "persons": [], "holdout": [], "selected_on": None}
        monkeypatch.setattr(evaluate.checkpoints, "load_model", lambda *_: (network.eval(), dict(facts)))
        evaluate.main()
        return json.loads(next((tmp_path / "results").glob("*/figures.json")).read_text())["protocols"]

    return evaluate_


def within_chance(share: float, chance: float, draws: int) -> bool:
    """Whether so large a share is within 3.3 standard deviations (99.9 %) of the binomial distribution."""
    return abs(share - chance) <= 3.3 * math.sqrt(chance * (1 - chance) / draws)


def test_the_same_tree_is_solved_by_who_sees_copies_and_by_nobody_under_the_other_protocols(evaluated):
    """What the tests below rest on: the tree can be solved, as far as finding the photo again goes."""
    told = evaluated(Sees())
    assert told["same"]["top1"] == {"mean": 1.0, "best": 1.0}
    for protocol in ("cross", "clean"):  # a person's photos have nothing in common
        for template in ("mean", "best"):
            assert within_chance(told[protocol]["top1"][template], 1 / PERSONS, PERSONS * PHOTOS)


def test_guesses_score_what_guessing_scores(evaluated):
    told = evaluated(Guesses())
    for protocol in PROTOCOLS:
        of_protocol = told[protocol]
        draws = of_protocol["queries"]
        assert draws == PERSONS * PHOTOS * (1 if protocol == "clean" else len(KINDS))
        for template in ("mean", "best"):
            figures = of_protocol["figures"][template]["all"]
            assert of_protocol["top1"][template] == pytest.approx(figures["rank-1"]["value"])
            assert within_chance(figures["rank-1"]["value"], 1 / PERSONS, draws)
            assert within_chance(figures["rank-5"]["value"], 5 / PERSONS, draws)
            assert within_chance(figures["EER"]["value"], 1 / 2, draws)
            assert within_chance(figures["TAR@FAR=0.01"]["value"], 0.01, draws)
            assert figures["mAP"]["value"] < 0.12  # of three photos among 75, at random places


def test_one_embedding_for_everybody_names_the_first_and_is_never_told_right_for_it(evaluated):
    told = evaluated(SaysTheSame())
    for protocol in PROTOCOLS:
        of_protocol = told[protocol]
        for template in ("mean", "best"):
            figures = of_protocol["figures"][template]["all"]
            assert figures["rank-1"]["value"] == pytest.approx(1 / PERSONS)  # the queries of the first by name
            assert figures["rank-5"]["value"] == pytest.approx(5 / PERSONS)
            assert figures["EER"]["value"] == pytest.approx(1 / 2)
            assert figures["TAR@FAR=0.01"]["value"] == 0  # a tie is no acceptance


def test_a_gallery_under_wrong_names_answers_by_chance(evaluated, tmp_path):
    """Who sees copies finds each photo again, but it bears somebody else's name."""
    photos = sorted((tmp_path / "val").glob("*/clean/*.png"))
    folders = [path.parent for path in photos]
    order = np.random.default_rng(1).permutation(len(photos))
    for path in photos:
        path.rename(tmp_path / path.name)
    for path, place in zip(photos, order, strict=True):
        (tmp_path / path.name).rename(folders[place] / path.name)
    stay = np.mean([path.parent == folders[place] for path, place in zip(photos, order, strict=True)])
    told = evaluated(Sees())
    assert told["same"]["top1"]["best"] == pytest.approx(stay)  # those that have their own name by chance
    assert within_chance(stay, 1 / PERSONS, len(photos))
    for protocol in PROTOCOLS:
        for template in ("mean", "best"):
            assert within_chance(told[protocol]["top1"][template], 1 / PERSONS, PERSONS * PHOTOS)


def test_chance_has_bounds_that_a_little_better_than_guessing_breaks():
    assert not within_chance(0.08, 0.04, 300) and within_chance(0.05, 0.04, 300)
