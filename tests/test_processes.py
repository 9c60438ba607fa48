"""Runs in real processes (process_jobs.py): killed, stopped and resumed ones, and two processes that share a run."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import plain, write_task_b

from journal import ACTIVITIES

TESTS = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENVIRONMENT |= {"TRACEBACK": ""}
CLOCK = ("images_per_second", "seconds", *ACTIVITIES)


@dataclass
class Child:
    """A started child: its process, what it prints, and its folder."""

    process: subprocess.Popen
    out: Path

    @property
    def stdout(self) -> str:
        return (self.out / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.out / "stderr").read_text()

    def result(self, rank: int = 0) -> dict:
        return torch.load(self.out / f"rank{rank}.pt", weights_only=True)

    def printed(self, name: str) -> str:
        """What job `name` printed, without what the clock says."""
        lines = self.stdout.partition(f"# {name}\n")[2].partition("\n# ")[0]
        return re.sub(r"  \d+ images/s|  (\d+|less than 1) min left|\ntime: .*", "", lines).strip()


@contextmanager
def child(out: Path, *jobs: dict, processes: int = 1) -> Iterator[Child]:
    """A process of its own group that does `jobs`, or several under torchrun; killed at the end if it still runs."""
    out.mkdir(parents=True)
    (out / "jobs.json").write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # Not pipes: a loader's worker that outlives its killed parent would hold them open.
    with open(out / "stdout", "w") as stdout, open(out / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), str(TESTS / "process_jobs.py"), ".", "jobs.json"],
            cwd=out,
            env=os.environ | ENVIRONMENT,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield Child(process, out)
    finally:
        process.kill() if processes == 1 else process.terminate()  # torchrun then ends its processes
        process.wait(timeout=60)


def done(out: Path, *jobs: dict, processes: int = 1) -> Child:
    """A child that has ended well."""
    with child(out, *jobs, processes=processes) as started:
        started.process.wait(timeout=120)
    assert started.process.returncode == 0, started.stderr
    return started


def job(
    name: str, root: Path, runs: Path, stage: int = 1, constants: dict | None = None, hooks: dict | None = None
) -> dict:
    """A run of two short epochs in `runs`/<name>.

    hooks: what happens in it, by the names in process_jobs.py; "start": the reference run that stage 2 starts from.
    """
    hooks = {"start": "whole"} | (hooks or {})
    both = {"NUM_WORKERS": 0, "EPOCHS": 2, "SAVE_EVERY": 1, "WARMUP_STEPS": 1, "CHECK_IMAGES": False, "AMP": None}
    own = {
        "BATCH_SIZE": 4,
        "IMAGE_SIZE": 76,
        "FACE_CROP": 0.8,
        "FRAMING": "centre",
        "SKIP_KINDS": (),
        "FREEZE_BATCHNORM": False,
    }
    own |= {"HEAD_LR": 1e-2}
    if stage == 2:
        own = {"PERSONS_PER_BATCH": 3, "TEACHER": None, "WIDE_SIZE": 76}
    paths = {"DATA_DIR": root / "Task_B", "RUN_DIR": runs / name}
    if stage == 2:
        paths["STAGE1_CHECKPOINT"] = root / "runs" / hooks["start"] / "best.pt"
    paths = {constant: str(path) for constant, path in paths.items()}
    return {"name": name, "stage": stage, "paths": paths, "constants": both | own | (constants or {})} | hooks


# In two processes BatchNorm's statistics and dropout's masks differ from those of one; five batches of 5, 4, 4, 4, 4
# photos, so that the shares are uneven.
ALIKE = {"BATCH_SIZE": 5, "FREEZE_BATCHNORM": True, "DROPOUT": 0.0}
SHARED = ("shared", "shared accumulating", "shared stage 2")


def shared_jobs(root: Path, runs: Path) -> list[dict]:
    """What one process and two have to do alike."""
    photos = sorted(map(str, (root / "Task_B" / "train").glob("*/clean/*.png")))[:5]
    return [
        job("shared", root, runs, constants=ALIKE),
        job("shared accumulating", root, runs, constants=ALIKE | {"ACCUMULATE": 2}),
        job("shared stage 2", root, runs, stage=2, constants={"FREEZE_BATCHNORM": True}, hooks={"start": "shared"}),
        {"name": "gradient"},
        {"name": "embed", "photos": photos},
        {"name": "frames", "photos": photos},
    ]


# Runs that do not come to their end: (stage, constants, what happens, the reference run that they are to equal). A
# signal goes to all processes of the group, as from a terminal or a cluster.
INTERRUPTED = {
    "killed in mid-epoch": (2, {}, {"kill_at": 4}, "whole stage 2"),
    "killed while writing last.pt": (1, {"EMA_DECAY": 0.9, "NUM_WORKERS": 1}, {"kill_saving": 9}, "whole"),
    "Ctrl-C": (1, {"EMA_DECAY": 0.9, "NUM_WORKERS": 1, "SAVE_EVERY": 0}, {"wait_at": 8}, "whole"),
    "SIGTERM": (2, {"NUM_WORKERS": 1, "SAVE_EVERY": 0}, {"wait_at": 3, "start": "shared"}, "shared stage 2"),
    "SIGTERM to one of two processes": (1, ALIKE | {"SAVE_EVERY": 0}, {"stop_at": [7, 1]}, "shared"),
}


def resume_job(name: str, root: Path) -> dict:
    stage, constants, hooks, _ = INTERRUPTED[name]
    constants = constants | {"RESUME": True, "NUM_WORKERS": 0}
    return job(name, root, root / "interrupted", stage, constants, {"start": hooks.get("start", "whole")})


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds Task_B and all runs."""
    root = tmp_path_factory.mktemp("processes")
    write_task_b(root / "Task_B")
    return root


