"""unseen_kinds.py: the tree that it writes."""

import numpy as np
import pytest
from conftest import made_with_seeds, write_photo
from PIL import Image

from common import UserError
from datasets import scan_persons
from distortions import UNSEEN
from folders import source_photos
from tools import unseen_kinds


@pytest.fixture
def script(monkeypatch, task_b, tmp_path):
    monkeypatch.setattr(unseen_kinds, "SOURCE_DIR", task_b / "val")
    monkeypatch.setattr(unseen_kinds, "OUT_DIR", tmp_path / "unseen")
    return unseen_kinds


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_each_clean_photo_is_a_query_once_in_every_kind_that_training_has_not_seen(script, capsys):
    script.main()
    read, written = scan_persons(script.SOURCE_DIR), scan_persons(script.OUT_DIR / "val")
    assert [[path.read_bytes() for path in person.clean] for person in written] == [
        [path.read_bytes() for path in person.clean] for person in read
    ]
    for person in written:
        queries = sorted(path.stem for path in person.distorted)
        assert queries == sorted(f"{photo.stem}_{kind}" for photo in person.clean for kind in UNSEEN)
        for path in person.distorted:
            (source,) = source_photos([path], person.clean)
            same = (pixels(path) == pixels(source)).all()
            # Squares, and the motion's rounded steps, may be smaller than a pixel of a 40 x 40 photo.
            assert not same or path.stem.endswith(("pixelated", "motionblur"))
    assert f"{3 * len(UNSEEN)} queries" in capsys.readouterr().out


def test_photos_of_a_kind_are_distorted_instead_of_the_clean_ones(script, monkeypatch):
    monkeypatch.setattr(script, "SOURCE_KIND", "clean")
    write_photo(script.SOURCE_DIR / "eve" / "distortion" / "eve_0009_clean.png", (90, 90, 90), seed=9)
    script.main()
    queries = [path.stem for person in scan_persons(script.OUT_DIR / "val") for path in person.distorted]
    assert sorted(queries) == sorted(f"eve_0009_{kind}" for kind in UNSEEN)


def test_other_kinds_are_made_too(script, monkeypatch):
    monkeypatch.setattr(script, "KINDS", ("glare", "sunny"))
    script.main()
    persons = scan_persons(script.OUT_DIR / "val")
    assert {path.stem.rpartition("_")[2] for person in persons for path in person.distorted} == {"glare", "sunny"}


def test_the_same_seed_writes_the_same_files_and_another_one_others(script, monkeypatch, tmp_path):
    first, again, other = made_with_seeds(script, monkeypatch, tmp_path / "runs", seeds=(0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("constant", "value", "message"),
    [
        ("SOURCE_KIND", "misty", "no photo of kind 'misty'; correct SOURCE_KIND"),
        ("KINDS", ("glare", "misty"), r"KINDS = \('glare', 'misty'\): expected a tuple of one or more of motionblur, "),
        ("KINDS", "glare", "KINDS = 'glare': expected a tuple"),
        ("SEVERITY", 1.1, "SEVERITY = 1.1: expected a number, 0..1"),
        ("SEVERITY", "mild", "SEVERITY = 'mild': expected a number, 0..1"),
    ],
)
def test_a_constant_that_cannot_be_leaves_nothing_behind(script, monkeypatch, constant, value, message):
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError, match=message):
        script.main()
    assert not script.OUT_DIR.exists()


def test_an_existing_folder_is_never_written_into(script):
    script.OUT_DIR.mkdir()
    with pytest.raises(UserError, match="unseen: already exists; delete it, or give OUT_DIR another name"):
        script.main()
    assert not list(script.OUT_DIR.iterdir())
