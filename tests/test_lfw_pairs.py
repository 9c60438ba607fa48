"""lfw_pairs.py: LFW's list is read, and the figures are those of the protocol."""

import numpy as np
import pytest
from conftest import write_photo

from common import UserError
from tools import lfw_pairs

LIST = """2\t2
Ann_Lee 1 2
Bo 1 2
Ann_Lee 1 Bo 1
Ann_Lee 2 Cy 1
Ann_Lee 1 3
Bo 1 3
Cy 1 Bo 2
Ann_Lee 3 Bo 3
"""


@pytest.fixture
def lfw(tmp_path, monkeypatch):
    colours = {"Ann_Lee": (200, 30, 30), "Bo": (30, 200, 30), "Cy": (30, 30, 200)}
    for name, colour in colours.items():
        for number in (1, 2, 3):
            write_photo(tmp_path / name / f"{name}_{number:04d}.jpg", colour, seed=number)
    (tmp_path / "pairs.txt").write_text(LIST)
    for name, value in {"LFW_DIR": tmp_path, "PAIRS_FILE": tmp_path / "pairs.txt", "CHECKPOINT": None}.items():
        monkeypatch.setattr(lfw_pairs, name, value)
    for name, value in {"PRETRAINED": None, "IMAGE_SIZE": 76, "NUM_WORKERS": 0}.items():
        monkeypatch.setattr(lfw_pairs, name, value)
    return tmp_path


def test_pairs_are_read_fold_by_fold(lfw):
    pairs = lfw_pairs.read_pairs(lfw / "pairs.txt", lfw)
    firsts = [path.name for path in pairs.first[:4]]
    assert firsts == ["Ann_Lee_0001.jpg", "Bo_0001.jpg", "Ann_Lee_0001.jpg", "Ann_Lee_0002.jpg"]
    assert pairs.second[3] == lfw / "Cy" / "Cy_0001.jpg"
    assert pairs.same.tolist() == [True, True, False, False] * 2 and pairs.fold.tolist() == [0] * 4 + [1] * 4


def test_the_whole_protocol_runs_and_prints_its_figures(lfw, capsys):
    figures = lfw_pairs.main()
    assert 0.5 <= figures["accuracy"] <= 1 and "8 pairs, 7 photos: accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all_that_could_be_tried(seed):
    generator = np.random.default_rng(seed)
    same = generator.random(60) < 0.5
    cosines = np.round(generator.normal(size=60) + same, 1)  # with equal ones
    found = lfw_pairs.best_threshold(cosines, same)
    right = {value: int(((cosines >= value) == same).sum()) for value in sorted({*cosines.tolist()})}
    assert right[found] == max(right.values())


def test_each_fold_is_judged_by_the_threshold_of_the_others():
    same = np.array([True, False] * 6)
    fold = np.arange(12) // 4
    cosines = np.where(same, 0.8, 0.2)
    assert lfw_pairs.measure(cosines, same, fold)["accuracy"] == 1
    cosines[:4] = 0.1  # a fold of its own kind: by the others' 0.8, its pairs are all "different"
    assert lfw_pairs.measure(cosines, same, fold)["accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_tar_is_the_share_accepted_while_at_most_far_of_the_others_is(monkeypatch):
    monkeypatch.setattr(lfw_pairs, "RATES", (0.1, 0.25))
    same = np.array([True] * 20 + [False] * 20)
    cosines = np.concatenate([np.linspace(0, 1, 20), np.linspace(-0.5, 0.5, 20)])
    figures = lfw_pairs.measure(cosines, same, np.arange(40) % 2)
    for rate in (0.1, 0.25):
        expected = max((cosines[same] >= t).mean() for t in cosines if (cosines[~same] >= t).mean() <= rate)
        assert figures[f"TAR@FAR={rate:g}"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not in the form of LFW's pairs.txt"),
        ("2 2\nAnn_Lee 1\n", "not in the form of LFW's pairs.txt"),
        ("2\t2\nAnn_Lee 1 2\n", "1 pairs, its first line announces 8"),
        (
            "2\t1\nAnn_Lee 1 9\nAnn_Lee 1 Bo 1\nAnn_Lee 1 2\nBo 1 Cy 1\n",
            "1 photos of the pairs are missing",
        ),
    ],
)
def test_a_list_of_another_form_is_refused(lfw, text, message):
    (lfw / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        lfw_pairs.main()
