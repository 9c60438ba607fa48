"""checkpoints.py: files written whole or not at all, and checkpoints that are read strictly."""

import contextlib
import copy
import math
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import filelock
import pytest
import torch
from conftest import MakesFolderWhenLoaded
from tiny_net import TinyNet
from torch import nn

import checkpoints
from checkpoints import atomic_file, check_writable, locked
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
    [left] = tmp_path.glob(".last.pt.*.tmp")
    assert left.stat().st_size > 1000  # it was in the middle of it
    assert path.read_bytes() == before
    save(path, weight=2.0)  # what was left behind does not stand in the way
    assert checkpoints.read_checkpoint(path)["model"]["weight"].item() == 2.0
    os.utime(left, (0, 0))
    with locked(tmp_path, refusal=None):
        assert names_in(tmp_path) == [".lock", "last.pt"]


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
    "crops",
    [
        {"face": 0.5, "wide_size": 10**6, "wide_weight": 0.3},
        {"face": 1e-9, "wide_size": 112, "wide_weight": 0.03},
        {"face": torch.zeros(2)},
        {},
        torch.zeros(2),
        [1],
    ],
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


# --- several writers of one file --------------------------------------------------------------------------------------

FORK = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")  # a fork imports nothing again


def add_letter(path: Path, letter: str) -> None:
    """To a file that it reads first, slowly: without a lock, letters of others are lost."""
    with locked(path, refusal=None):
        content = path.read_bytes() if path.exists() else b""
        time.sleep(0.1)
        write(path, content + letter.encode())


def hold(path: Path, seconds: float, holds) -> None:
    with locked(path, refusal=None):
        holds.set()
        time.sleep(seconds)


@contextlib.contextmanager
def held_elsewhere(path: Path, seconds: float):
    """A process that has locked `path`; killed after the block."""
    holds = FORK.Event()
    process = FORK.Process(target=hold, args=(path, seconds, holds))
    process.start()
    try:
        assert holds.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


def write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_writers_of_one_file_do_not_mix_and_the_last_to_finish_counts(tmp_path):
    path = tmp_path / "file.bin"
    with atomic_file(path) as first:
        first.write(b"first, long")
        with atomic_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first, long" and names_in(tmp_path) == ["file.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_new_file_has_the_usual_mode_and_a_replaced_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file.bin", b"new")
        assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o640
        (tmp_path / "file.bin").chmod(0o604)
        write(tmp_path / "file.bin", b"newer")
        assert stat.S_IMODE((tmp_path / "file.bin").stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("there", [True, False])  # False: the link points to a file that is yet to be made
def test_a_symlink_stays_one_and_the_file_behind_it_is_written(tmp_path, there):
    target, link = tmp_path / "disk" / "file.bin", tmp_path / "file.bin"
    if there:
        write(target, b"old")
    link.symlink_to(Path("disk") / "file.bin")
    write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and not target.is_symlink()
    assert names_in(tmp_path / "disk") == ["file.bin"]


def test_names_of_any_length_that_a_filesystem_takes_can_be_written(tmp_path):
    for name in ("x" * 255, "李" * 85):
        write(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"


def test_a_file_held_by_another_program_for_a_moment_is_replaced_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    replace, refusals = os.replace, [PermissionError(13, "held")] * 3

    def held(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    write(tmp_path / "file.bin", b"content")
    assert (tmp_path / "file.bin").read_bytes() == b"content"
    monkeypatch.setattr(checkpoints, "REPLACE_SECONDS", 0)
    refusals += [PermissionError(13, "held")] * 9
    with pytest.raises(PermissionError):
        write(tmp_path / "file.bin", b"other")
    assert (tmp_path / "file.bin").read_bytes() == b"content" and names_in(tmp_path) == ["file.bin"]


# --- check_writable ---------------------------------------------------------------------------------------------------


def test_a_place_to_write_to_is_made_and_left_empty(tmp_path):
    check_writable("OUT", tmp_path / "a" / "file.bin", folder=False)
    check_writable("OUT_DIR", tmp_path / "b" / "c", folder=True)
    assert names_in(tmp_path) == ["a", "b"] and names_in(tmp_path / "a") == [] and names_in(tmp_path / "b" / "c") == []


def test_a_place_that_cannot_be_written_to_is_refused_by_the_name_of_its_constant(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, folder, message in (
        (tmp_path, False, f"OUT = {tmp_path}: is a folder; give the path of a file"),
        (tmp_path / "file", True, "is a file; give the path of a folder"),
        (tmp_path / "file" / "below", False, "file cannot be written to .*; choose a folder where you may write"),
        (tmp_path / "file" / "below", True, "below cannot be written to .*; choose a folder where you may write"),
        (Path("/proc/no/such"), False, "OUT = /proc/no/such: /proc/no cannot be written to"),
    ):
        with pytest.raises(UserError, match=message):
            check_writable("OUT", path, folder=folder)


# --- locked -----------------------------------------------------------------------------------------------------------


def test_what_8_processes_add_to_a_file_at_once_is_all_in_it(tmp_path):
    letters = "abcdefgh"
    processes = [FORK.Process(target=add_letter, args=(tmp_path / "file", letter)) for letter in letters]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert "".join(sorted((tmp_path / "file").read_text())) == letters


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_holds_is_refused_until_it_is_killed(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoints, "GRACE_SECONDS", 0.1)
    path, link = tmp_path / kind, tmp_path / "link"
    if kind == "folder":
        path.mkdir()
    link.symlink_to(path)
    with held_elsewhere(path, seconds=60):
        for name in (path, link):
            with pytest.raises(UserError, match=f"{name.name}: in use; use another one$"):
                locked(name, refusal="in use; use another one")
    held = locked(path, refusal="in use")
    with pytest.raises(UserError, match="in use"):
        locked(path, refusal="in use")
    held.lock.release()
    with locked(path, refusal="in use"):
        pass


def test_a_lock_that_is_waited_for_is_announced(tmp_path, caplog):
    path = tmp_path / "file"
    with held_elsewhere(path, seconds=1) as other, locked(path, refusal=None):
        other.join(10)
        assert other.exitcode == 0
    assert caplog.messages == [f"{path}: another process changes it; waiting until it has finished"]


def test_temporary_files_of_killed_writers_are_removed_and_no_others(tmp_path):
    for name in (".file.bin.0123.tmp", ".other.bin.0123.tmp", "file.bin.tmp"):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".file.bin.4567.tmp").write_bytes(b"being written")
    with locked(tmp_path / "file.bin", refusal=None):
        assert names_in(tmp_path) == [".file.bin.4567.tmp", ".file.bin.lock", ".other.bin.0123.tmp", "file.bin.tmp"]
    with locked(tmp_path, refusal=None):
        assert names_in(tmp_path) == [".file.bin.4567.tmp", ".file.bin.lock", ".lock", "file.bin.tmp"]


def test_where_nothing_can_be_locked_the_work_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def no_lock(self, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", no_lock)
    with locked(tmp_path / "file", refusal=None):
        write(tmp_path / "file", b"content")
    assert caplog.messages == [
        f"{tmp_path / 'file'}: cannot be locked ([Errno 37] No locks available); "
        "nothing else may change it while this script runs"
    ]
