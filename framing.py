"""How the face is framed: by the centre of the photo, or by the face that MTCNN finds in it.

With "detected", each photo is first cut as LFW's photos are: a square around the face, FRAME times as wide as its box.
All that follows is the same as for a photo that comes so framed: FACE_CROP of the square is the face.

Stage 2 with WIDE_WEIGHT sees the face and the whole photo, which must look the same whether a face was found in it or
not. So "inset" does not cut the photo: it pastes the face into the middle, which the frame's network does not see.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from common import UserError, rank_and_world, warn_once
from datasets import Person
from distributed import gather_objects
from faces import Box, FaceDetector, choose
from models import BURNT_SHARE, burnt_share
from transforms import cut_square, eval_transform, load_image

FRAMINGS = ("centre", "detected")  # to choose from
INSET = "inset"  # of checkpoints alone: takes the place of "detected" in stage 2 with WIDE_WEIGHT > 0
# Of LFW's photos, the middle LFW_CROP keeps what MTCNN's box and a margin of 0.06 do. So it does of a square whose side
# is FRAME times the longer side of the box.
LFW_CROP = 0.52
FRAME = 1.06 / LFW_CROP
SEARCH_SIDE = 320  # px: a photo with a longer side than this is searched in a smaller copy
LEAST_FACE = 32  # px in that copy, of the box's longer side: smaller ones are of people in the background, or no faces
MANY = 20  # photos without any face, of which a warning tells
# The largest FACE_CROP with "detected": more of the square is no face. "inset" pastes this share of the square's side,
# which holds a FACE_CROP of 0.52 with its jitter in training: 0.52 * 1.1 + 2 * 0.03 = 0.63.
LARGEST_CROP = 0.65
HIDDEN = 0.75  # share of the side that is hidden from the frame's network: the paste, and the rim of a burnt-out face
LARGE = 1024  # px: "inset" enlarges no photo beyond that, so that a face that fills it makes it no larger than it is
LEAST_INSIDE = 0.8  # share of the box's area that lies in the photo

_found: dict[tuple, Box | None] = {}  # `_version` of a photo -> its face; see find_frames


class Frames:
    """Frames a photo that `load_image` read, by the square around its face: PIL image -> PIL image.

    boxes: path -> left, top, right, bottom as shares of the photo's width and height; None leaves the photo as it is.
    The photo is cut to the square, and beyond its edges it is continued by its mirror image.
    inset: the photo is not cut but scaled until its shorter side is as long as the square's; then the middle of the
    square, LARGEST_CROP of its side, is pasted onto the middle of the photo.
    """

    def __init__(self, boxes: Mapping[Path, Box | None], inset: bool = False):
        self.boxes, self.inset = dict(boxes), inset

    def face(self, image: Image.Image) -> Box | None:
        """The face's box in `image`, in pixels; None where none was found."""
        box = self.boxes[image.info["path"]]
        return box and tuple(share * side for share, side in zip(box, image.size * 2, strict=True))

    def __call__(self, image: Image.Image) -> Image.Image:
        box = self.face(image)
        if box is None:
            return image
        left, top, right, bottom = box
        x, y, side = (left + right) / 2, (top + bottom) / 2, FRAME * max(right - left, bottom - top)
        if self.inset:
            framed = _set_in(cut_square(image, x, y, LARGEST_CROP * side), image, side)
        else:
            framed = cut_square(image, x, y, side)
        framed.info["path"] = image.info["path"]
        return framed


