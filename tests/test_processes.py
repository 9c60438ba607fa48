"""Runs in real processes: killed, stopped and resumed ones, and two processes that share a run."""

import csv
import json
import math
import multiprocessing
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
from conftest import COLOURS, write_person

TESTS = Path(__file__).parent
SPEEDS = ("images_per_second", "loading", "training", "validation", "saving", "seconds")

# What a child runs: the jobs of a JSON file, one after the other, in one common.run_script.
SCRIPT = '''
import functools, io, json, os, signal, sys, time, types
from pathlib import Path

sys.modules["sklearn.manifold"] = types.SimpleNamespace(TSNE=None)  # a second to import, and no run needs it

import torch
from matplotlib.figure import Figure

import checkpoints, common, datasets, distributed, gallery, plots, train_stage1, train_stage2, training, transforms
from conftest import TinyNet

out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
job, seen, written = {}, [], []
train_stage1.FaceNet = train_stage2.FaceNet = checkpoints.FaceNet = TinyNet
# AdamW makes a whole step of a gradient that is rounding alone, in whatever direction: eps keeps it in its place.
for script in (train_stage1, train_stage2):
    script.AdamW = functools.partial(script.AdamW, eps=1e-1)
defaults = {module: dict(vars(module)) for module in (train_stage1, train_stage2)}

step, get_item, save = training.Run.step, datasets.FaceClassificationDataset.__getitem__, torch.save


def hooked_step(run, loss, values):
    step(run, loss, values)
    if run.updates == job.get("kill_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if run.updates == job.get("wait_at"):
        (out / "waiting").touch()
        while not (out / "go").exists():
            time.sleep(0.01)
    if [run.updates, common.rank_and_world()[0]] == job.get("stop_at"):
        os.kill(os.getpid(), signal.SIGTERM)


def hooked_get_item(dataset, index):
    image, label = get_item(dataset, index)
    seen.append((job["name"], int(dataset._epoch), index))
    count = sum(name == job["name"] for name, _, _ in seen)
    if [count, common.rank_and_world()[0]] == job.get("poison"):
        image = image * float("nan")
    return image, label


def hooked_save(content, file, **options):
    if "kill_saving" in job and content.get("updates") == job["kill_saving"]:
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file, **options)


def note_writing(event, args):
    """Whatever this process changes in a run's folder."""
    if event == "open":
        path, mode, flags = args
        if not (set("wax+") & set(mode or "") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    elif event not in ("os.mkdir", "os.rename", "os.remove"):
        return
    path = Path() if isinstance(args[0], int) else Path(os.fsdecode(args[0]))
    if "runs" in path.parts:
        written.append((job["name"], path.name))


training.Run.step, datasets.FaceClassificationDataset.__getitem__ = hooked_step, hooked_get_item
torch.save = hooked_save
plots.curves = lambda history, steps: Figure()  # drawing takes longer than the run
sys.addaudithook(note_writing)


def mixed_gradient():
    """Gradient of a loss in which each row meets each other, and the rows and labels as gathered."""
    generator = torch.Generator().manual_seed(0)
    rows, layer = torch.randn(5, 3, generator=generator), torch.nn.Linear(3, 2)
    layer.weight.data = torch.randn(2, 3, generator=generator)
    layer.bias.data = torch.randn(2, generator=generator)
    rank, world = common.rank_and_world()
    mine = slice(5 * rank // world, 5 * (rank + 1) // world)
    network = distributed.parallel(layer)
    whole, labels = distributed.gather(network(rows[mine]), torch.arange(5)[mine])
    (torch.tanh(whole @ whole.T) * torch.arange(25.0).view(5, 5)).mean().backward()
    return {"weight": layer.weight.grad, "bias": layer.bias.grad, "rows": whole.detach(), "labels": labels}


def main():
    global job
    device, results = common.pick_device(), {}
    for job in jobs:
        print(f"# {job['name']}", flush=True)
        if job["name"] == "gradient":
            results["gradient"] = mixed_gradient()
        elif job["name"] == "embed":
            torch.manual_seed(0)
            transform = transforms.eval_transform(76, 0.8)
            model = TinyNet()
            photos = [Path(p) for p in job["photos"]]
            found = gallery.embed(model, photos, transform, device, batch_size=2)
            results["embed"] = (found.embeddings, found.quality)
            alone = [transform(transforms.load_image(Path(p))) for p in job["photos"]]
            with torch.no_grad():
                results["embed alone"] = model.eval()(torch.stack(alone), "rated")
        else:
            script = (train_stage1, train_stage2)[job["stage"] - 1]
            vars(script).update(defaults[script])
            paths = {name: Path(value) for name, value in job["paths"].items()}
            vars(script).update(job["constants"] | paths)
            networks, init = [], training.Run.__init__

            def noting(run, *args, **options):
                init(run, *args, **options)
                networks.append(run.learner.networks)

            training.Run.__init__ = noting
            script.main()
            training.Run.__init__ = init
            results[job["name"]] = {name: network.state_dict() for name, network in networks[0].items()}
    rank = common.rank_and_world()[0]
    save({"results": results, "seen": seen, "written": written}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    common.run_script(main)
'''


