"""Faces in loose photos: found by MTCNN (Zhang et al. 2016, arXiv:1604.02878), cut out as squares, labelled."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from facenet_pytorch import MTCNN
from facenet_pytorch.models.utils import detect_face
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common import UserError, safe_text
from datasets import find_unreadable
from fonts import font_file
from transforms import load_image

DETECT_SIDE = 1024  # px: a photo with a longer side than this is searched in a smaller copy, and cut from the original
WHICH = ("largest", "central")  # which face of a photo that shows several
NO_FACE, UNREADABLE, UNUSABLE = "no face", "unreadable", "not usable"  # why a photo or a face is not used

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
    """MTCNN of facenet-pytorch on `device`; its weights come with that package, nothing is downloaded.

    min_face: px, >= 12, side of the smallest face searched for, in the image or in its copy of DETECT_SIDE; the time
    grows with 1 / min_face^2. min_probability: 0..1, of the last of MTCNN's three networks, whose own threshold is 0.7:
    a lower value changes nothing.
    Raises UserError if one is out of range.
    """

    def __init__(self, device: torch.device | str, min_face: int = 20, min_probability: float = 0.9):
        if not min_face >= 12:
            raise UserError(f"MIN_FACE = {min_face}: expected 12 pixels or more, the least that MTCNN can detect")
        if not 0 <= min_probability <= 1:
            raise UserError(f"MIN_PROBABILITY = {min_probability}: expected a number in 0..1")
        self.min_face, self.min_probability = min_face, min_probability
        device = torch.device(device)
        if device.type == "mps":  # which lacks operations that MTCNN needs
            device = torch.device("cpu")
        self.mtcnn = MTCNN(keep_all=True, min_face_size=min_face, device=device).eval()
        # A candidate wholly outside the image has no pixels to score: MTCNN drops it from the scores but not from the
        # list of candidates, and stops with an IndexError.
        detect_face.pad = _pixels_of

    def find(self, image: Image.Image) -> list[Face]:
        """The faces of at least `min_probability` in an upright RGB image, largest first."""
        scale = min(1.0, DETECT_SIDE / max(image.size))
        if scale < 1:
            small = [max(1, round(side * scale)) for side in image.size]
            factors = [side / reduced for side, reduced in zip(image.size, small, strict=True)]
            image = image.resize(small, Image.Resampling.BILINEAR)
        else:
            factors = [1.0, 1.0]
        if min(image.size) < self.min_face:
            return []  # MTCNN would have no scale to search at, and stop with an error
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
    """detect_face.pad, but at least one pixel of each box: (F, 5) -> top, bottom, left, right, each (F,), from 1."""
    left, top, right, bottom = boxes[:, :4].trunc().int().cpu().numpy().T
    left, top = left.clip(1, width), top.clip(1, height)
    return top, bottom.clip(top, height), left, right.clip(left, width)


def choose(faces: Sequence[Face], image_size: tuple[int, int], which: str) -> Face | None:
    """The face of the largest area, or the one whose middle is nearest to the image's; None if there is no face.

    A tie goes to the first. image_size: (width, height) in pixels. Raises UserError for another `which`.
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
    """The square around the middle of `box`, its side (1 + margin) times the box's longer side, in whole pixels.

    Where it reaches beyond the image, the outermost pixels are repeated: the face stays in the middle and keeps its
    size, as the network expects it. Nothing is stretched. `size` resizes to size x size pixels; None keeps the pixels.
    Raises UserError if the box or the square is empty.
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


@dataclass(frozen=True)
class Reading:
    """A face in a photo; or, with a `status`, a photo or a face that is not used.

    reason: of the status. box: in pixels of the upright photo, where a face was searched for and found. file: the image
    that the network sees. quality: as the network rates it.
    """

    photo: Path
    status: str | None = None
    reason: str | None = None
    box: Box | None = None
    file: Path | None = None
    quality: float | None = None


def read_faces(
    photos: Sequence[Path],
    folder: Path,
    *,
    detector: FaceDetector | None,
    crop: Callable[[Image.Image], Image.Image],
    margin: float,
    most: int | None = None,
) -> list[Reading]:
    """The faces of each photo, largest first and at most `most` of them, or a reading with NO_FACE or UNREADABLE.

    `crop` is applied to the square of `crop_face`, and the result written to `folder`. Without a detector (None) each
    photo is one face, and is its own file.
    """
    unreadable = find_unreadable(photos)
    readings = []
    quiet = detector is None or len(photos) < 3
    for number, photo in enumerate(tqdm(photos, desc="faces", unit="photo", leave=False, disable=quiet)):
        if photo in unreadable:
            readings.append(Reading(photo, UNREADABLE, reason=unreadable[photo]))
        elif detector is None:
            readings.append(Reading(photo, file=photo))
        else:
            image = load_image(photo)
            found = detector.find(image)[:most]
            for index, face in enumerate(found):
                file = folder / f"{number}_{index}.png"
                crop(crop_face(image, face.box, margin)).save(file)
                readings.append(Reading(photo, box=face.box, file=file))
            if not found:
                readings.append(Reading(photo, NO_FACE))
    return readings


def rate(reading: Reading, quality: float, bound: float) -> Reading:
    """`reading` with its quality; not usable below `bound`."""
    if quality >= bound:
        return replace(reading, quality=quality)
    return replace(reading, quality=quality, status=UNUSABLE, reason=f"quality {quality:.2f}, below {bound:.2f}")


@dataclass(frozen=True)
class Label:
    """A text with its colour, and the box that it belongs to; without a box (None) it stands in the top left corner."""

    text: str
    colour: str
    box: Box | None


def draw_labels(photo: Image.Image, labels: Sequence[Label], side: int) -> Image.Image:
    """`photo`, its longer side resized to `side` px, with the box and the text of each label."""
    scale = side / max(photo.size)
    picture = photo.resize([max(1, round(length * scale)) for length in photo.size], Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    taken: list[Box] = []  # where a text stands already
    for label in labels:
        left, top, right, bottom = (value * scale for value in label.box or (0.0, 0.0, 0.0, 0.0))
        if label.box is not None:
            pen.rectangle((left, top, right, bottom), outline=label.colour, width=max(2, side // 300))
        text = safe_text(label.text)
        font = _font(text, size=max(10, side // 36), width=picture.width)
        wide, high = font.getlength(text) + font.size / 2, 1.4 * font.size
        x = max(0.0, min(left, picture.width - wide))
        for y in (max(0.0, top - high), max(0.0, min(bottom, picture.height - high))):  # above, or below another text
            place = (x, y, x + wide, y + high)
            if not any(_overlap(place, other) for other in taken):
                break
        taken.append(place)
        pen.rectangle(place, fill=label.colour)
        pen.text((x + font.size / 4, y + high / 2), text, fill="white", font=font, anchor="lm")
    return picture


def _font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """A font of `size` px, or of less, down to 10, where `text` would be wider than `width` px."""
    font = ImageFont.truetype(font_file(text), size)  # Pillow's own font has Latin letters only
    return font.font_variant(size=max(10, min(size, int(size * width / (font.getlength(text) + size)))))


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