@pytest.fixture(scope="module")
def one(root) -> Child:
    """The reference: a single process that nothing stops."""
    runs = root / "runs"
    whole = [job("whole", root, runs, constants={"EMA_DECAY": 0.9}), job("whole stage 2", root, runs, stage=2)]
    return done(root / "one", *whole, *shared_jobs(root, runs))


@dataclass
class Ended:
    """An interrupted run: how its process ended, and what it left."""

    status: int
    stdout: str
    stderr: str
    last: dict  # last.pt
    half: int | None  # bytes of a last.pt that was being written


@pytest.fixture(scope="module")
def interrupted(root, one) -> dict[str, Ended]:
    found = {}
    for name, (stage, constants, hooks, _) in INTERRUPTED.items():
        out, run_dir = root / "first" / name, root / "interrupted" / name
        first = job(name, root, root / "interrupted", stage, constants, hooks)
        with child(out, first, processes=2 if "two" in name else 1) as started:
            if "wait_at" in hooks:
                deadline = time.monotonic() + 120
                while not (out / "waiting").exists():
                    assert time.monotonic() < deadline and started.process.poll() is None, started.stderr
                    time.sleep(0.02)
                os.killpg(started.process.pid, signal.SIGINT if name == "Ctrl-C" else signal.SIGTERM)
                time.sleep(0.5)  # for the worker to have it
                (out / "go").touch()
            started.process.wait(timeout=120)
        half = next(run_dir.glob(".last.pt.*.tmp"), None)
        found[name] = Ended(
            status=started.process.returncode,
            stdout=started.stdout,
            stderr=started.stderr,
            last=checkpoint(run_dir),
            half=half.stat().st_size if half else None,
        )
    return found


@pytest.fixture(scope="module")
def resumed(root, interrupted) -> Child:
    """The interrupted runs go on in a single process."""
    return done(root / "again", *(resume_job(name, root) for name in INTERRUPTED if name != "SIGTERM"))


@pytest.fixture(scope="module")
def two(root, interrupted) -> Child:
    """The shared jobs in two processes, runs in which one photo of one process is NaN, and one that goes on."""
    runs = root / "two" / "runs"
    poisoned = [
        job(f"poisoned {rank}", root, runs, constants={"BATCH_SIZE": 5}, hooks={"poison": [4, rank]}) for rank in (0, 1)
    ]
    return done(root / "two", *shared_jobs(root, runs), *poisoned, resume_job("SIGTERM", root), processes=2)


