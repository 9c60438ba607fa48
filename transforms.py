"""From an image file to a tensor: decoding, the face crop, augmentation."""

import contextlib
import functools
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import v2

from common import MAX_SIDE, UserError, first_line

# Pillow's formats that are opened, whatever a file's suffix says, and the suffixes of files that are taken for photos.
# No others: each decoder is one more that a stranger's file can attack, and that of EPS starts another program.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # MPO, two JPEGs in one file, is opened as its first
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),  # the first frame, as of every format
}
HEIF = (".heic", ".heif", ".hif")  # photos of iPhones, where pillow-heif is installed
# Pixels, along a line, that a large JPEG keeps for each one of the network's when it is decoded to 1/2, 1/4 or 1/8 of
# its size. What reaches the network then differs by less than 0.3 grey levels on average; with 2 it would by 0.36.
KEPT = 2.5
MOST_PIXELS = 10**8  # decoded at once by the threads of a process; a larger photo is decoded alone. 400 MB in RGB
Transform = Callable[[Image.Image], Tensor]
Frame = Callable[[Image.Image], Image.Image]


@functools.cache
def formats() -> dict[str, tuple[str, ...]]:
    """FORMATS, and HEIF where pillow-heif is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener()
    return FORMATS | {"HEIF": HEIF}


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the files that are taken for photos, in lower case."""
    return frozenset(suffix for of_format in formats().values() for suffix in of_format)


class PixelsInFlight:
    """Lets threads decode photos while these have `most` pixels together, a larger one alone: in the order they come,
    so that no large photo waits for ever."""

    def __init__(self, most: int):
        self.most, self._held = most, 0
        self._turn, self._change = threading.Lock(), threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self.most)
        with self._turn, self._change:
            self._change.wait_for(lambda: self._held + pixels <= self.most)
            self._held += pixels
        try:
            yield
        finally:
            with self._change:
                self._held -= pixels
                self._change.notify()


_in_flight = PixelsInFlight(MOST_PIXELS)


@contextlib.contextmanager
def _decoded(path: Path, quick: bool, least: float = math.inf) -> Iterator[Image.Image]:
    """The image in the file `path`. quick: a JPEG at 1/8 of its size, which fails all the same where it is damaged; and
    the pixels are gone at the end, before the next photo's turn. least: see load_image."""
    with Image.open(path, formats=list(formats())) as image, _in_flight.hold(image.width * image.height):
        try:
            if quick:
                image.draft("RGB", (64, 64))
            else:
                _draft(image, least)
            image.load()
            yield image
        finally:
            if quick:
                image.close()