@dataclass
class Child:
    """A started child: its process, what it prints, and its folder."""

    process: subprocess.Popen
    out: Path

    def end(self) -> "Child":
        self.process.wait(timeout=60)
        return self

    @property
    def stdout(self) -> str:
        return (self.out / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.out / "stderr").read_text()

    def result(self, rank: int = 0) -> dict:
        return torch.load(self.out / f"rank{rank}.pt", weights_only=True)

    def printed(self, name: str) -> str:
        """What job `name` printed, less its speed."""
        lines = self.stdout.partition(f"# {name}\n")[2].partition("\n# ")[0]
        return re.sub(r"  \d+ images/s|\ntime: .*", "", lines).strip()


@contextmanager
def child(out: Path, *jobs: dict, processes: int = 1) -> Iterator[Child]:
    """A process of its own group that does `jobs`, or two under torchrun; killed at the end if it still runs."""
    out.mkdir(parents=True)
    (out / "script.py").write_text(SCRIPT)
    (out / "jobs.json").write_text(json.dumps(jobs))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    settings = {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Not pipes: a loader's worker that outlives its killed parent would hold them open.
    with open(out / "stdout", "w") as stdout, open(out / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), "script.py", ".", "jobs.json"],
            cwd=out,
            env=os.environ | settings | {"TRACEBACK": ""},
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
        started.end()
    assert started.process.returncode == 0, started.stderr
    return started


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Holds Task_B, of 21 train photos (7 of them clean), and the reference runs."""
    root = tmp_path_factory.mktemp("processes")
    for (name, colour), photos in zip(COLOURS.items(), (1, 2, 3, 1), strict=True):
        write_person(root / "Task_B" / "train" / name, colour, photos)
    write_person(root / "Task_B" / "val" / "eve", (200, 40, 200), 2)
    write_person(root / "Task_B" / "val" / "fay", (40, 200, 200), 1)
    return root


def job(name: str, root: Path, runs: Path, stage: int = 1, constants: dict | None = None, **hooks) -> dict:
    """A run of two short epochs in `runs`/<name>; stage 2 starts from the reference run "whole" of stage 1."""
    both = {"NUM_WORKERS": 0, "EPOCHS": 2, "SAVE_EVERY": 1, "WARMUP_STEPS": 1, "CHECK_IMAGES": False}
    own = {"BATCH_SIZE": 4, "IMAGE_SIZE": 76, "FACE_CROP": 0.8, "SKIP_KINDS": (), "FREEZE_BATCHNORM": False}
    own |= {"HEAD_LR": 1e-2}
    if stage == 2:
        own = {"PERSONS_PER_BATCH": 3, "TEACHER": None, "WIDE_SIZE": 76}
    paths = {"DATA_DIR": root / "Task_B", "RUN_DIR": runs / name}
    if stage == 2:
        paths["STAGE1_CHECKPOINT"] = root / "runs" / hooks.pop("start", "whole") / "best.pt"
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
        job("shared stage 2", root, runs, stage=2, constants={"FREEZE_BATCHNORM": True}, start="shared"),
        {"name": "gradient"},
        {"name": "embed", "photos": photos},
    ]


@pytest.fixture(scope="module")
def one(root) -> Child:
    """The reference: a single process that nothing stops."""
    runs = root / "runs"
    whole = [
        job("whole", root, runs, constants={"EMA_DECAY": 0.9}),
        job("whole stage 2", root, runs, stage=2),
    ]
    return done(root / "one", *whole, *shared_jobs(root, runs))


@pytest.fixture(scope="module")
def two(root, one) -> Child:
    """The same shared jobs in two processes, and runs in which one photo of one process is NaN."""
    runs = root / "two" / "runs"
    poisoned = [job(f"poisoned {rank}", root, runs, constants={"BATCH_SIZE": 5}, poison=[4, rank]) for rank in (0, 1)]
    return done(root / "two", *shared_jobs(root, runs), *poisoned, processes=2)


def checkpoint(run_dir: Path) -> dict:
    saved = torch.load(run_dir / "last.pt", weights_only=True)
    for row in saved["history"]:
        for name in SPEEDS:
            row.pop(name, None)
    return saved


def steps(run_dir: Path) -> list[dict]:
    with open(run_dir / "steps.csv", newline="") as file:
        return [{name: text for name, text in row.items() if name not in SPEEDS} for row in csv.DictReader(file)]


def plain(saved):
    """`saved` with its tensors as lists, exactly, so that == compares all of it."""
    if isinstance(saved, torch.Tensor):
        return str(saved.dtype), saved.tolist()
    if isinstance(saved, dict):
        return {name: plain(value) for name, value in saved.items()}
    return [plain(value) for value in saved] if isinstance(saved, (list, tuple)) else saved


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """That two runs ended with the same checkpoint, bit for bit, and tell of the same steps."""
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    assert {"model", "optimizer", "scheduler", "history", "best"} <= ours.keys() == theirs.keys()
    assert [name for name in ours if plain(ours[name]) != plain(theirs[name])] == []
    assert [int(row["update"]) for row in steps(run_dir)] == list(range(1, len(steps(whole)) + 1))
    assert steps(run_dir) == steps(whole)


def numbers(row: dict) -> dict:
    return {name: float(value) for name, value in row.items()}


def assert_close_run(run_dir: Path, whole: Path) -> None:
    """That two runs are the same within rounding: every step, every epoch, and the networks at their end."""
    close = {"rtol": 1e-5, "atol": 1e-5}
    ours, theirs = checkpoint(run_dir), checkpoint(whole)
    for part in {"model", "head"} & theirs.keys():
        torch.testing.assert_close(ours[part], theirs[part], **close)
    torch.testing.assert_close(ours["history"], theirs["history"], **close)
    assert len(ours["history"]) == 3
    ours, theirs = ([numbers(row) for row in steps(folder)] for folder in (run_dir, whole))
    # Of a large gradient of a random network the norm alone rounds by more on some CPUs.
    norms = ([row.pop("gradient_norm") for row in rows] for rows in (ours, theirs))
    torch.testing.assert_close(*norms, rtol=5e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, **close)


# --- killed and stopped -----------------------------------------------------------------------------------------------

KILLED = {
    "in mid-epoch": (1, {"EMA_DECAY": 0.9}, {"kill_at": 9}),
    "in mid-epoch of stage 2": (2, {}, {"kill_at": 4}),
    "while writing last.pt": (1, {"EMA_DECAY": 0.9, "NUM_WORKERS": 1}, {"kill_saving": 9}),
}


@pytest.mark.parametrize("when", KILLED)
def test_a_killed_run_ends_as_if_it_had_never_stopped(root, one, tmp_path, when):
    stage, constants, hook = KILLED[when]
    (update,) = hook.values()
    with child(tmp_path / "first", job("run", root, tmp_path, stage, constants, **hook)) as killed:
        killed.end()
    assert killed.process.returncode == -signal.SIGKILL, killed.stderr
    saved = checkpoint(tmp_path / "run")
    assert saved["updates"] == update - 1 and saved["batch"] > 0
    if "kill_saving" in hook:
        assert 0 < (tmp_path / "run" / "last.pt.tmp").stat().st_size < (tmp_path / "run" / "last.pt").stat().st_size
    constants = constants | {"RESUME": True, "NUM_WORKERS": 0}
    again = done(tmp_path / "again", job("run", root, tmp_path, stage, constants))
    assert f"resumed {tmp_path / 'run' / 'last.pt'} after epoch 1, batch {saved['batch']} of epoch 2" in again.stdout
    assert_same_run(tmp_path / "run", root / "runs" / ("whole" if stage == 1 else "whole stage 2"))


STOPPED = {
    "Ctrl-C": (signal.SIGINT, 1),  # a terminal sends it to all processes of the group
    "SIGTERM": (signal.SIGTERM, 0),
    "SIGTERM, also to the worker": (signal.SIGTERM, 1),  # as a cluster does to a job's processes
}


@pytest.mark.parametrize("how", STOPPED)
def test_a_stopped_run_says_where_and_ends_as_if_it_had_never_stopped(root, one, tmp_path, how):
    number, workers = STOPPED[how]
    constants = {"EMA_DECAY": 0.9, "NUM_WORKERS": workers, "SAVE_EVERY": 0}
    with child(tmp_path / "first", job("run", root, tmp_path, 1, constants, wait_at=8)) as stopped:
        deadline = time.monotonic() + 60
        while not (tmp_path / "first" / "waiting").exists():
            assert time.monotonic() < deadline and stopped.process.poll() is None, stopped.stderr
            time.sleep(0.02)
        os.killpg(stopped.process.pid, number)
        time.sleep(0.5 * workers)  # for the worker to have it
        (tmp_path / "first" / "go").touch()
        stopped.end()
    assert stopped.process.returncode == 1
    last = tmp_path / "run" / "last.pt"
    told = f"stopped after batch 2 of 6 in epoch 2, saved {last}; set RESUME = True to go on from there"
    assert stopped.stderr.splitlines()[-1] == told
    assert "Traceback" not in stopped.stderr
    assert "epoch 2/2" not in stopped.stdout
    constants |= {"RESUME": True, "NUM_WORKERS": 0}
    done(tmp_path / "again", job("run", root, tmp_path, 1, constants))
    assert_same_run(tmp_path / "run", root / "runs" / "whole")


EXIT = """
import multiprocessing, sys
import torch
import training
from samplers import ShuffledBatches


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(1), 0


