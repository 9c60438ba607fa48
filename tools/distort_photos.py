"""Make a Task_B tree of your own photos: each clean photo gets distorted copies, and persons go to train/ or val/.

    python -m tools.distort_photos

    IN_DIR/<person>/*.jpg  ->  OUT_DIR/train|val/<person>/clean/<photo>.jpg
                               OUT_DIR/train|val/<person>/distortion/<photo>_<kind>.jpg

The kinds are those of distortions.DISTORTIONS, so the copies look like FACECOM's. Clean photos are copied byte for
byte, as are bad photos that a person has in distortion/ already. Photos may also lie in <person>/clean/.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoints
import common
from common import UserError, derived_seed, in_range, list_names, plain_name
from datasets import Person, photos_of, scan_persons, split_holdout
from distortions import DISTORTIONS
from folders import CLEAN, DISTORTION
from transforms import load_image

IN_DIR = Path("photos")  # a folder per person
OUT_DIR = Path("Task_B")  # must not exist yet
VAL_SHARE = 0.2  # of the persons, who go to val/, above 0 and at most 0.5: they are evaluated on, never trained on
SEVERITY = 0.5  # 0 (just visible) .. 1 (heaviest); 0.5 is the average FACECOM file
SEED = 0  # 0, 1, 2, ...: of the copies, and of who goes to val/
JPEG_QUALITY = 92  # of the copies, 1..95

LEAST_PERSONS = 4  # two to tell apart in train/, two in val/
FEW_PERSONS = 40  # in train/, of 50: fewer teach a network these persons, not faces


def main() -> None:
    common.resolve_constants(globals())
    check_constants()
    persons = [person for person in scan_persons(IN_DIR) if person.clean]
    if len(persons) < LEAST_PERSONS:
        raise UserError(
            f"IN_DIR = {IN_DIR}: {len(persons)} persons with clean photos, expected {LEAST_PERSONS} or more: two to "
            "tell apart in train/, and two in val/"
        )
    check_names(persons)
    names = [person.name for person in persons]
    in_val = set(split_holdout(names, max(2, round(VAL_SHARE * len(names))), SEED))
    with new_folder(OUT_DIR) as root:
        folders = {person: root / ("val" if person.name in in_val else "train") / person.name for person in persons}
        copied = [
            (photo, folder / name / photo.name)
            for person, folder in folders.items()
            for name, photos in ((CLEAN, person.clean), (DISTORTION, person.distorted))
            for photo in photos
        ]
        copy_photos(copied)
        jobs = [
            (photo, folder / DISTORTION, f"{person.name}/{photo.name}")
            for person, folder in folders.items()
            for photo in person.clean
        ]
        write_copies(jobs, severity=SEVERITY, seed=SEED, quality=JPEG_QUALITY)
    for split in ("train", "val"):
        print(describe_split(OUT_DIR / split))
    trained_on = len(names) - len(in_val)
    if trained_on < FEW_PERSONS:
        photos = len(photos_of(scan_persons(OUT_DIR / "train", check_images=False)))
        print(
            f"{trained_on} persons are few to train on (see docs/own_photos.md); if you do, set PERSONS_PER_BATCH of "
            f"train_stage2.py to at most {trained_on}, and BATCH_SIZE of train_stage1.py to at most {photos}"
        )
    print(f"set DATA_DIR of train_stage1.py, train_stage2.py and evaluate.py to {OUT_DIR}")


def check_constants() -> None:
    """Raise UserError for a constant out of range, a missing IN_DIR or an OUT_DIR that exists."""
    if not IN_DIR.is_dir():
        raise UserError(f"IN_DIR = {IN_DIR}: no such folder; set it to a folder with a folder of photos per person")
    if not (in_range(VAL_SHARE, float, 0, 0.5) and VAL_SHARE):
        raise UserError(f"VAL_SHARE = {VAL_SHARE!r}: expected a share of the persons, above 0 and at most 0.5")
    check_copies(SEVERITY, SEED, JPEG_QUALITY, OUT_DIR)


def check_copies(severity: object, seed: object, quality: object, out_dir: Path) -> None:
    """Raise UserError for one of these constants out of range, or an OUT_DIR that exists."""
    if not in_range(severity, float, 0, 1):
        raise UserError(f"SEVERITY = {severity!r}: expected a number, 0..1")
    if not in_range(quality, int, 1, 95):
        raise UserError(f"JPEG_QUALITY = {quality!r}: expected a whole number, 1..95")
    if not in_range(seed, int, 0, 2**32):
        raise UserError(f"SEED = {seed!r}: expected a whole number, 0, 1, 2, ...")
    if out_dir.exists():
        raise UserError(f"{out_dir}: already exists; delete it, or give OUT_DIR another name")


def check_names(persons: Sequence[Person]) -> None:
    """Raise UserError where two clean photos of a person differ in their suffix, or folder, alone: so would their
    copies."""
    for person in persons:
        stems = [plain_name(photo.stem).casefold() for photo in person.clean]  # most disks ignore case
        twice = sorted(photo.name for photo, stem in zip(person.clean, stems, strict=True) if stems.count(stem) > 1)
        if twice:
            raise UserError(
                f"{person.clean[0].parent}: the copies of {list_names(twice)} would have the same names; rename one "
                "of them"
            )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` at the end: a killed run leaves no half tree under that name.

    Raises UserError, before anything is written, where none can be.
    """
    checkpoints.check_writable("OUT_DIR", path, folder=False)  # it is renamed into its place
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp", dir=path.parent) as temporary:
        root = Path(temporary) / "tree"
        root.mkdir()
        yield root
        root.rename(path)


def copy_photos(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Copy the first file of each pair, byte for byte, to the second."""
    for photo, target in pairs:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, target)


def write_copies(jobs: Sequence[tuple[Path, Path, str]], *, severity: float, seed: int, quality: int) -> None:
    """Distort photos by every kind of DISTORTIONS.

    jobs: photo, folder for its copies <photo>_<kind>.jpg, and a name that no other photo has. severity: 0..1, see
    distortions.py; quality: of the JPEGs, 1..95. Each copy has a generator of its own, from `seed`, that name and the
    kind's, so neither the order of the photos nor a new kind changes a copy. A file that is there already stays.
    Raises UserError for a photo that cannot be read.
    """

    def distort(job: tuple[Path, Path, str]) -> None:
        photo, folder, name = job
        image = load_image(photo)
        folder.mkdir(parents=True, exist_ok=True)
        for kind, function in DISTORTIONS.items():
            target = folder / f"{photo.stem}_{kind}.jpg"
            if not target.exists():
                generator = np.random.default_rng(derived_seed(seed, *name.encode(), *kind.encode()))
                function(image, severity, generator).save(target, quality=quality)

    with ThreadPoolExecutor() as pool:  # Pillow filters, decodes and encodes outside the GIL
        done = pool.map(distort, jobs)
        list(tqdm(done, total=len(jobs), desc="distorting", unit="photo", leave=False))


def describe_split(split: Path) -> str:
    """'Task_B/val: 12 persons, 30 clean photos, 210 in distortion/'"""
    persons, clean, distorted = (len(list(split.glob(f"*{rest}"))) for rest in ("", "/clean/*", "/distortion/*"))
    return f"{split}: {persons} persons, {clean} clean photos, {distorted} in distortion/"


if __name__ == "__main__":
    common.run_script(main)
