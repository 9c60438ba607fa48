"""More photos of faces for stage 2, of nobody in particular: found in a folder at any depth, and checked."""

from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from common import UserError, list_names, rank_and_world, warn_once
from datasets import find_unreadable
from distributed import gather_objects
from faces import FaceDetector
from folders import NO_TEXT, equal_files, find_photos, is_text, photos_below, walk
from framing import find_frames
from transforms import FaceCrop, load_image

# Distorted copies are pulled to the teacher's embedding of the photo, so the photo has to show its face well. Where it
# is not framed around its face, the face is searched for where the network looks, in the crop alone.
LEAST_SIDE = 40  # px, of the crop in the photo
SEARCH_SIDE, LEAST_FACE = 160, 40  # px: the crop is resized to the first; a smaller face than the second is none
IN_DATA_DIR = "in train/, val/ or test/ too"


def find_extra_faces(
    root: Path, data_dir: Path, face_crop: float, device: torch.device, framing: str = "centre"
) -> list[Path]:
    """The usable photos below `root`, sorted by folder and name; a printed line counts the others by their reasons.

    Left out are photos that cannot be read, whose crop (`face_crop`, see FaceCrop) is small or shows no face once the
    photo is framed (`framing`, see framing.find_frames), and copies byte for byte of an earlier one or of a photo of
    `data_dir`, with a warning of the latter. Each photo is searched for a face, in about 25 ms on a CPU core; under
    torchrun each process searches its share.
    Raises UserError if `root` is no folder, or if no photo is left.
    """
    if not root.is_dir():
        raise UserError(f"EXTRA_FACES = {root}: no such folder; correct it, or set EXTRA_FACES = None")
    photos = photos_below(root)
    left_out = {path: NO_TEXT for path in photos if not is_text(str(path))}
    left_out |= _copies([path for path in photos if path not in left_out], data_dir)
    left_out |= _unusable([path for path in photos if path not in left_out], face_crop, device, framing)
    used = [path for path in photos if path not in left_out]
    counts = Counter(left_out.values()).most_common()
    listed = ", ".join(f"{count} {reason}" for reason, count in counts)
    line = f"{len(used)} of {len(photos)} photos are used" + (f"; left out: {listed}" if listed else "")
    if not used:
        raise UserError(f"EXTRA_FACES = {root}: {line}; name a folder with photos of faces, or set EXTRA_FACES = None")
    print(f"{root}: {line}")
    return used


def _copies(photos: list[Path], data_dir: Path) -> dict[Path, str]:
    """Of equal files all but the first, and all of them if one lies in `data_dir` -> why they are left out."""
    splits = [data_dir / name for name in ("train", "val", "test")]
    known = {photo for split in splits for folder in walk(split) for photo in find_photos(folder)}
    copies = {path: IN_DATA_DIR for path in photos if path in known}
    for group in equal_files([*known, *(path for path in photos if path not in known)]):
        extra = [path for path in group if path not in known]
        in_data_dir = len(extra) < len(group)
        copies |= dict.fromkeys(extra if in_data_dir else extra[1:], IN_DATA_DIR if in_data_dir else "twice")
    shared = [path.name for path, reason in copies.items() if reason == IN_DATA_DIR]
    if shared:
        warn_once(
            f"EXTRA_FACES: {len(shared)} photos lie in {data_dir} too and are left out ({list_names(shared)}); other "
            "photos of the same persons are not noticed: remove them, or figures on val and test will be too high"
        )
    return copies


def _unusable(photos: list[Path], face_crop: float, device: torch.device, framing: str) -> dict[Path, str]:
    """The photos that show no face well -> why."""
    frames = find_frames(framing, photos, device)
    if frames is None:
        crop, detector = FaceCrop(SEARCH_SIDE, face_crop), FaceDetector(device, min_face=LEAST_FACE)
    rank, world = rank_and_world()
    mine = photos[rank::world]
    found = dict.fromkeys(find_unreadable(mine), "unreadable")
    readable = [path for path in mine if path not in found]
    for path in tqdm(readable, desc="extra faces", unit="photo", leave=False, disable=rank > 0 or len(readable) < 3):
        image = load_image(path) if frames is None else frames(load_image(path))
        if min(image.size) * face_crop < LEAST_SIDE:
            found[path] = f"with a crop of less than {LEAST_SIDE} pixels"
        elif not (detector.find(crop(image)) if frames is None else frames.boxes[path]):
            found[path] = "without a face in the crop"
    return {path: reason for part in gather_objects(found) for path, reason in part.items()}
