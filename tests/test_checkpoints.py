"""checkpoints.py: files written whole or not at all, and checkpoints that are read strictly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MakesFolderWhenLoaded
from torch import nn

import checkpoints
from common import UserError

REPO = Path(__file__).parents[1]
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.4}
FACTS |= {"persons": ["ann", "bob"], "holdout": [], "epoch": 1, "selected_on": "val"}


def linear(weight: float) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(weight)
    return layer


def save(path: Path, weight: float = 1.0) -> Path:
    checkpoints.save_checkpoint(path, FACTS, {"model": linear(weight)})
    return path


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_into_folders_that_are_made_on_the_way(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    with checkpoints.atomic_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_while_writing_keeps_the_old_file_and_leaves_no_other(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), checkpoints.atomic_file(path) as file:
        file.write(b"half of the new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_rows_are_written_under_the_keys_of_all_of_them(tmp_path):
    path = tmp_path / "log.csv"
    checkpoints.write_csv(path, [{"epoch": 0, "top1": 0.5}, {"epoch": 1, "loss": 2.5, "top1": 1.0}, {"note": "ä, b"}])
    assert path.read_bytes().decode() == 'epoch,top1,loss,note\n0,0.5,,\n1,1.0,2.5,\n,,,"ä, b"\n'


def test_a_csv_file_holds_no_formula_no_escape_code_and_no_byte_that_is_not_utf_8(tmp_path):
    path = tmp_path / "persons.csv"
    checkpoints.write_csv(path, [{"person": name, "loss": "-0.5"} for name in ("=1+1", "\x1b[2J", "caf\udce9")])
    assert path.read_text(encoding="utf-8") == "person,loss\n'=1+1,-0.5\n\\x1b[2J,-0.5\ncaf\\udce9,-0.5\n"


HALF_SAVE = """
import io, os, pathlib, signal, sys, torch, checkpoints
whole_save = torch.save

def half_save(content, file):
    buffer = io.BytesIO()
    whole_save(content, buffer)
    file.write(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half_save
checkpoints.save_checkpoint(pathlib.Path(sys.argv[1]), {"stage": 1}, {"model": torch.nn.Linear(1000, 1)})
"""


def test_a_process_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    """Killed with half of the new file on disk, by the one signal that no process can clean up after."""
    path = save(tmp_path / "last.pt", weight=1.0)
    before = path.read_bytes()
    command = [sys.executable, "-c", HALF_SAVE, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "last.pt.tmp").stat().st_size > 1000  # it was in the middle of it
    assert path.read_bytes() == before
    save(path, weight=2.0)  # what was left behind does not stand in the way
    assert checkpoints.read_checkpoint(path)["model"]["weight"].item() == 2.0
    assert not (tmp_path / "last.pt.tmp").exists()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_facts_and_weights(tmp_path):
    saved = checkpoints.read_checkpoint(save(tmp_path / "best.pt", weight=0.25))
    assert {name: saved[name] for name in FACTS} == FACTS
    model = linear(0.0)
    checkpoints.restore(tmp_path / "best.pt", saved, {"model": model})
    assert model.weight.item() == 0.25


def refusal(path: Path, content: bytes) -> str:
    """The sentence with which read_checkpoint refuses a file of these bytes."""
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        checkpoints.read_checkpoint(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_and_those_of_other_bytes_are_refused_with_the_way_out(tmp_path):
    whole, generator = save(tmp_path / "best.pt").read_bytes(), torch.Generator().manual_seed(0)
    cut = [whole[: int(share * len(whole))] for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.999)]
    other = [b"\x80", b".", b"r\xea", b"garbage", b"<html>404</html>", b"\xff\xd8\xff" * 40]
    sizes = torch.randint(1, 40, (300,), generator=generator).tolist()
    noise = [bytes(torch.randint(256, (size,), generator=generator).tolist()) for size in sizes]
    for content in cut + other:
        sentence = refusal(tmp_path / "best.pt", content)
        assert "damaged, or not a checkpoint (" in sentence and "run the stage that writes it again" in sentence
    for content in noise:
        refusal(tmp_path / "best.pt", content)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path, trace = tmp_path / "best.pt", tmp_path / "code_has_run"
    torch.save(FACTS | {"format": 1, "model": MakesFolderWhenLoaded(trace)}, path)
    sentence = refusal(path, path.read_bytes())
    assert "damaged, or not a checkpoint" in sentence
    assert not trace.exists()
    assert "weights_only" not in sentence  # torch's own advice: how to run the code all the same
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was armed


@pytest.mark.parametrize(
    "content, message",
    [
        (linear(1.0).state_dict(), "no checkpoint of these scripts; a bare state dict belongs in PRETRAINED"),
        ({}, "no checkpoint of these scripts"),
        ([1], "no checkpoint of these scripts"),
        (torch.zeros(3), "no checkpoint of these scripts"),
        (FACTS | {"format": 7, "model": {}}, "checkpoint format 7, these scripts read 1; train it again"),
        (FACTS | {"format": 1, "model": {}, "epoch": "one"}, "damaged, its epoch is 'one'; train it again"),
    ],
)
def test_a_torch_file_that_is_not_a_checkpoint_of_this_version_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    assert message in refusal(tmp_path / "best.pt", (tmp_path / "other.pt").read_bytes())


def test_a_missing_checkpoint_is_refused_with_the_way_out(tmp_path):
    message = f"^{tmp_path / 'best.pt'}: no checkpoint; run the stage that writes it, or correct the path"
    with pytest.raises(UserError, match=message):
        checkpoints.read_checkpoint(tmp_path / "best.pt")


def test_restore_names_the_part_that_is_missing_or_does_not_fit():
    saved = {"model": linear(1.0).state_dict()}
    with pytest.raises(UserError, match=r"^best\.pt: holds no 'head'; only last\.pt can be resumed"):
        checkpoints.restore(Path("best.pt"), saved, {"head": linear(1.0)})
    for part in (nn.Linear(5, 1, bias=False), nn.Linear(1, 1), nn.BatchNorm1d(1)):
        with pytest.raises(
            UserError, match=r"^last\.pt: its 'model' does not fit \(.*a constant differs from that run"
        ):
            checkpoints.restore(Path("last.pt"), saved, {"model": part})
