"""Build Task_B trees of real photos from LFW (Labeled Faces in the Wild), the nearest public data to FACECOM.

    python -m tools.task_b_from_lfw

Reads LFW_DIR, LFW in any version (original, funneled or deep-funneled), and writes three trees and a folder of extra
faces under OUT_DIR:

facecom/  train/ 788 persons, 1,837 photos; val/ 222 other persons, 394 photos: FACECOM's own LFW photos.
          The queries of val/ are distorted copies of its gallery photos.
cross/    train/ as in facecom/; val/ 100 persons that facecom/ lacks, 253 photos. Each one's first photo is the
          gallery, the distorted copies of the 153 others are the queries: here matching photos is not enough.
clean/    val/ the 100 persons of cross/ with the same gallery; the 153 others, undistorted, are the queries.
extra/    3,379 photos of 2,452 persons who are in none of the trees, for EXTRA_FACES of train_stage2.py.

All trees hold <person>/clean/<photo>.jpg and <person>/distortion/<photo>_<kind>.jpg. The queries of clean/ are of kind
"clean". The photos are listed in task_b_photos.txt. The kinds are those of distortions.DISTORTIONS.
"""

import shutil
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from sklearn.datasets import fetch_lfw_people, get_data_home

import checkpoints
import common
from common import UserError, list_names
from folders import CLEAN, DISTORTION
from tools.distort_photos import check_copies, copy_photos, describe_split, new_folder, write_copies

LFW_DIR = None  # folder that holds <Person_Name>/<Person_Name>_0001.jpg; None: scikit-learn downloads LFW (200 MB)
OUT_DIR = Path("Task_B_lfw")  # must not exist yet
SEVERITY = 0.5  # 0 (just visible) .. 1 (heaviest); 0.5 is the average FACECOM file
SEED = 0  # 0, 1, 2, ...
JPEG_QUALITY = 92  # of the distorted photos, 1..95; clean photos are copied byte for byte

EXTRA = "extra"  # folder of OUT_DIR, and its name in the list
PHOTO_LIST = Path(__file__).with_name("task_b_photos.txt")
ARCHIVE_URL = "https://ndownloader.figshare.com/files/5976015"  # lfw-funneled.tgz, the file that scikit-learn fetches


def main() -> None:
    common.resolve_constants(globals())
    check_copies(SEVERITY, SEED, JPEG_QUALITY, OUT_DIR)
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=False)  # before the download
    listed = read_list(PHOTO_LIST)
    lfw = download_lfw() if LFW_DIR is None else Path(LFW_DIR)
    check_complete(lfw, listed)
    with new_folder(OUT_DIR) as root:
        plan = plan_trees(root, lfw, listed)
        copy_photos(plan.copied)
        write_copies(plan.distorted, severity=SEVERITY, seed=SEED, quality=JPEG_QUALITY)
        shutil.copytree(root / "facecom" / "train", root / "cross" / "train")
    for split in sorted(path for path in OUT_DIR.glob("*/*") if path.is_dir()):
        print(describe_split(split))
    print(f"{OUT_DIR / EXTRA}: {len(listed[EXTRA, 'all']):,} photos")
    print(f"set DATA_DIR of the training scripts to {OUT_DIR / 'facecom'}, DATA_DIR of evaluate.py to any of the trees")
    print(f"set EXTRA_FACES of train_stage2.py to {OUT_DIR / EXTRA}: better, but stage 2 takes three times as long")


@dataclass
class Plan:
    """The files to write, except cross/train/, which is a copy of facecom/train/."""

    copied: list[tuple[Path, Path]] = field(default_factory=list)  # (photo, file that gets its bytes)
    distorted: list[tuple[Path, Path, str]] = field(default_factory=list)  # see distort_photos.write_copies


def read_list(path: Path) -> dict[tuple[str, str], list[str]]:
    """(tree, split) -> sorted photo stems, from lines `<tree> <split> <stem>`; # starts a comment line."""
    listed = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            tree, split, stem = line.split()
            listed.setdefault((tree, split), []).append(stem)
    return {key: sorted(stems) for key, stems in listed.items()}


def person_of(stem: str) -> str:
    """'Ann_Lee' of Ann_Lee_0001"""
    return stem.rpartition("_")[0]


def lfw_photo(lfw: Path, stem: str) -> Path:
    return lfw / person_of(stem) / f"{stem}.jpg"


def download_lfw() -> Path:
    """scikit-learn's folder of funneled LFW photos, downloaded first if it is not there.

    Raises UserError if the download fails.
    """
    folder = Path(get_data_home()) / "lfw_home" / "lfw_funneled"
    if not folder.is_dir():
        print(f"{folder}: downloading LFW, about 200 MB")
        try:
            fetch_lfw_people(min_faces_per_person=500)  # one person: the arrays are not used, only the files are
        except (OSError, HTTPException) as error:
            raise UserError(
                f"LFW could not be downloaded ({common.first_line(error)}); fetch lfw-funneled.tgz from {ARCHIVE_URL} "
                "by hand, unpack it, and set LFW_DIR to the unpacked folder lfw_funneled"
            ) from error
    return folder


def check_complete(lfw: Path, listed: dict[tuple[str, str], list[str]]) -> None:
    """Raise UserError if a listed photo is missing, before anything is written."""
    stems = [stem for stems in listed.values() for stem in stems]
    missing = [f"{stem}.jpg" for stem in stems if not lfw_photo(lfw, stem).is_file()]
    if missing:
        raise UserError(
            f"{lfw}: {len(missing)} of {len(stems)} photos are missing ({list_names(missing, most=3)}); expected "
            f"{lfw}/<Person_Name>/<Person_Name>_0001.jpg; set LFW_DIR to a complete copy of LFW, or to None to "
            "download it (delete a half-unpacked folder of scikit-learn's first)"
        )


def plan_trees(root: Path, lfw: Path, listed: dict[tuple[str, str], list[str]]) -> Plan:
    plan = Plan()
    for split in ("train", "val"):
        for stem in listed["facecom", split]:
            photo, folder = lfw_photo(lfw, stem), root / "facecom" / split / person_of(stem)
            plan.copied.append((photo, folder / CLEAN / photo.name))
            plan.distorted.append((photo, folder / DISTORTION, photo.name))
    enrolled = set()
    for stem in listed["cross", "val"]:  # sorted: a person's first photo comes first
        photo, person = lfw_photo(lfw, stem), person_of(stem)
        cross, clean = root / "cross" / "val" / person, root / "clean" / "val" / person
        if person in enrolled:
            plan.distorted.append((photo, cross / DISTORTION, photo.name))
            plan.copied.append((photo, clean / DISTORTION / f"{stem}_clean.jpg"))
        else:
            plan.copied += [(photo, folder / CLEAN / photo.name) for folder in (cross, clean)]
            enrolled.add(person)
    plan.copied += [(lfw_photo(lfw, stem), root / EXTRA / f"{stem}.jpg") for stem in listed[EXTRA, "all"]]
    return plan


if __name__ == "__main__":
    common.run_script(main)
