"""Faces in loose photos: MTCNN finds them (Zhang et al. 2016, arXiv:1604.02878), a square around one is cut out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from facenet_pytorch import MTCNN
from facenet_pytorch.models.utils import detect_face
from PIL import Image

from common import UserError

DETECT_SIDE = 1024  # px: a photo whose longer side is longer is searched in a copy of this size, cut from the original
WHICH = ("largest", "central")  # face of a photo that holds several

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; may reach beyond the image


@dataclass(frozen=True)
class Face:
    """A face's box in its photo, from forehead to chin, and the detector's probability (0..1) that it is one."""

    box: Box
    probability: float

    @property
    def area(self) -> float:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


class FaceDetector:
    """MTCNN of facenet-pytorch on `device`; its weights are part of that package, nothing is downloaded.

    min_face: px, >= 12, side of the smallest face looked for in the image, or in its copy of DETECT_SIDE; the time
    grows with 1 / min_face^2. min_probability: 0..1, of the last of MTCNN's three networks; that one's own threshold is
    0.7, so that less changes nothing.
    Raises ValueError if one is out of range.
    """

    def __init__(self, device: torch.device | str, min_face: int = 20, min_probability: float = 0.9):
        if not min_face >= 12:
            raise UserError(f"MIN_FACE = {min_face}: expected 12 pixels or more; MTCNN sees nothing smaller")
        if not 0 <= min_probability <= 1:
            raise UserError(f"MIN_PROBABILITY = {min_probability}: expected a number in 0..1")
        self.min_face, self.min_probability = min_face, min_probability
        self.mtcnn = MTCNN(keep_all=True, min_face_size=min_face, device=torch.device(device)).eval()
        # A candidate wholly outside the image has no pixels to score: MTCNN then leaves it out of the scores, not out
        # of the list of candidates, and stops with an IndexError.
        detect_face.pad = _pixels_of

    def find(self, image: Image.Image) -> list[Face]:
        """The faces in an upright RGB image, of `min_probability` at least, largest first; [] if there is none."""
        scale = min(1.0, DETECT_SIDE / max(image.size))
        if scale < 1:
            small = [max(1, round(side * scale)) for side in image.size]
            factors = [side / reduced for side, reduced in zip(image.size, small, strict=True)]
            image = image.resize(small, Image.Resampling.BILINEAR)
        else:
            factors = [1.0, 1.0]
        if min(image.size) < self.min_face:
            return []  # no scale at which MTCNN could look: it would stop with an error
        boxes, probabilities = self.mtcnn.detect(image.convert("RGB"))
        if boxes is None:
            return []
        boxes = np.asarray(boxes, float) * (factors * 2)  # (F, 4)
        faces = [
            Face(tuple(box), float(probability))
            for box, probability in zip(boxes.tolist(), probabilities, strict=True)
            if probability >= self.min_probability
        ]
        return sorted(faces, key=lambda face: -face.area)


def _pixels_of(boxes: torch.Tensor, width: int, height: int) -> tuple[np.ndarray, ...]:
    """detect_face.pad with a pixel left of each box: (F, 5) -> top, bottom, left, right, each (F,), counted from 1."""
    left, top, right, bottom = boxes[:, :4].trunc().int().cpu().numpy().T
    left, top = left.clip(1, width), top.clip(1, height)
    return top, bottom.clip(top, height), left, right.clip(left, width)


def choose(faces: Sequence[Face], image_size: tuple[int, int], which: str) -> Face | None:
    """The face of largest area, or the one whose middle is nearest to that of the image; None if there is none.

    A tie goes to the first. image_size: (width, height) in pixels. Raises ValueError for another `which`.
    """
    if which not in WHICH:
        raise UserError(f"WHICH = {which!r}: expected one of {', '.join(map(repr, WHICH))}")
    width, height = image_size

    def off_centre(face: Face) -> float:
        left, top, right, bottom = face.box
        return float(np.hypot((left + right - width) / 2, (top + bottom - height) / 2))

    if which == "largest":
        return max(faces, key=lambda face: face.area, default=None)
    return min(faces, key=off_centre, default=None)


def crop_face(image: Image.Image, box: Box, margin: float, size: int | None = None) -> Image.Image:
    """The square around the middle of `box`, its side (1 + margin) times the box's longer side, to whole pixels.

    Where it reaches beyond the image, the image's outermost pixels are repeated: the face stays in the middle and keeps
    its size, as the network expects it. Nothing is stretched; `size` resizes to size x size pixels, None leaves the
    pixels as they are.
    Raises ValueError if the box or the square is empty.
    """
    left, top, right, bottom = box
    if not (right > left and bottom > top and margin > -1):
        raise UserError(f"box {box} with margin {margin}: nothing to cut")
    side = max(1, round((1 + margin) * max(right - left, bottom - top)))
    first_column, first_row = round((left + right - side) / 2), round((top + bottom - side) / 2)
    columns = np.arange(first_column, first_column + side).clip(0, image.width - 1)
    rows = np.arange(first_row, first_row + side).clip(0, image.height - 1)
    inside = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    pixels = np.asarray(inside)[np.ix_(rows - rows[0], columns - columns[0])]
    crop = Image.fromarray(pixels)
    return crop if size is None else crop.resize((size, size), Image.Resampling.BICUBIC)
