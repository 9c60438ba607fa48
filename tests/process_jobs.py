"""What the child processes of test_processes.py run: the jobs of a JSON file, one after the other, as one script.

python process_jobs.py OUT JOBS.json
"""

import functools
import io
import json
import multiprocessing
import os
import signal
import sys
import time
import zlib
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tiny_net import TinyNet

import checkpoints
import common
import datasets
import distributed
import embedding
import framing
import loading
import plots
import train_stage1
import train_stage2
import training
import transforms

out, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
job, runs, seen, written, started = {}, [], [], [], []
train_stage1.FaceNet = train_stage2.FaceNet = checkpoints.FaceNet = TinyNet
# AdamW makes a whole step of a gradient that is rounding alone, in whatever direction: eps keeps it in its place.
for script in (train_stage1, train_stage2):
    script.AdamW = functools.partial(script.AdamW, eps=1e-1)
defaults = {module: dict(vars(module)) for module in (train_stage1, train_stage2)}

init, step, save, start = training.Run.__init__, training.Run.step, torch.save, BaseProcess.start
get_item = datasets.FaceClassificationDataset.__getitem__


def hooked_init(run, *args, **options):
    init(run, *args, **options)
    runs.append(run)


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
    name = job.get("name")  # a spawned worker has none
    seen.append((name, int(dataset._epoch), index))
    count = sum(other == name for other, _, _ in seen)
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


def hooked_start(process):
    started.append((job["name"], multiprocessing.get_start_method()))
    start(process)


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


training.Run.__init__, training.Run.step, torch.save = hooked_init, hooked_step, hooked_save
BaseProcess.start = hooked_start
datasets.FaceClassificationDataset.__getitem__ = hooked_get_item
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
            found = embedding.embed(model, photos, transform, device, batch_size=2)
            results["embed"] = (found.embeddings, found.quality)
            alone = [transform(transforms.load_image(Path(p))) for p in job["photos"]]
            with torch.no_grad():
                results["embed alone"] = model.eval().rated(torch.stack(alone))
        elif job["name"] == "frames":
            framing.find_box = lambda image, detector: (0, 0, zlib.crc32(image.tobytes()), 1)
            frames = framing.find_frames("detected", [Path(p) for p in job["photos"]], device)
            results["frames"] = [(path.name, box) for path, box in frames.boxes.items()]
        else:
            if "spawn_from" in job:
                multiprocessing.set_start_method("spawn", force=True)
                loading.FEW_BATCHES["spawn"] = job["spawn_from"]
            script = (train_stage1, train_stage2)[job["stage"] - 1]
            vars(script).update(defaults[script])
            paths = {name: Path(value) for name, value in job["paths"].items()}
            vars(script).update(job["constants"] | paths)
            script.main()
            networks = runs[-1].learner.networks
            results[job["name"]] = {name: network.state_dict() for name, network in networks.items()}
    rank = common.rank_and_world()[0]
    save({"results": results, "seen": seen, "written": written, "started": started}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    common.run_script(main)
