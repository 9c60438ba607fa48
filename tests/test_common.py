"""common.py: how a script ends, and what each module may need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import common
import evaluate
from common import UserError, derived_seed


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
