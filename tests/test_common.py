"""common.py: how a script ends, what it prints, and what each module may need."""

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import evaluate
from common import UserError, derived_seed
from optimisation import precision


def raising(error: BaseException):
    def main():
        raise error

    return main


def test_a_users_mistake_ends_a_script_with_its_sentence_and_no_traceback(tmp_path, monkeypatch):
    code = (
        "import common\ndef main():\n    raise common.UserError('BATCH_SIZE = 1: too few')\ncommon.run_script(main)\n"
    )
    (tmp_path / "script.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TRACEBACK": ""}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: BATCH_SIZE = 1: too few\n(TRACEBACK=1 python script.py shows where)\n"
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(UserError, match="the place"):
        common.run_script(raising(UserError("the place")))


@pytest.mark.parametrize("kind", [KeyError, AssertionError, RuntimeError, ValueError, OSError])
def test_our_own_mistakes_keep_their_traceback(monkeypatch, kind):
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(kind, match="bug"):
        common.run_script(raising(kind("bug")))


def test_an_interrupted_script_says_how_to_go_on_if_it_can(monkeypatch):
    def end_of(error: KeyboardInterrupt) -> object:
        with pytest.raises(SystemExit) as end:
            common.run_script(raising(error))
        return end.value.code

    assert end_of(KeyboardInterrupt()) == "\ninterrupted"
    assert end_of(KeyboardInterrupt("stopped after batch 3")) == "\nstopped after batch 3"  # the run could still save
    monkeypatch.setitem(globals(), "RESUME", False)  # as a training script has it
    way_on = "RESUME = True goes on from the last checkpoint, if there is one"
    assert end_of(KeyboardInterrupt()) == f"\ninterrupted; {way_on}"


def test_a_constant_that_a_script_does_not_have_cannot_be_set():
    with pytest.raises(AttributeError, match="NO_SUCH_CONSTANT"):
        common.set_constants(evaluate, NO_SUCH_CONSTANT=1)


def test_derived_seeds_depend_on_every_number_and_on_their_order():
    seeds = {derived_seed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3 and all(0 <= seed < 2**63 for seed in seeds)


# --- text and output --------------------------------------------------------------------------------------------------

ESCAPE = "\x1b]0;evil\x07\x1b[31m"  # sets a terminal's title, then its colour


@pytest.mark.parametrize(
    "name, shown",
    [
        (ESCAPE, r"\x1b]0;evil\x07\x1b[31m"),
        ("two\nlines\r", r"two\nlines\r"),
        ("txt\u202egpj.exe", r"txt\u202egpj.exe"),  # the rest would be shown from right to left
        ("caf\udce9", r"caf\udce9"),  # a byte of a file's name that is no UTF-8
        ("José 山田\u3000太郎 क्\u200dष", "José 山田\u3000太郎 क्\u200dष"),
    ],
)
def test_text_is_shown_without_what_a_terminal_would_obey(name, shown):
    assert common.safe_text(name) == shown


def test_an_encoding_gets_escapes_for_what_it_lacks_and_some_characters_may_be_kept():
    assert common.safe_text("é山\n", keep="\n", encoding="cp1252") == "é\\u5c71\n"


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_a_text_in_a_csv_file_is_no_formula_however_often_it_is_written(start):
    cell = common.csv_cell(f"{start}cmd|' /C calc'!A0")
    assert cell == f"'{start}cmd|' /C calc'!A0" == common.csv_cell(cell)
    assert common.csv_text(cell) == f"{start}cmd|' /C calc'!A0" and common.csv_text("'tis") == "'tis"
    assert common.csv_cell(ESCAPE + "=1") == r"\x1b]0;evil\x07\x1b[31m=1"
    unchanged = ["ann", "-0.5", "+1e-3", "nan", "", -0.5, None, 3]
    assert [common.csv_cell(value) for value in unchanged] == unchanged


# Prints 200 KB of a name that cp1252 cannot show, warns of it, then writes the file that it is about.
SCRIPT = """
import sys
from pathlib import Path
import common

def main():
    for _ in range(20_000):
        print("山 \\x1b[31m")
    sys.stderr.write("\\r50 %\\n")
    common.warn_once("山 \\x1b[31m")
    Path(sys.argv[1]).write_text("figures")
    if sys.argv[2] == "fails":
        raise common.UserError("山 \\x1b[31m: no such folder")

common.run_script(main)
"""


def run(tmp_path: Path, outcome: str, **streams) -> subprocess.CompletedProcess:
    """SCRIPT on a console of cp1252; the file that it writes must be there in any case."""
    file = tmp_path / "figures.txt"
    command = [sys.executable, "-c", SCRIPT, str(file), outcome]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(Path(common.__file__).parent)}
    done = subprocess.run(command, env=environment, **streams)
    assert file.read_text() == "figures"
    return done


