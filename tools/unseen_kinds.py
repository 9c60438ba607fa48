"""Write a tree whose queries are distorted in ways that training has never seen: how a network copes with new kinds.

    python -m tools.unseen_kinds

Reads SOURCE_DIR, a split of a tree as the other scripts read it, and writes OUT_DIR/val/: each person's clean photos
unchanged, and as queries the photos in `distortion/` whose name ends with _SOURCE_KIND, each distorted by every one of
KINDS. With SOURCE_KIND = None the clean photos themselves are distorted. To evaluate on the tree, set DATA_DIR of
evaluate.py to OUT_DIR.
"""

import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoints
import common
from common import UserError, derived_seed
from datasets import kinds_of, scan_persons
from degradations import FAMILIES
from distortions import DISTORTIONS, UNSEEN
from folders import CLEAN, DISTORTION
from transforms import load_image

SOURCE_DIR = Path("Task_B/val")  # one folder per person
SOURCE_KIND = None  # kind of the files in distortion/ that are distorted, such as "clean"; None: clean photos are
OUT_DIR = Path("Task_B_unseen")  # must not exist yet
# Of distortions.UNSEEN, distortions.DISTORTIONS and degradations.FAMILIES; families that training goes without, by its
# WITHOUT_FAMILIES, are unseen too.
KINDS = tuple(UNSEEN)
SEVERITY = 0.5  # 0 (just visible) .. 1 (heaviest)
SEED = 0  # 0, 1, 2, ...


def main() -> None:
    common.resolve_constants(globals())
    if not common.in_range(SEVERITY, float, 0, 1):
        raise UserError(f"SEVERITY = {SEVERITY!r}: expected a number, 0..1")
    known = UNSEEN | DISTORTIONS | FAMILIES
    unknown = [kind for kind in KINDS if kind not in known]
    if unknown or not KINDS or isinstance(KINDS, str):
        raise UserError(f"KINDS = {KINDS!r}: expected a tuple of one or more of {', '.join(known)}")
    if OUT_DIR.exists():
        raise UserError(f"{OUT_DIR}: already exists; delete it, or give OUT_DIR another name")
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=False)
    photos = 0
    for person in tqdm(scan_persons(SOURCE_DIR), desc="distorting", unit="person", leave=False):
        kinds = zip(person.distorted, kinds_of(person), strict=True)
        chosen = [path for path, kind in kinds if kind == SOURCE_KIND]
        folder = OUT_DIR / "val" / person.name
        for name in (CLEAN, DISTORTION):
            (folder / name).mkdir(parents=True)
        for path in person.clean:
            shutil.copyfile(path, folder / CLEAN / path.name)
        for path in person.clean if SOURCE_KIND is None else chosen:
            stem, image = path.stem.removesuffix(f"_{SOURCE_KIND}"), load_image(path)
            for kind in KINDS:
                seed = derived_seed(SEED, *path.name.encode(), *kind.encode())
                distorted = known[kind](image, SEVERITY, np.random.default_rng(seed))
                # PNG: compression adds no distortion of its own.
                distorted.save(folder / DISTORTION / f"{stem}_{kind}.png")
                photos += 1
    if not photos:
        shutil.rmtree(OUT_DIR)
        raise UserError(f"{SOURCE_DIR}: no photo of kind {SOURCE_KIND!r}; correct SOURCE_KIND")
    print(f"{OUT_DIR}: {photos} queries of the kinds {', '.join(KINDS)}; set DATA_DIR of evaluate.py to it")


if __name__ == "__main__":
    common.run_script(main)
