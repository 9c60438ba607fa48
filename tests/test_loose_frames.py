"""The loosely framed copy of a tree: names, how far photos move, and distorted copies with their clean photo."""

import numpy as np
import pytest
from PIL import Image

from common import UserError
from tools import loose_frames
from transforms import load_image


@pytest.fixture
def tree(tmp_path, monkeypatch):
    gradient = np.zeros((100, 100, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(100), np.arange(100)[:, None]
    for name in ("val/ann/clean/a_1.png", "val/ann/clean/a_2.png", "val/ann/distortion/a_1_dark.png", "val/bob/b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gradient).save(tmp_path / "in" / name)
    monkeypatch.setattr(loose_frames, "IN_DIR", tmp_path / "in")
    monkeypatch.setattr(loose_frames, "OUT_DIR", tmp_path / "out")
    return tmp_path / "out" / "val"


def test_photos_move_within_bounds_and_copies_move_with_their_clean_photo(tree):
    loose_frames.main()
    pixels = {path.name: np.asarray(load_image(path)).tolist() for path in tree.rglob("*.png")}
    assert len(pixels) == 4 and (tree / "bob" / "b.png").is_file()
    assert pixels["a_1.png"] == pixels["a_1_dark.png"] != pixels["a_2.png"]
    for photo in pixels.values():
        side = len(photo)
        assert 76 <= side <= 143  # 100 / 1.3 .. 100 / 0.7
        column, row, _ = photo[side // 2][side // 2]
        assert abs(column - 50) <= 16 and abs(row - 50) <= 16


@pytest.mark.parametrize("change, message", [({"IN_DIR": "none"}, "no such folder"), ({"OUT_DIR": "in"}, "lies in")])
def test_a_wrong_folder_is_refused(tree, tmp_path, monkeypatch, change, message):
    for name, value in change.items():
        monkeypatch.setattr(loose_frames, name, tmp_path / value)
    with pytest.raises(UserError, match=message):
        loose_frames.main()


def test_photos_that_would_get_one_name_are_refused(tree, tmp_path):
    Image.new("RGB", (50, 50)).save(tmp_path / "in" / "val" / "bob" / "b.jpg")
    with pytest.raises(UserError, match="differ in their suffix only"):
        loose_frames.main()
    assert not tree.exists()