def main():
    multiprocessing.set_start_method({start_method}, force=True)
    loader = training.train_loader(Data(), ShuffledBatches([0, 0, 1, 1], 2, 0), 1, torch.device("cpu"))
    loader.itself = loader  # a reference cycle: only Python's exit ends it
    for _ in loader:
        {in_the_loop}
    print("done", flush=True)


if __name__ == "__main__":
    if {in_a_child}:
        child = multiprocessing.get_context("spawn").Process(target=main)
        child.start()
        child.join()
        sys.exit(child.exitcode)
    main()
"""


CASES = [("pass", 0, False), ("break", 0, False), ("raise SystemExit(3)", 3, False), ("pass", 0, True)]


@pytest.mark.parametrize(("in_the_loop", "status", "in_a_child"), CASES)
def test_a_process_ends_though_a_loader_with_workers_still_lives(tmp_path, in_the_loop, status, in_a_child):
    script = EXIT.replace("{in_the_loop}", in_the_loop).replace("{in_a_child}", str(in_a_child))
    method = multiprocessing.get_start_method()  # a spawned process would spawn its workers
    (tmp_path / "script.py").write_text(script.replace("{start_method}", repr(method)))
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        assert process.wait(timeout=60) == status
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


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
        files = {file for job_name, file in written[0] if job_name == name}
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
def test_gradient_through_gathered_rows_of_two_processes_is_that_of_one(one, two, rank):
    ours, theirs = two.result(rank)["results"]["gradient"], one.result()["results"]["gradient"]
    assert theirs["weight"].norm() > 0.1
    assert theirs["labels"].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(root, one, tmp_path, stage, first, then):
    """Stopped by a notice to the last of its processes, in the second of two epochs."""
    constants = (ALIKE if stage == 1 else {"FREEZE_BATCHNORM": True}) | {"SAVE_EVERY": 0}
    update, batches = (7, 5) if stage == 1 else (3, 2)
    start = {"start": "shared"} if stage == 2 else {}
    stop = job("run", root, tmp_path, stage, constants, stop_at=[update, first - 1], **start)
    with child(tmp_path / "first", stop, processes=first) as stopped:
        stopped.end()
    last = tmp_path / "run" / "last.pt"
    told = f"stopped after batch {update - batches} of {batches} in epoch 2, saved {last}; set RESUME = True to go on"
    assert stopped.process.returncode != 0
    assert told in stopped.stderr
    assert checkpoint(tmp_path / "run")["updates"] == update
    again = done(
        tmp_path / "again", job("run", root, tmp_path, stage, constants | {"RESUME": True}, **start), processes=then
    )
    assert_close_run(tmp_path / "run", root / "runs" / ("shared" if stage == 1 else "shared stage 2"))
    if stage == 1:
        seen = sorted(i for rank in range(then) for name, epoch, i in again.result(rank)["seen"] if epoch == 2)
        assert len(seen) == len(set(seen)) == 21 - 9  # the first two batches hold 5 and 4 of the 21 photos
