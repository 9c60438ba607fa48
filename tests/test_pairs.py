"""Two photos, one answer: pairs are read, compared, and the rate behind an answer is stated."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import write_plain

from common import UserError
from faces import NO_FACE, Reading
from pairs import compare, pair_table, read_pairs

COSINES = {0.1: 0.3, 0.01: 0.5, 0.001: 0.7}


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    return [write_plain(tmp_path / f"{name}.png") for name in ("a", "b", "c")]


def test_two_photos_or_the_rows_of_a_file_are_pairs(photos, tmp_path):
    a, b, c = photos
    assert read_pairs([a, str(b)]) == [(a, b)]
    for header in ("", "first,second,note\n"):
        (tmp_path / "pairs.csv").write_text(f"\ufeff{header}a.png,b.png,yes\n\n{c},a.png\n", encoding="utf-8")
        assert read_pairs(tmp_path / "pairs.csv") == [(a, b), (c, a)]


@pytest.mark.parametrize(
    "rows, message",
    [
        ("a.png\n", r"pairs\.csv: row 1 has one column, expected two paths"),
        ("a.png,b.png\na.png,nowhere.png\n", r"PAIRS: .*nowhere\.png: no such photo"),
        ("first,second\n", r"pairs\.csv: no pair in it"),
    ],
)
def test_a_file_without_pairs_of_photos_is_refused(photos, tmp_path, rows, message):
    (tmp_path / "pairs.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "pairs.csv")


@pytest.mark.parametrize("odd", [[], ["a.png"], [1, 2], 7, "nowhere.csv", ["nowhere.png", "a.png"]])
def test_what_is_no_pair_is_refused(odd):
    with pytest.raises(UserError, match=r"^PAIRS"):
        read_pairs(odd)


def test_answers_are_same_different_or_why_not_with_the_rate_behind_them():
    a, b, c, d = (Path(f"{name}.png") for name in "abcd")
    rows = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.1]]), dim=1)
    readings = [Reading(a, file=a), Reading(b, file=b), Reading(d, NO_FACE), Reading(c, file=c)]
    answers = compare([(a, b), (a, c), (a, d)], readings, rows, threshold=0.5, cosines=COSINES)
    assert [answer.status for answer in answers] == ["same", "different", NO_FACE]
    assert answers[0].cosine == pytest.approx(0.6) and (answers[0].far, answers[1].far) == (0.01, None)
    assert answers[2].cosine is None and answers[2].reason == "d.png"
    table = pair_table(answers)
    assert "at most 1 % of pairs of different persons reach it" in table and "(no face)" in table
    assert table.endswith("same: cosine >= 0.500")


def test_without_a_threshold_there_is_a_cosine_and_no_answer():
    a, b = Path("a.png"), Path("b.png")
    (answer,) = compare([(a, b)], [Reading(a, file=a), Reading(b, file=b)], torch.eye(2), threshold=None, cosines={})
    assert (answer.status, answer.cosine, answer.far) == ("", 0.0, None)
    assert pair_table([answer]).endswith("no answers: set THRESHOLD, or take a checkpoint that has a calibration")
