"""checkpoints.py: files written whole or not at all, and checkpoints that are read strictly."""

import copy
import math
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import MakesFolderWhenLoaded, TinyNet
from torch import nn

import checkpoints
from common import UserError

REPO = Path(__file__).parents[1]
FACTS = {"stage": 1, "seed": 0, "image_size": 160, "face_crop": 0.52, "dropout": 0.4, "pretrained": "None"}
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


def endless() -> list:
    """A list of 60 lists whose text would have 2^60 numbers."""
    content = [1]
    for _ in range(60):
        content = [content, content]
    return content


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"image_size": 10**6}, "image_size is 1000000"),
        ({"image_size": 75}, "image_size is 75"),
        ({"image_size": True}, "image_size is True"),
        ({"face_crop": 0.0}, "face_crop is 0.0"),
        ({"face_crop": math.nan}, "face_crop is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"persons": ["ann", 2]}, "persons is ['ann', 2]"),
        ({"holdout": None}, "holdout is None"),
        ({"pretrained": None}, "pretrained is None"),
        ({"epoch": endless()}, "epoch is [[[["),
    ],
)
def test_a_fact_that_no_run_can_have_is_refused_before_it_is_used(tmp_path, change, fault):
    torch.save(FACTS | {"format": 1, "model": {}} | change, tmp_path / "other.pt")
    assert f"damaged, its {fault}" in refusal(tmp_path / "best.pt", (tmp_path / "other.pt").read_bytes())


@pytest.mark.parametrize(
    "crops", [{"face": 0.5, "wide_size": 10**6, "wide_weight": 0.3}, {"face": torch.zeros(2)}, {}, torch.zeros(2), [1]]
)
def test_crops_that_this_version_does_not_know_are_refused(tmp_path, crops):
    torch.save(FACTS | {"format": 1, "model": {}, "crops": crops}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt: its crops .* are none that this version knows"):
        checkpoints.load_facenet(tmp_path / "best.pt", "cpu")


def test_a_checkpoint_that_lacks_weights_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    torch.save(FACTS | {"format": 1, "model": {}}, tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"its 'model' does not fit \(.*Missing key.*\); it is damaged, or of "):
        checkpoints.load_facenet(tmp_path / "best.pt", "cpu")


def test_a_missing_checkpoint_is_refused_with_the_way_out(tmp_path):
    message = f"^{tmp_path / 'best.pt'}: no checkpoint; run the stage that writes it, or correct the path"
    with pytest.raises(UserError, match=message):
        checkpoints.read_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("content", [5, [1], {1: torch.zeros(1)}, {"weight": "none"}, torch.zeros(2)])
def test_a_part_of_something_else_is_refused_in_a_sentence(content):
    optimizer = torch.optim.SGD(linear(1.0).parameters(), 0.1)
    for part in (linear(1.0), optimizer):
        with pytest.raises(UserError, match=r"^last\.pt: its 'part' does not fit \("):
            checkpoints.restore(Path("last.pt"), {"part": content}, {"part": part})


def test_restore_names_the_part_that_is_missing_or_does_not_fit():
    saved = {"model": linear(1.0).state_dict()}
    with pytest.raises(UserError, match=r"^best\.pt: holds no 'head'; only last\.pt can be resumed"):
        checkpoints.restore(Path("best.pt"), saved, {"head": linear(1.0)})
    for part in (nn.Linear(5, 1, bias=False), nn.Linear(1, 1), nn.BatchNorm1d(1)):
        with pytest.raises(
            UserError, match=r"^last\.pt: its 'model' does not fit \(.*a constant differs from that run"
        ):
            checkpoints.restore(Path("last.pt"), saved, {"model": part})


# --- files that are larger than they look -----------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch) -> None:
    """Fails a test in which torch unpacks a file."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was unpacked"))


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path, unread):
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("best/data.pkl", bytes(2**26))
    assert path.stat().st_size < 2**17  # of 64 MiB
    sentence = refusal(path, path.read_bytes())
    assert "(it is compressed, which torch.save never does); run the stage that writes it again" in sentence


def test_a_file_with_one_part_under_many_names_is_refused_before_it_is_unpacked(tmp_path, unread):
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("best/data/0", bytes(2**16))
        for number in range(1, 100):
            archive.filelist.append(copy.copy(archive.filelist[0]))
            archive.filelist[-1].filename = f"best/data/{number}"
    assert path.stat().st_size < 2**17  # of 6 MiB
    assert "(its parts overlap)" in refusal(path, path.read_bytes())


def test_a_torchscript_program_is_called_one_and_torchs_advice_to_run_its_code_is_not_given(tmp_path):
    with zipfile.ZipFile(tmp_path / "program.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("program/constants.pkl", b"")
    assert "(a TorchScript program; " in refusal(tmp_path / "best.pt", (tmp_path / "program.pt").read_bytes())
    tarfile.open(tmp_path / "old.tar", "w").close()
    assert "weights_only" not in refusal(tmp_path / "best.pt", (tmp_path / "old.tar").read_bytes())


@pytest.mark.filterwarnings("ignore")  # of torch, while such tensors are made
@pytest.mark.parametrize(
    "make, fault",
    [
        (lambda: torch.eye(3).to_sparse(), "its tensor 'weight' is sparse, expected a dense one"),
        (lambda: torch.eye(3).to_sparse_csr(), "its tensor 'weight' is sparse, expected a dense one"),
        (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "its tensor 'weight' is quantized"),
        (lambda: torch.zeros(3, device="meta"), "its tensor 'weight' is without values, on the meta device"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "its tensor 'weight' is nested"),
        (lambda: torch.zeros(()).expand(10**6, 10**6), "its tensors would take 3725.3 GiB, more than the file holds"),
    ],
)
def test_a_tensor_that_is_not_dense_or_larger_than_its_file_is_refused(tmp_path, make, fault):
    torch.save(FACTS | {"format": 1, "model": {"weight": make()}}, tmp_path / "other.pt")
    sentence = refusal(tmp_path / "best.pt", (tmp_path / "other.pt").read_bytes())
    assert f"damaged, or not a checkpoint ({fault}" in sentence