def checkpoint(run_dir: Path) -> dict:
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    for row in saved["history"]:
        for name in CLOCK:
            row.pop(name, None)
    return saved


def steps(run_dir: Path) -> list[dict]:
    with open(run_dir / "steps.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """That two runs ended with the same checkpoint, bit for bit, and logged the same steps."""
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    assert {"model", "optimizer", "scheduler", "history", "best"} <= ours.keys() == theirs.keys()
    assert [name for name in ours if plain(ours[name]) != plain(theirs[name])] == []
    assert [int(row["update"]) for row in steps(run_dir)] == list(range(1, len(steps(whole)) + 1))
    assert steps(run_dir) == steps(whole)


def assert_close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_close_run(run_dir: Path, whole: Path) -> None:
    """That two runs are the same within rounding: every step, every epoch, and the networks at their end."""
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    for part in {"model", "head"} & theirs.keys():
        assert_close(ours[part], theirs[part])
    assert_close(ours["history"], theirs["history"])
    assert len(ours["history"]) == 3
    ours, theirs = (
        [{n: float(text) for n, text in row.items()} for row in steps(folder)] for folder in (run_dir, whole)
    )
    # The steps of a random network amplify rounding, and the norm of its large gradient most of all.
    norms = ([row.pop("gradient_norm") for row in rows] for rows in (ours, theirs))
    torch.testing.assert_close(*norms, rtol=5e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in INTERRUPTED if "killed" in name])
def test_a_killed_run_leaves_its_last_whole_checkpoint(root, interrupted, name):
    ended, (hook, update), *_ = interrupted[name], *INTERRUPTED[name][2].items()
    assert ended.status == -signal.SIGKILL, ended.stderr
    assert ended.last["updates"] == update - 1 and ended.last["batch"] > 0
    assert (ended.half is not None) == (hook == "kill_saving")
    if ended.half:
        assert ended.half < (root / "interrupted" / name / "last.pt").stat().st_size


@pytest.mark.parametrize(
    "name, where",
    [("Ctrl-C", (2, 6)), ("SIGTERM", (1, 2)), ("SIGTERM to one of two processes", (2, 5))],
)
def test_a_stopped_run_finishes_its_step_saves_and_says_where_it_is(root, interrupted, name, where):
    ended, last = interrupted[name], root / "interrupted" / name / "last.pt"
    assert ended.status == 1
    expected = f"stopped after batch {where[0]} of {where[1]} in epoch 2, saved {last}; set RESUME = True to go on"
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr or "two" in name  # torchrun adds its own
    assert "epoch 2/2" not in ended.stdout
    assert (ended.last["epoch"], ended.last["batch"]) == (1, where[0])


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_goes_on_as_if_it_had_never_stopped(root, interrupted, resumed, two, name):
    run_dir, whole = root / "interrupted" / name, root / "runs" / INTERRUPTED[name][3]
    again = two if name == "SIGTERM" else resumed
    printed = f"resumed {run_dir / 'last.pt'} after epoch 1, batch {interrupted[name].last['batch']} of epoch 2"
    assert printed in again.printed(name)
    if "SIGTERM" in name:  # it went on in another number of processes
        assert_close_run(run_dir, whole)
    else:
        assert_same_run(run_dir, whole)


def test_a_resumed_epoch_shows_the_photos_that_are_left(resumed):
    seen = [i for n, epoch, i in resumed.result()["seen"] if (n, epoch) == ("SIGTERM to one of two processes", 2)]
    assert len(seen) == len(set(seen)) == 21 - 9  # the first two batches hold 5 and 4 of the 21 photos


@pytest.mark.parametrize("status, where", [(3, "main"), (0, "main"), (0, "child")])
def test_a_process_ends_though_a_loader_with_workers_still_lives(tmp_path, status, where):
    command = [sys.executable, str(TESTS / "exit_with_workers.py"), str(status), where]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, start_new_session=True)
    try:
        assert process.wait(timeout=60) == status
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_two_spawned_workers_start_once_in_each_stage_and_load_what_one_process_does(root, one):
    runs, stages = root / "spawned", {"whole": 1, "whole stage 2": 2}
    constants = {1: {"EMA_DECAY": 0.9, "NUM_WORKERS": 2}, 2: {"NUM_WORKERS": 2}}
    hooks = {"spawn_from": 4}  # a run of two epochs of stage 2 has four batches; one epoch's validation has fewer
    jobs = [job(name, root, runs, stage, constants[stage], hooks) for name, stage in stages.items()]
    started = done(runs / "child", *jobs).result()["started"]
    assert started == [(name, "spawn") for name in stages for _ in range(2)]
    for name in stages:
        assert_same_run(runs / name, root / "runs" / name)


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_what_one_does(root, two, name):
    assert_close_run(root / "two" / "runs" / name, root / "runs" / name)


@pytest.mark.parametrize("name", SHARED)
def test_both_processes_end_with_the_same_weights(two, name):
    torch.testing.assert_close(two.result(0)["results"][name], two.result(1)["results"][name], rtol=0, atol=0)


def test_two_processes_see_each_photo_once_per_epoch(two):
    for epoch in (1, 2):
        shares = [[i for n, e, i in two.result(rank)["seen"] if (n, e) == ("shared", epoch)] for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == list(range(21))
        assert {len(share) for share in shares} == {10, 11}


def test_only_the_first_of_two_processes_writes(two):
    written = [two.result(rank)["written"] for rank in (0, 1)]
    assert written[1] == []
    names = {"last.pt.tmp", "best.pt.tmp", "steps.csv", "log.csv.tmp", "constants.json.tmp", "curves.png.tmp"}
    for name in SHARED:
        written_in = [file for job_name, file in written[0] if job_name == name]
        files = {re.sub(r"^\.(.+)\.[0-9a-f]{12}\.tmp$", r"\1.tmp", file) for file in written_in}
        assert names <= files and any(file.startswith("events.out") for file in files)


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_print_what_one_does_once(root, one, two, name):
    printed = one.printed(name).replace(str(root / "runs"), str(root / "two" / "runs"))
    assert "epoch 2/2" in printed
    assert two.printed(name) == printed


def test_embeddings_by_two_processes_are_in_the_order_of_the_photos(one, two):
    alone = one.result()["results"]["embed alone"]
    assert [len(part.unique(dim=0)) for part in alone] == [5, 5]  # embeddings and qualities
    for result in (one.result(), two.result(0), two.result(1)):
        torch.testing.assert_close(result["results"]["embed"], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_find_faces_together_and_all_know_them(one, two, rank):
    boxes = one.result()["results"]["frames"]
    assert len({box for _, box in boxes}) == 5  # each photo has one of its own
    assert sorted(two.result(rank)["results"]["frames"]) == sorted(boxes)


@pytest.mark.parametrize("rank", [0, 1])
def test_gradient_through_gathered_rows_of_two_processes_is_that_of_one(one, two, rank):
    ours, theirs = two.result(rank)["results"]["gradient"], one.result()["results"]["gradient"]
    assert theirs["weight"].norm() > 0.1
    assert theirs["labels"].tolist() == [0, 1, 2, 3, 4]
    assert_close(ours, theirs)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_in_one_process_is_skipped_by_both(root, two, rank):
    name = f"poisoned {rank}"
    rows = steps(root / "two" / "runs" / name)
    assert [row["update"] for row in rows if row["skipped"] == "1"] == ["2"]
    assert all(math.isfinite(float(row["loss"])) == (row["skipped"] == "0") for row in rows)
    assert len(rows) == 10
    results = [two.result(other)["results"][name] for other in (0, 1)]
    for parts in results:
        assert all(bool(t.isfinite().all()) for part in parts.values() for t in part.values())
    weights = [{n: t for n, t in parts["model"].items() if "running" not in n} for parts in results]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    torch.testing.assert_close(results[0]["head"], results[1]["head"], rtol=0, atol=0)
    assert two.stderr.count("epoch 1, batch 2: the loss is nan; the step is skipped") == 2  # once in each of two runs
