"""A checkpoint's own calibration: the cosines that pairs of different persons reach, and when they are measured."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import calibration
import checkpoints
from common import UserError
from gallery import Gallery, Queries
from metrics import MIN_ERRORS


def split(persons: int, queries: int, rated: bool) -> tuple[Gallery, Queries]:
    """Random embeddings; the first clean photos, and queries, are of lower quality."""
    generator = torch.Generator().manual_seed(0)
    clean, found = (F.normalize(torch.randn(count, 16, generator=generator)) for count in (2 * persons, queries))
    names = [f"p{number:03d}" for number in range(persons)]
    gallery = Gallery(
        embeddings=clean,
        labels=torch.arange(2 * persons) // 2,
        persons=names,
        paths=[Path(f"{number}.png") for number in range(2 * persons)],
        template="mean",
        quality=torch.arange(2 * persons).float() if rated else None,
    )
    truth = torch.arange(queries) % persons
    return gallery, Queries(
        embeddings=found,
        truth=truth,
        sources=torch.full((queries,), -1),
        paths=[Path(f"q{number}.png") for number in range(queries)],
        persons=[names[label] for label in truth.tolist()],
        kinds=["foggy"] * queries,
        quality=torch.arange(queries).float() if rated else None,
    )


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("template", ["mean", "best"])
def test_each_cosine_is_reached_by_its_share_of_the_pairs_of_different_persons(rated, template):
    gallery, queries = split(persons=60, queries=90, rated=rated)
    found = calibration.measure(gallery, queries)
    assert found["quality"] == (1.0 if rated else None)  # 1 % of 120
    usable = range(1 if rated else 0, 90)
    pairs = len(usable) * 59
    assert (found["pairs"], found["queries"], found["persons"], found["clean"]) == (pairs, len(usable), 60, 120)
    weight = gallery.quality.clamp(min=1e-6) if rated else torch.ones(120)
    cosines = []
    for query in usable:
        for person in set(range(60)) - {int(queries.truth[query])}:
            of_person = gallery.labels == person
            rows = gallery.embeddings[of_person]
            if template == "mean":
                rows = F.normalize((rows * weight[of_person, None]).sum(0, keepdim=True))
            cosines.append(float((rows @ queries.embeddings[query]).max()))
    rates = ["0.1", "0.05", "0.02", "0.01", "0.005", "0.002"]  # 5,310 pairs are too few for 0.001
    assert list(found["cosines"][template]) == rates
    for rate, cosine in found["cosines"][template].items():
        assert sum(value >= cosine for value in cosines) == int(float(rate) * pairs)


def test_no_rate_is_stated_that_the_pairs_cannot_measure():
    for persons, rates in ((2, []), (11, ["0.1"])):
        gallery, queries = split(persons=persons, queries=11, rated=False)
        found = calibration.measure(gallery, queries)
        assert list(found["cosines"]["mean"]) == list(found["cosines"]["best"]) == rates
        assert all(found["pairs"] * float(rate) >= MIN_ERRORS for rate in rates)
        threshold = calibration.from_checkpoint(found, 0.5, persons=3, template="best", source="best.pt")
        assert (threshold is None) == (not rates)


def test_both_scripts_add_a_calibration_to_the_best_checkpoint(stages, train):
    for script in stages:
        trained = train(script, script.__name__, {"EMA_DECAY": 0.5})
        for name in ("best.pt", "best_ema.pt"):
            found = checkpoints.read_checkpoint(script.RUN_DIR / name)["calibration"]
            assert found["persons"] == 2 and found["queries"] > 0 and set(found["cosines"]) == {"mean", "best"}
        assert "calibration" not in trained.last


@pytest.mark.parametrize(
    "broken", [[], {"cosines": {"mean": {"0.1": 0.5}}}, {"cosines": {"mean": {"0.1": "x"}}}, {"cosines": {}}, "much"]
)
def test_a_damaged_calibration_is_a_sentence(broken):
    if broken:
        with pytest.raises(UserError, match=r"best\.pt: its calibration is damaged"):
            calibration.from_checkpoint(broken, 0.1, persons=3, template="mean", source="best.pt")
    else:
        assert calibration.from_checkpoint(broken, 0.1, persons=3, template="mean", source="best.pt") is None