def _draft(image: Image.Image, least: float) -> None:
    """Let a JPEG be decoded in fewer pixels, but its shorter side in `least` or more."""
    width, height = image.size
    for scale in (8, 4, 2):
        # Where it does not divide both sides, the last pixels stand for fewer than the others: all would be displaced.
        if min(width, height) >= scale * least and width % scale == height % scale == 0:
            image.draft(None, (width // scale, height // scale))  # does nothing for other formats
            return


def load_image(path: Path, least: float = math.inf) -> Image.Image:
    """`path` as RGB, turned upright by its EXIF orientation; transparency becomes white. `.info["path"]` is `path`.

    least: pixels of the shorter side that are enough. A large JPEG is then decoded in fewer pixels than it has, but not
    in fewer than these, which is faster; see PhotoTransform.least.
    Raises UserError with the path if the file cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _decoded(path, quick=False, least=least) as image:
                with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the photo
                    ImageOps.exif_transpose(image, in_place=True)
                rgb = _to_rgb(image)
                rgb.info["path"] = path
                return rgb
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; if it was there when the folder was read, put it back, or start again without it"
        ) from error
    except Exception as error:  # damaged bytes raise anything in a decoder: IndexError, struct.error, ...
        raise UserError(f"{path}: cannot be read as an image ({_reason(error)}); replace or delete it") from error


def why_unreadable(path: Path) -> str | None:
    """Why `load_image` cannot read `path`, or None. Faster than that."""
    try:
        with _decoded(path, quick=True) as image:
            _to_rgb(image.crop((0, 0, 1, 1)))
    except Exception as error:  # see load_image
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text repeats the path
        hint = "" if "HEIF" in formats() else "; pip install pillow-heif adds HEIF"
        return f"cannot identify image file: none of {', '.join(formats())}{hint}"
    if isinstance(error, OSError) and error.strerror:  # without the path
        return error.strerror
    return first_line(error)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grayscale: convert() would clip at 255
        deep = image if image.mode == "I;16" else image.convert("I")  # of the other order of bytes
        image = deep.point(lambda value: value / 256).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits in a range of their own; save it with 8 bits per channel")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, 512):  # in strips: copies of the whole of a huge photo fill the memory
        strip = image.crop((0, top, image.width, min(top + 512, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat


def cut_square(image: Image.Image, x: float, y: float, side: float) -> Image.Image:
    """The square of `side` pixels around (x, y), in whole pixels; beyond its edges `image` is mirrored."""
    side = max(1, round(side))
    left, top = round(x - side / 2), round(y - side / 2)
    return _cut(image, left, top, left + side, top + side)


def _cut(image: Image.Image, left: int, top: int, right: int, bottom: int) -> Image.Image:
    """These columns and rows of `image`, which goes on as its mirror image beyond its edges."""
    part = image.crop((left, top, right, bottom))  # black beyond the edges
    before, above = max(0, -left), max(0, -top)
    after, below = max(0, right - image.width), max(0, bottom - image.height)
    if max(before, after) > part.width - before - after or max(above, below) > part.height - above - below:
        columns, rows = _mirrored(left, part.width, image.width), _mirrored(top, part.height, image.height)
        return Image.fromarray(np.asarray(image)[rows[:, None], columns])
    # All that is mirrored lies in the part: its strips are mirrored in place, twenty times as fast.
    flip, end = Image.Transpose.FLIP_LEFT_RIGHT, part.width - after
    if before:
        part.paste(part.crop((before, 0, 2 * before, part.height)).transpose(flip), (0, 0))
    if after:
        part.paste(part.crop((end - after, 0, end, part.height)).transpose(flip), (end, 0))
    flip, end = Image.Transpose.FLIP_TOP_BOTTOM, part.height - below
    if above:
        part.paste(part.crop((0, above, part.width, 2 * above)).transpose(flip), (0, 0))
    if below:
        part.paste(part.crop((0, end - below, part.width, end)).transpose(flip), (0, end))
    return part


def _mirrored(first: int, count: int, length: int) -> np.ndarray:
    """Places `first`, `first` + 1, ... of a line of `length` pixels that goes on as its mirror image on both sides."""
    places = np.arange(first, first + count) % (2 * length)
    return np.minimum(places, 2 * length - 1 - places)


class FaceCrop:
    """Square crop around the centre, resized to `size` x `size`: PIL image -> PIL image.

    fraction: side of the crop as a share (0..1] of the photo's shorter side.
    zoom, shift: random jitter of the side (+-share of it) and of the centre (+-share of the shorter side), 0 = none,
    drawn from torch's generator; beyond the photo's edges it is continued by its mirror image.
    Raises UserError if one of them is out of range.
    """

    def __init__(self, size: int, fraction: float, zoom: float = 0.0, shift: float = 0.0):
        if not 0 < fraction <= 1:
            raise UserError(f"FACE_CROP = {fraction}: expected a share of the shorter side in (0, 1]")
        if size < 76:  # less does not survive InceptionResnetV1's strides of 2
            raise UserError(f"IMAGE_SIZE = {size}: expected at least 76 pixels; the pretrained network knows 160")
        if size > MAX_SIDE:
            raise UserError(f"{size} pixels a side: expected at most {MAX_SIDE}; lower IMAGE_SIZE, or raise FACE_CROP")
        if not 0 <= zoom < 1:
            raise UserError(f"CROP_ZOOM = {zoom}: expected a share in [0, 1), usually about 0.1")
        if not 0 <= shift <= 0.5:
            raise UserError(f"CROP_SHIFT = {shift}: expected a share of the shorter side in [0, 0.5]")
        self.size, self.fraction, self.zoom, self.shift = size, fraction, zoom, shift

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        shorter = min(width, height)
        side, x, y = self.fraction * shorter, width / 2, height / 2
        if self.zoom or self.shift:
            zoom, dx, dy = (2 * torch.rand(3) - 1).tolist()
            side = side * (1 + self.zoom * zoom)
            x, y = x + self.shift * shorter * dx, y + self.shift * shorter * dy
            # Clamped to the photo instead, a crop of nearly all of it could neither move nor grow.
            beyond = math.ceil(max(0, side / 2 - min(x, y, width - x, height - y)))
            if beyond:
                image, x, y = _cut(image, -beyond, -beyond, width + beyond, height + beyond), x + beyond, y + beyond
                width, height = image.size
        # Rounding may put a corner slightly outside the photo, which Pillow refuses.
        box = (max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height))
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB image -> (3, H, W) float32, each value (x - 127.5) / 128: facenet's fixed_image_standardization."""
    pixels = np.asarray(image).transpose(2, 0, 1)
    standardized = np.subtract(pixels, np.float32(127.5), dtype=np.float32, order="C")
    standardized /= 128
    return torch.from_numpy(standardized)


class PhotoTransform(v2.Compose):
    """Steps from a photo to what the network sees of it, the cut of `frames` and `crop` among them.

    least: pixels of a photo's shorter side that are enough, for `load_image`: KEPT in the smallest crop for each one of
    the network's. Where `frames` cuts, all are: its squares are of whole pixels, and those of a smaller photo would
    shift the face, which changes what the network sees by up to two grey levels.
    """

    def __init__(self, steps: Sequence[Callable], crop: FaceCrop, frames: Frame | None):
        super().__init__(steps)
        self.least = math.inf if frames else KEPT * crop.size / (crop.fraction * (1 - crop.zoom))


def eval_crop(image_size: int, face_crop: float, frames: Frame | None = None, distort: Frame | None = None) -> Frame:
    """PIL image -> what the network sees of it, image_size x image_size pixels.

    frames: applied first, see framing.Frames; distort: applied next, to the whole photo or what `frames` leave of it,
    such as a RandomDegradation. None: the photo as it is.
    """
    return v2.Compose([step for step in (frames, distort, FaceCrop(image_size, face_crop)) if step])


def eval_transform(
    image_size: int, face_crop: float, frames: Frame | None = None, distort: Frame | None = None
) -> Transform:
    """PIL RGB image -> (3, image_size, image_size) float32 in about -1..1: `eval_crop` and standardization."""
    seen = eval_crop(image_size, face_crop, frames, distort)
    return PhotoTransform([seen, to_tensor], seen.transforms[-1], frames)


def train_transform(
    image_size: int,
    face_crop: float,
    zoom: float,
    shift: float,
    distort: Frame | None = None,
    mirror: bool = True,
    frames: Frame | None = None,
) -> Transform:
    """`eval_transform` with random jitter of the crop (see FaceCrop).

    mirror: mirror each image with probability 0.5. frames, distort: as in `eval_crop`.
    """
    before = [step for step in (frames, distort) if step]
    after = [v2.RandomHorizontalFlip()] if mirror else []
    crop = FaceCrop(image_size, face_crop, zoom=zoom, shift=shift)
    return PhotoTransform([*before, crop, *after, to_tensor], crop, frames)