def _set_in(face: Image.Image, image: Image.Image, side: float) -> Image.Image:
    """`image`, scaled until its shorter side has `side` pixels, with `face` in its middle. Where that would enlarge it
    beyond LARGE, both are smaller."""
    shorter = min(image.size)
    allowed = min(side, max(shorter, LARGE))
    width, height = (max(1, round(allowed / shorter * length)) for length in image.size)
    framed = image.resize((width, height), Image.Resampling.BILINEAR)
    if allowed < side:
        face = ImageOps.scale(face, allowed / side, Image.Resampling.BILINEAR)
    framed.paste(face, ((width - face.width) // 2, (height - face.height) // 2))
    return framed


def with_photo(framing: str) -> str:
    """The framing for a network that sees the whole frame, too, in place of one of FRAMINGS."""
    return INSET if framing == "detected" else framing


def hidden_share(face_crop: float) -> float:
    """Of the side of the frame, what its network does not see: see models.Crops.hidden."""
    return max(face_crop, HIDDEN)


def check_framing(framing: str, face_crop: float) -> None:
    """Raises UserError for a word that is not one of FRAMINGS, or for a crop that would not be the face.

    face_crop: see transforms.FaceCrop.
    """
    if framing not in FRAMINGS:
        raise UserError(f"FRAMING = {framing!r}: expected one of {', '.join(map(repr, FRAMINGS))}")
    if framing != "centre" and not face_crop <= LARGEST_CROP:  # NaN is not, either
        raise UserError(
            f"FRAMING = 'detected', FACE_CROP = {face_crop}: photos are cut to {FRAME:.2f} times the face found, "
            f"and {LFW_CROP} of that is the face, {LARGEST_CROP} at most; set FACE_CROP = {LFW_CROP}, or FRAMING = "
            "'centre' for photos of a face alone"
        )


def find_frames(
    framing: str, photos: Sequence[Path], device: torch.device, sources: Mapping[Path, Path] | None = None
) -> Frames | None:
    """Where the faces of `photos` are; None with the framing "centre". A printed line counts photos without a face.

    framing: one of FRAMINGS, or INSET, as a checkpoint states it.
    sources: distorted copy -> clean photo, whose box it takes, as a distortion may hide the face. For training alone.
    A photo is searched once, and a line printed if any was; under torchrun each process searches its share of them.
    """
    if framing == "centre" or not photos:
        return None
    sources = sources or {}
    searched = sorted({sources.get(path, path) for path in photos})
    versions = {path: _version(path) for path in searched}
    new = _find_boxes([path for path in searched if versions[path] not in _found], device)
    _found.update({versions[path]: box for path, box in new.items()})
    found = {path: _found[versions[path]] for path in searched}
    none = sum(box is None for box in found.values())
    if none == len(found) >= MANY:
        warn_once(
            f"FRAMING = 'detected': there is a face in none of {none} photos; if they show a face and nothing else, "
            "set FRAMING = 'centre' and FACE_CROP = 1 in train_stage1.py"
        )
    if new and rank_and_world()[0] == 0:
        print(f"faces: searched for in {len(found)} photos; {none} without a plausible one are cropped at the centre")
    return Frames({path: found[sources.get(path, path)] for path in photos}, inset=framing == INSET)


def _version(path: Path) -> tuple:
    """Identifies a photo as it is now: another one at its path is searched again."""
    try:
        stat = path.stat()
    except OSError:
        return path, None, None
    return path, stat.st_size, stat.st_mtime_ns


def sources_of(persons: Sequence[Person]) -> dict[Path, Path]:
    """Distorted photo -> the clean one that it was made from, where that is known and readable."""
    return {
        copy: source
        for person in persons
        for copy, source in zip(person.distorted, person.sources, strict=True)
        if source is not None and source not in person.unreadable
    }


def _find_boxes(photos: Sequence[Path], device: torch.device) -> dict[Path, Box | None]:
    rank, world = rank_and_world()
    detector, mine, found = FaceDetector(device, min_face=LEAST_FACE), photos[rank::world], {}
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # photos differ in shape
    for path in tqdm(mine, desc="finding faces", unit="photo", leave=False, disable=rank > 0 or len(mine) < 3):
        try:
            found[path] = find_box(load_image(path, least=2 * SEARCH_SIDE), detector)
        except UserError:  # whoever uses the photo will report it
            found[path] = None
    torch.backends.cudnn.benchmark = benchmark
    return {path: box for part in gather_objects(found) for path, box in part.items()}


def find_box(image: Image.Image, detector: FaceDetector) -> Box | None:
    """The plausible face nearest to the middle of an upright RGB photo, as shares of its width and height.

    Plausible: not small (LEAST_FACE), and most of it in the photo (LEAST_INSIDE). None: there is none, or the middle is
    burnt out, so that a face beside it is of somebody else.
    """
    small = image.copy()
    small.thumbnail((SEARCH_SIDE, SEARCH_SIDE), Image.Resampling.BILINEAR)
    width, height = small.size
    middle = eval_transform(SEARCH_SIDE // 2, LFW_CROP)(small)
    if burnt_share(middle) > BURNT_SHARE:
        return None

    def plausible(box: Box) -> bool:
        left, top, right, bottom = box
        inside = (min(right, width) - max(left, 0)) * (min(bottom, height) - max(top, 0))
        large = max(right - left, bottom - top) >= LEAST_FACE
        return large and inside >= LEAST_INSIDE * (right - left) * (bottom - top)

    face = choose([face for face in detector.find(small) if plausible(face.box)], small.size, "central")
    if face is None:
        return None
    left, top, right, bottom = face.box
    return left / width, top / height, right / width, bottom / height
