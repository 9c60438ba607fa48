"""From an image file to a tensor: decoding, the face crop, augmentation."""

import contextlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from common import MAX_SIDE, UserError

READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files
Transform = Callable[[Image.Image], Tensor]
# fixed_image_standardization of facenet: (x - 127.5) / 128 on 0..255, here on 0..1.
_TO_TENSOR = (
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=[127.5 / 255] * 3, std=[128 / 255] * 3),
)


def load_image(path: Path) -> Image.Image:
    """`path` as RGB, turned upright by its EXIF orientation; transparency becomes white.

    Raises UserError with the path if the file cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the photo
                    image = ImageOps.exif_transpose(image)
                if image.mode == "I;16":  # 16-bit grayscale: convert() would clip at 255
                    image = image.point(lambda value: value / 256).convert("L")
                if image.has_transparency_data:
                    rgba = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                return image.convert("RGB")
    except READ_ERRORS as error:
        raise UserError(
            f"{path}: cannot be read as an image ({error}); replace or delete it, "
            "or set CHECK_IMAGES = True to leave such files out"
        ) from error


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
                pixels = np.pad(np.asarray(image), ((beyond, beyond), (beyond, beyond), (0, 0)), mode="symmetric")
                image, x, y = Image.fromarray(pixels), x + beyond, y + beyond
                width, height = image.size
        # Rounding may put a corner slightly outside the photo, which Pillow refuses.
        box = (max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height))
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


def eval_transform(image_size: int, face_crop: float) -> Transform:
    """PIL RGB image -> (3, image_size, image_size) float32 in about -1..1: centre crop, resize, standardization."""
    return v2.Compose([FaceCrop(image_size, face_crop), *_TO_TENSOR])


def train_transform(
    image_size: int,
    face_crop: float,
    zoom: float,
    shift: float,
    distort: Callable[[Image.Image], Image.Image] | None = None,
    mirror: bool = True,
) -> Transform:
    """`eval_transform` with random jitter of the crop (see FaceCrop).

    mirror: mirror each image with probability 0.5. distort: applied to the whole photo, such as RandomDistortion.
    """
    before = [distort] if distort else []
    after = [v2.RandomHorizontalFlip()] if mirror else []
    crop = FaceCrop(image_size, face_crop, zoom=zoom, shift=shift)
    return v2.Compose([*before, crop, *after, *_TO_TENSOR])


class RandomDistortion:
    """With `probability` (0..1), 1..`most` distortions in turn, severities uniform in 0..1: PIL image -> PIL image.

    kinds: name -> (image, severity, generator) -> image, as in distortions.DISTORTIONS; drawn without repeats. So the
    network sees mixtures, such as fog in the dark, that no file on disk shows. side: photos whose shorter side has more
    pixels are shrunk to it first, which saves time: distortions scale with the photo, and the crop is small.
    Drawn from torch's generator. Raises UserError if a number is out of range.
    """

    def __init__(self, kinds: dict[str, Callable], probability: float, most: int, side: int):
        if not 0 <= probability <= 1:
            raise UserError(f"DISTORT = {probability}: expected a probability, 0..1")
        if not 1 <= most <= len(kinds):
            raise UserError(f"DISTORT_MOST = {most}: expected 1..{len(kinds)} kinds on one photo")
        self.kinds, self.probability, self.most, self.side = dict(kinds), probability, most, side

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.probability:
            return image
        shrink = self.side / min(image.size)
        if shrink < 1:
            size = tuple(max(1, round(length * shrink)) for length in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        count = generator.integers(1, self.most, endpoint=True)
        for name in generator.permutation(sorted(self.kinds))[:count]:
            image = self.kinds[name](image, float(generator.random()), generator)
        return image
