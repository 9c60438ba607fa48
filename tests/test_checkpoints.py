"""Files that several processes write: whole, one at a time, in place of the old one."""

import contextlib
import multiprocessing
import os
import stat
import time
from pathlib import Path

import filelock
import pytest

import checkpoints
from checkpoints import atomic_file, check_writable, locked
from common import UserError

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


# --- atomic_file ------------------------------------------------------------------------------------------------------


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
