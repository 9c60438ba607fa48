"""The figure that face papers print: verification on LFW's 6,000 pairs, 10-fold accuracy and TAR@FAR.

    python -m tools.lfw_pairs

PAIRS_FILE is LFW's pairs.txt (http://vis-www.cs.umass.edu/lfw/pairs.txt): its first line gives the number of folds and
of pairs of each sort in a fold; then follow, fold by fold, the pairs of one person (name, two photo numbers) and those
of two persons (name, number, name, number). The photos are LFW_DIR/<name>/<name>_0001.jpg.

Accuracy: of each fold by the cosine that does best on the nine others, then their mean and standard error, the protocol
"unrestricted with labelled outside data" (Huang and Learned-Miller 2014). A network that was trained on LFW photos, as
those of this repository's tables are, has seen many of them: state it, or train on other persons.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_curve

import checkpoints
import common
from common import UserError
from embedding import embed
from framing import check_framing, find_frames
from metrics import MIN_ERRORS
from transforms import eval_transform

LFW_DIR = Path("lfw")  # holds <name>/<name>_0001.jpg
PAIRS_FILE = Path("lfw/pairs.txt")
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
PRETRAINED = "vggface2"  # only for None: "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # only for None: pixels, 76..160
FACE_CROP = 0.52  # only for None: centre share of the shorter side that is kept, 0.3..1
FRAMING = "detected"  # only for None: of the face, which is found; "centre": it is at the centre, see framing.py
NUM_WORKERS = "auto"  # processes that load images, 0..; "auto": one per core, at most 16

RATES = (1e-2, 1e-3)  # false accept rates


@dataclass(frozen=True)
class Pairs:
    """first, second: the photos of each pair; same: (N,) bool, whether they show one person; fold: (N,) int."""

    first: list[Path]
    second: list[Path]
    same: np.ndarray
    fold: np.ndarray


def main() -> dict[str, float]:
    """Embed, print and return the figures: accuracy and standard_error (0..1), and TAR@FAR=<rate>."""
    common.resolve_constants(globals())
    device = common.pick_device()
    check_framing(FRAMING, FACE_CROP)
    pairs = read_pairs(PAIRS_FILE, LFW_DIR)
    model, facts = checkpoints.load_model(CHECKPOINT, PRETRAINED, IMAGE_SIZE, FACE_CROP, device, FRAMING)
    photos = sorted({*pairs.first, *pairs.second})
    transform = eval_transform(facts["image_size"], facts["face_crop"], find_frames(facts["framing"], photos, device))
    found = embed(model, photos, transform, device, num_workers=NUM_WORKERS).embeddings
    row = {photo: index for index, photo in enumerate(photos)}
    first, second = (found[torch.tensor([row[p] for p in side])] for side in (pairs.first, pairs.second))
    figures = measure((first * second).sum(1).numpy(), pairs.same, pairs.fold)
    error = 100 * figures["standard_error"]
    print(f"{len(pairs.same)} pairs, {len(photos)} photos: accuracy {100 * figures['accuracy']:.2f} +- {error:.2f} %")
    for name, value in figures.items():
        if name.startswith("TAR"):
            print(f"{name}: {100 * value:.2f} %")
    persons = {photo.parent.name for photo in photos}
    if seen := persons & set(facts.get("persons", ())):
        print(f"{len(seen)} of {len(persons)} persons were trained on: no test of unseen persons")
    return figures


def read_pairs(path: Path, lfw: Path | None) -> Pairs:
    """The pairs of LFW's list. Raises UserError for a line that is none, or a photo that is not there."""
    if lfw is None or not lfw.is_dir():
        raise UserError(f"LFW_DIR = {lfw}: no such folder; set it to the folder that holds LFW's folders of persons")
    if not path.is_file():
        raise UserError(f"PAIRS_FILE = {path}: no such file; fetch pairs.txt of LFW and set PAIRS_FILE to it")
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        folds, each = map(int, lines[0]) if len(lines[0]) == 2 else (1, int(lines[0][0]))
        pairs = [_pair(lfw, line) for line in lines[1:]]
    except (ValueError, IndexError) as error:
        raise UserError(f"PAIRS_FILE = {path}: not in the form of LFW's pairs.txt ({error})") from error
    if len(pairs) != 2 * folds * each:
        raise UserError(f"PAIRS_FILE = {path}: {len(pairs)} pairs, its first line announces {2 * folds * each}")
    if folds < 2:
        raise UserError(f"PAIRS_FILE = {path}: one fold, expected two or more to choose the cosine on the others")
    missing = [photo for first, second, _ in pairs for photo in (first, second) if not photo.is_file()]
    if missing:
        raise UserError(f"LFW_DIR = {lfw}: {len(missing)} photos of the pairs are missing, {missing[0].name} first")
    first, second, same = zip(*pairs, strict=True)
    return Pairs(list(first), list(second), np.array(same), np.arange(len(pairs)) // (2 * each))


def _pair(lfw: Path, line: list[str]) -> tuple[Path, Path, bool]:
    if len(line) not in (3, 4):
        raise ValueError(f"{' '.join(line)!r} is no pair")
    name, other = line[0], line[-2] if len(line) == 4 else line[0]
    first, second = (
        lfw / person / f"{person}_{int(number):04d}.jpg" for person, number in ((name, line[1]), (other, line[-1]))
    )
    return first, second, len(line) == 3


def measure(cosines: np.ndarray, same: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """accuracy, standard_error, and TAR@FAR=<rate> of the RATES that the pairs of two persons can measure.

    cosines, same (bool), fold: (N,). TAR@FAR is of all pairs together: the largest share of the pairs of one person
    that is accepted while at most FAR of the others is.
    """
    folds = np.unique(fold)
    accuracies = []
    for held_out in folds:
        best = best_threshold(cosines[fold != held_out], same[fold != held_out])
        accuracies.append(((cosines >= best) == same)[fold == held_out].mean())
    figures = {"accuracy": float(np.mean(accuracies))}
    figures["standard_error"] = float(np.std(accuracies, ddof=1) / len(folds) ** 0.5)
    far, tar, _ = roc_curve(same, cosines, drop_intermediate=False)
    for rate in RATES:
        if (~same).sum() * rate >= MIN_ERRORS / 10:  # 3,000 such pairs are LFW's; papers state 1e-3 of them
            figures[f"TAR@FAR={rate:g}"] = float(tar[far <= rate].max())
    return figures


def best_threshold(cosines: np.ndarray, same: np.ndarray) -> float:
    """The cosine from which on to answer "same" for the most right answers; of equals the lowest."""
    order = np.argsort(cosines)
    ranked, truth = cosines[order], same[order]
    # Right answers if the pairs from place i on are "same": those of one person there, and the others before.
    right = truth.sum() - np.concatenate([[0], np.cumsum(truth)[:-1]]) + np.concatenate([[0], np.cumsum(~truth)[:-1]])
    first = np.concatenate([[True], ranked[1:] > ranked[:-1]])  # equal cosines get one answer
    return float(ranked[first][right[first].argmax()])


if __name__ == "__main__":
    common.run_script(main)