def test_a_console_that_lacks_the_letters_of_a_name_gets_escapes_and_the_work_is_done(tmp_path):
    done = run(tmp_path, "fails", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert set(done.stdout.decode("cp1252").splitlines()) == {r"\u5c71 \x1b[31m"}
    bar, warning, error, way_out = done.stderr.decode("cp1252").replace("\r\n", "\n").split("\n")[:4]
    assert bar == "\r50 %" and warning == r"\u5c71 \x1b[31m" and error == r"error: \u5c71 \x1b[31m: no such folder"
    assert way_out == "(TRACEBACK=1 python -c shows where)"


def test_a_pipe_that_nobody_reads_any_more_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(tmp_path, "ends well", stdout=writing, stderr=subprocess.PIPE)
        assert done.returncode == 0 and done.stderr.decode("cp1252").splitlines()[1:] == ["50 %", r"\u5c71 \x1b[31m"]
        assert run(tmp_path, "ends well", stdout=writing, stderr=writing).returncode == 0  # 2>&1 | head
    finally:
        os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_finds_a_full_disk_is_reported_and_the_work_goes_on(tmp_path):
    with open("/dev/full", "wb") as full:
        done = run(tmp_path, "ends well", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stderr.count(b"the output cannot be written (No space left on device)") == 1


def test_a_script_without_a_console_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    common.run_script(lambda: print("nobody sees this", ESCAPE))
    assert sys.stdout is None


def test_a_second_main_in_one_process_warns_again(caplog):
    for _ in range(2):
        common.pick_device()
        for _ in range(2):
            common.warn_once("two persons share a photo")
    assert caplog.messages == ["two persons share a photo"] * 2


# --- paths ------------------------------------------------------------------------------------------------------------


ROOT = Path(common.__file__).parent
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))
    if "run_script(main)" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_path_of_a_script_may_be_given_as_a_text(script, monkeypatch):
    constants = vars(importlib.import_module(script))
    paths = [name for name, value in constants.items() if name.isupper() and isinstance(value, Path)]
    paths = [name for name in paths if name != "PHOTO_LIST"]  # the tool's own file
    assert paths or script.startswith("tools.benchmark")
    for name in paths:
        monkeypatch.setitem(constants, name, f"~/{name}")
    common.resolve_constants(constants)
    assert [constants[name] for name in paths] == [Path.home() / name for name in paths]


def test_words_that_are_no_paths_stay_and_what_cannot_be_one_is_refused():
    constants = {"COMPARE_WITH": "pretrained", "CHECKPOINT": None, "PRETRAINED": "vggface2", "ENROLL": "a/b"}
    common.resolve_constants(constants)
    assert constants == {
        "COMPARE_WITH": "pretrained",
        "CHECKPOINT": None,
        "PRETRAINED": "vggface2",
        "ENROLL": Path("a/b"),
    }
    for name, value in (("DATA_DIR", None), ("DATA_DIR", ""), ("OUT", 3), ("ENROLL", ["a"])):
        with pytest.raises(UserError, match=rf"^{name} = .*: expected a path, such as Path\("):
            common.resolve_constants({name: value})


@pytest.mark.parametrize("cores, processes, expected", [(2, 1, 2), (64, 1, 16), (8, 4, 2), (1, 4, 1)])
def test_auto_workers_are_the_cores_of_this_process_at_most_16(monkeypatch, cores, processes, expected):
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    script = {"NUM_WORKERS": "auto"}
    common.resolve_constants(script)
    assert script["NUM_WORKERS"] == expected
    monkeypatch.delattr(common.os, "sched_getaffinity")  # macOS, Windows
    monkeypatch.setattr(common.os, "cpu_count", lambda: cores)
    assert common.usable_cores() == expected


def test_a_mac_s_gpu_is_used_in_float32_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = common.pick_device()
    assert device == torch.device("mps") and caplog.messages == ["this Mac's GPU is used, in float32"]
    assert precision(device, "auto") is precision(device, None) is None
    for amp in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"AMP = '{amp}': on a Mac's GPU"):
            precision(device, amp)
