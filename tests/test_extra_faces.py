"""extra_faces.py: which photos of a folder are used without names."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, write_photo

import extra_faces
import framing
from common import UserError
from extra_faces import find_extra_faces

BLUE = (20, 20, 220)  # of these photos the stand-in for MTCNN finds no face


class BlueIsNoFace:
    def __init__(self, device, min_face: int):
        assert (device, min_face) == (CPU, 40)

    def find(self, image) -> list[str]:
        assert image.size == (160, 160)
        red, _, blue = image.getpixel((80, 80))
        return ["a face"] if red > blue else []


@pytest.fixture
def folder(tmp_path, task_b, monkeypatch) -> Path:
    """Two usable photos at different depths, and one of each fault; beside Task_B."""
    monkeypatch.setattr(extra_faces, "FaceDetector", BlueIsNoFace)
    root = tmp_path / "extra"
    write_photo(root / "1.png", (220, 40, 40), seed=1000, side=80)
    write_photo(root / "a/b/2.png", (220, 40, 40), seed=1001, side=50)
    write_photo(root / "a/blue.png", BLUE, seed=1002, side=80)
    write_photo(root / "a/tiny.png", (220, 40, 40), seed=1003, side=49)
    (root / "a/broken.jpg").write_bytes(b"no picture")
    (root / "a/notes.txt").write_text("no photo")
    shutil.copy(root / "1.png", root / "a/b/again.png")
    shutil.copy(task_b / "val/eve/clean/eve_0001.png", root / "a/stranger.png")
    return root


def test_photos_that_cannot_teach_are_counted_by_their_reasons_and_left_out(folder, task_b, caplog, capsys):
    used = find_extra_faces(folder, task_b, face_crop=0.8, device=CPU)
    assert used == [folder / "1.png", folder / "a/b/2.png"]
    assert capsys.readouterr().out == (
        f"{folder}: 2 of 7 photos are used; left out: 1 in train/, val/ or test/ too, 1 twice, 1 unreadable, "
        "1 without a face in the crop, 1 with a crop of less than 40 pixels\n"
    )
    assert [message.partition(";")[0] for message in caplog.messages] == [
        f"{folder}: 1 file left out: 1 .txt",
        f"EXTRA_FACES: 1 photos lie in {task_b} too and are left out (stranger.png)",
    ]


def test_photos_that_are_framed_around_their_faces_are_searched_once(folder, task_b, monkeypatch, capsys):
    monkeypatch.setattr(framing, "_found", {})
    boxes = {"1.png": (0.2, 0.2, 0.8, 0.8), "2.png": (0.0, 0.0, 0.5, 0.5)}  # 48 of 80 pixels, 25 of 50
    monkeypatch.setattr(framing, "find_box", lambda image, detector: boxes.get(image.info["path"].name))
    monkeypatch.setattr(extra_faces.FaceDetector, "find", None)
    assert find_extra_faces(folder, task_b, 0.52, CPU, "detected") == [folder / "1.png"]
    out = capsys.readouterr().out
    assert "left out: 2 with a crop of less than 40 pixels, " in out and ", 1 without a face in the crop" in out


def test_a_clean_folder_is_used_as_a_whole_without_a_warning(folder, task_b, caplog, capsys):
    shutil.rmtree(folder / "a")
    assert find_extra_faces(folder, task_b, face_crop=0.8, device=CPU) == [folder / "1.png"]
    assert capsys.readouterr().out == f"{folder}: 1 of 1 photos are used\n" and caplog.messages == []


def test_processes_together_find_what_one_finds(folder, task_b, monkeypatch):
    whole = find_extra_faces(folder, task_b, face_crop=0.8, device=CPU)
    parts = []
    for rank in (0, 1, 0):  # the first time round, no process has the parts of the others

        def gather(mine: dict, rank=rank) -> list[dict]:
            parts.append((rank, mine))
            return [dict(parts).get(other, {}) for other in range(2)]

        monkeypatch.setattr(extra_faces, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(extra_faces, "gather_objects", gather)
        used = find_extra_faces(folder, task_b, face_crop=0.8, device=CPU)
    assert used == whole
    assert all(mine for _, mine in parts) and not parts[0][1].keys() & parts[1][1].keys()


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "EXTRA_FACES = {root}: no such folder; correct it, or set EXTRA_FACES = None"),
        (
            "Task_B/train",
            "EXTRA_FACES = {root}: 0 of 21 photos are used; left out: 21 in train/, val/ or test/ too; name",
        ),
    ],
)
def test_a_folder_without_usable_photos_is_refused(folder, task_b, name, message):
    root = folder.parent / name
    with pytest.raises(UserError) as error:
        find_extra_faces(root, task_b, face_crop=0.8, device=CPU)
    assert str(error.value).startswith(message.format(root=root))


def test_mtcnn_looks_for_a_face_where_the_network_looks(tmp_path):
    """No face is in noise; that MTCNN finds faces, test_faces.py shows."""
    write_photo(tmp_path / "extra/noise.png", (120, 120, 120), seed=0, side=200)
    with pytest.raises(UserError, match="1 without a face in the crop"):
        find_extra_faces(tmp_path / "extra", tmp_path / "Task_B", face_crop=0.5, device=torch.device("cpu"))
