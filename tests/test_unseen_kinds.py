import numpy as np
import pytest
from conftest import write_photo
from PIL import Image

from common import UserError
from datasets import scan_persons, source_photo
from distortions import UNSEEN
from tools import unseen_kinds


@pytest.fixture
def script(monkeypatch, task_b, tmp_path):
    monkeypatch.setattr(unseen_kinds, "SOURCE_DIR", task_b / "val")
    monkeypatch.setattr(unseen_kinds, "OUT_DIR", tmp_path / "unseen")
    return unseen_kinds


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_each_clean_photo_asks_once_in_every_kind_that_training_has_not_seen(script, capsys):
    script.main()
    read, written = scan_persons(script.SOURCE_DIR), scan_persons(script.OUT_DIR / "val")
    assert [[path.read_bytes() for path in p.clean] for p in written] == [
        [path.read_bytes() for path in p.clean] for p in read
    ]
    for person in written:
        asked = sorted(path.stem for path in person.distorted)
        assert asked == sorted(f"{photo.stem}_{kind}" for photo in person.clean for kind in UNSEEN)
        for path in person.distorted:
            same = (pixels(path) == pixels(source_photo(path, person.clean))).all()
            # Squares, and the motion's rounded steps, may be smaller than a pixel of a 40 x 40 photo.
            assert not same or path.stem.endswith(("pixelated", "motionblur"))
    assert f"{3 * len(UNSEEN)} queries" in capsys.readouterr().out


def test_photos_of_a_kind_are_taken_instead_of_the_clean_ones(script, monkeypatch):
    monkeypatch.setattr(script, "SOURCE_KIND", "clean")
    write_photo(script.SOURCE_DIR / "eve" / "distortion" / "eve_0009_clean.png", (90, 90, 90), seed=9)
    script.main()
    asked = [path.stem for person in scan_persons(script.OUT_DIR / "val") for path in person.distorted]
    assert sorted(asked) == sorted(f"eve_0009_{kind}" for kind in UNSEEN)


def test_the_same_seed_writes_the_same_files_and_another_one_others(script, monkeypatch, tmp_path):
    trees = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setattr(script, "OUT_DIR", tmp_path / name)
        monkeypatch.setattr(script, "SEED", seed)
        script.main()
        trees.append([path.read_bytes() for path in sorted((tmp_path / name).rglob("*.png"))])
    assert trees[0] == trees[1] != trees[2]


def test_a_folder_that_is_there_is_never_written_into(script):
    script.OUT_DIR.mkdir()
    with pytest.raises(UserError, match="unseen: is there already; delete it, or give OUT_DIR another name"):
        script.main()
    assert not list(script.OUT_DIR.iterdir())


def test_a_kind_without_a_photo_is_told_and_leaves_nothing_behind(script, monkeypatch):
    monkeypatch.setattr(script, "SOURCE_KIND", "misty")
    with pytest.raises(ValueError, match="no photo of kind 'misty'; correct SOURCE_KIND"):
        script.main()
    assert not script.OUT_DIR.exists()


@pytest.mark.parametrize("severity", [-0.1, 1.1, "mild"])
def test_a_severity_out_of_range_is_refused_before_anything_is_written(script, monkeypatch, severity):
    monkeypatch.setattr(script, "SEVERITY", severity)
    with pytest.raises(ValueError, match=f"SEVERITY = {severity!r}: expected a number, 0..1"):
        script.main()
    assert not script.OUT_DIR.exists()
