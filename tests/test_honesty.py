"""No figure is circular: networks that know nothing score what guessing scores, through all of evaluate.py."""

import json
import math
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
import gallery

PERSONS, PHOTOS, KINDS = 25, 3, ("blurred", "foggy", "noisy")
PROTOCOLS = ("same", "cross", "clean")
TEMPLATES = ("mean", "best")


class Guesses(nn.Module):
    """Embeds each photo at random, far from its person's other photos and from its own copies."""

    def forward(self, images):
        def at_random(image):
            seed = zlib.crc32(image.contiguous().numpy().tobytes())
            return torch.randn(64, generator=torch.Generator().manual_seed(seed))

        return nn.functional.normalize(torch.stack([at_random(image) for image in images]))


class GivesOneEmbedding(nn.Module):
    """Embeds every photo at the same place."""

    def forward(self, images):
        return torch.full((len(images), 64), 1 / 8)


class FindsCopies(nn.Module):
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
        facts = {"stage": None, "image_size": 76, "face_crop": 1.0, "framing": "centre"}
        facts |= {"persons": [], "holdout": [], "selected_on": None}
        monkeypatch.setattr(evaluate.checkpoints, "load_model", lambda *_: (network.eval(), dict(facts)))
        evaluate.main()
        return json.loads(next((tmp_path / "results").glob("*/figures.json")).read_text())["protocols"]

    return evaluate_


def within_chance(share: float, chance: float, draws: int) -> bool:
    """Whether the share is within 3.3 standard deviations (99.9 %) of the binomial distribution."""
    return abs(share - chance) <= 3.3 * math.sqrt(chance * (1 - chance) / draws)


def test_a_network_that_finds_copies_solves_same_and_is_at_chance_where_sources_are_left_out(evaluated):
    """What the tests below rest on: this tree can be solved, as far as finding the photo again goes."""
    protocols = evaluated(FindsCopies())
    assert protocols["same"]["top1"] == {"mean": 1.0, "best": 1.0}
    for protocol in ("cross", "clean"):  # a person's photos have nothing in common
        for template in TEMPLATES:
            assert within_chance(protocols[protocol]["top1"][template], 1 / PERSONS, PERSONS * PHOTOS)


def test_guesses_score_what_guessing_scores(evaluated):
    for protocol, details in evaluated(Guesses()).items():
        draws = details["queries"]
        assert draws == PERSONS * PHOTOS * (1 if protocol == "clean" else len(KINDS))
        for template in TEMPLATES:
            figures = {name: figure["value"] for name, figure in details["figures"][template]["all"].items()}
            assert details["top1"][template] == pytest.approx(figures["rank-1"])
            assert within_chance(figures["rank-1"], 1 / PERSONS, draws)
            assert within_chance(figures["rank-5"], 5 / PERSONS, draws)
            assert within_chance(figures["EER"], 1 / 2, draws)
            assert within_chance(figures["TAR@FAR=0.01"], 0.01, draws)
            assert figures["mAP"] < 0.12  # of three photos among 75, at random places


def test_one_embedding_for_all_photos_is_right_for_the_first_person_only(evaluated):
    for details in evaluated(GivesOneEmbedding()).values():
        for template in TEMPLATES:
            figures = {name: figure["value"] for name, figure in details["figures"][template]["all"].items()}
            assert figures["rank-1"] == pytest.approx(1 / PERSONS)  # the queries of the first person by name
            assert figures["rank-5"] == pytest.approx(5 / PERSONS)
            assert figures["EER"] == pytest.approx(1 / 2)
            assert figures["TAR@FAR=0.01"] == 0  # a tie is no acceptance


def test_a_gallery_with_shuffled_names_is_right_by_chance(evaluated, tmp_path):
    """A network that finds copies finds each photo again, now under another person's name."""
    photos = sorted((tmp_path / "val").glob("*/clean/*.png"))
    folders = [path.parent for path in photos]
    order = np.random.default_rng(1).permutation(len(photos))
    for path in photos:
        path.rename(tmp_path / path.name)
    for path, place in zip(photos, order, strict=True):
        (tmp_path / path.name).rename(folders[place] / path.name)
    kept = np.mean([path.parent == folders[place] for path, place in zip(photos, order, strict=True)])
    protocols = evaluated(FindsCopies())
    assert protocols["same"]["top1"]["best"] == pytest.approx(kept)  # those that kept their name by chance
    assert within_chance(kept, 1 / PERSONS, len(photos))
    for details in protocols.values():
        for template in TEMPLATES:
            assert within_chance(details["top1"][template], 1 / PERSONS, PERSONS * PHOTOS)


def test_a_share_a_little_better_than_guessing_is_not_within_chance():
    assert not within_chance(0.08, 0.04, 300) and within_chance(0.05, 0.04, 300)


def test_each_query_is_scored_once_per_protocol_and_template(evaluated, monkeypatch):
    scored, score = Counter(), gallery.person_scores

    def counted(**inputs):
        scored.update((inputs["template"], row) for row in map(tuple, inputs["queries"].tolist()))
        return score(**inputs)

    monkeypatch.setattr(gallery, "person_scores", counted)
    evaluated(Guesses())
    distorted, clean = PERSONS * PHOTOS * len(KINDS), PERSONS * PHOTOS
    assert len(scored) == len(TEMPLATES) * (distorted + clean)
    # A distorted photo is a query of "same" and of "cross", a clean one of "clean" only.
    assert Counter(scored.values()) == {2: len(TEMPLATES) * distorted, 1: len(TEMPLATES) * clean}
