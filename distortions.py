"""The kinds of bad image: those of DISTORTIONS, modelled on FACECOM's photos, and those of UNSEEN, for testing only.

A kind is a function (image, severity, generator) -> image: RGB in, RGB of the same size out, the input left as it is.
A new one is a function here and a line in DISTORTIONS, and needs no other change.

Severity 0 is just visible, 0.5 the average FACECOM file, 1 the heaviest. In the formulas x is a pixel in 0..1, s the
severity and side the image's shorter side. Lengths are given for side = 250 and scale with it, so a 2048 x 3072 photo
looks as bad as a 250 x 250 one. The same generator state gives the same pixels; from the same state, a higher severity
only adds to a lower one.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

REFERENCE_SIDE = 250  # px, shorter side of the FACECOM photos on which the lengths below were measured


def blurred(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Lens out of focus: a Gaussian of radius 1.0 + 4.5 s px (FACECOM: 2.5..4.0). Deterministic.

    On a photo of side 60 or less the mildest blur is far below one pixel and changes nothing.
    """
    check(image, severity)
    radius = (1.0 + 4.5 * severity) * min(image.size) / REFERENCE_SIDE
    return image.filter(ImageFilter.GaussianBlur(float(radius)))  # Pillow does not take a numpy float


def foggy(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Fog: (1 - a) x + a haze with a = 0.25 + 0.5 s (FACECOM: a = 0.5).

    The haze is smooth, 0.72..0.88: a random grid of about five cells per side, enlarged.
    """
    check(image, severity)
    share = 0.25 + 0.5 * severity
    columns, rows = scaled(image.size, 5 / min(image.size))
    grid = generator.uniform(0.72, 0.88, (rows, columns)).astype(np.float32)
    haze = np.asarray(Image.fromarray(grid).resize(image.size, Image.Resampling.BICUBIC)).clip(0.72, 0.88)
    return to_image((1 - share) * to_pixels(image) + share * haze[..., None])


def lowlight(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Too little light: (0.5 - 0.4 s) x (FACECOM: 0.3 x). Deterministic."""
    check(image, severity)
    return image.point([round((0.5 - 0.4 * severity) * value) for value in range(256)] * 3)


def noisy(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Salt and pepper: a share 0.02 + 0.10 s of the pixels turns black or white (FACECOM: 0.04..0.10).

    A grain is 1 px up to side = 250 and grows beyond, or shrinking a large photo would average it away.
    """
    check(image, severity)
    share = 0.02 + 0.10 * severity
    columns, rows = scaled(image.size, min(1.0, REFERENCE_SIDE / min(image.size)))
    draw = generator.random((rows, columns), dtype=np.float32)
    grains = np.full((rows, columns), 128, np.uint8)  # 128: no grain
    grains[draw < share / 2] = 0
    grains[draw > 1 - share / 2] = 255
    grains = np.asarray(Image.fromarray(grains).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.array(image)
    pixels[grains == 0] = 0
    pixels[grains == 255] = 255
    return Image.fromarray(pixels)


def rainy(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Rain: x - k (0.21 x + 0.06) with k = 0.4 + 1.2 s, under bright, slightly slanted streaks.

    A share 0.02 k of the pixels seeds a streak of 12 px length and 1 px width. FACECOM: k = 1, 0.79 x - 0.06.
    The rain is drawn at side = 250 and resized, so its streaks keep their size relative to the face.
    """
    check(image, severity)
    strength = 0.4 + 1.2 * severity
    length, slant = 12, 0.25  # px; px sideways per px down
    columns, rows = scaled(image.size, REFERENCE_SIDE / min(image.size))
    brightness = generator.uniform(0.15, 0.6, (rows, columns)).astype(np.float32)  # share of white in a streak
    seeds = np.where(generator.random((rows, columns), dtype=np.float32) < 0.02 * strength, brightness, 0)
    streaks = seeds.copy()
    for step in range(1, length):
        side = round(slant * step)
        np.maximum(streaks[step:, side:], seeds[:-step, : columns - side], out=streaks[step:, side:])
    streaks = np.asarray(Image.fromarray(streaks).resize(image.size, Image.Resampling.BILINEAR))[..., None]
    pixels = to_pixels(image)
    pixels = (pixels - strength * (0.21 * pixels + 0.06)).clip(0, 1)
    return to_image(pixels + streaks * (0.9 - pixels))  # 0.9: rain is nearly white


def resized(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Low resolution: down by f = 2 + 6 s and up again, bilinear (FACECOM: 4..6). Deterministic.

    At another side the factor is 1 + (f - 1) side / 250: above 1 always, so even a tiny photo loses detail.
    """
    check(image, severity)
    factor = 1 + (1 + 6 * severity) * min(image.size) / REFERENCE_SIDE
    width, height = image.size
    small_size = max(1, int(width / factor)), max(1, int(height / factor))
    small = image.resize(small_size, Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.BILINEAR)


def sunny(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Glare: a white disc burnt into the middle of the frame. Deterministic.

    White up to radius (0.15 + 0.30 s) side, then fading to nothing over 0.10 side (FACECOM: 0.30 to 0.40).
    """
    check(image, severity)
    width, height = image.size
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / min(image.size)
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / min(image.size)
    radius = np.hypot(x, y[:, None])
    glare = ((0.15 + 0.30 * severity + 0.10 - radius) / 0.10).clip(0, 1)[..., None]
    pixels = to_pixels(image)
    return to_image(pixels + glare * (1 - pixels))


def motionblur(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A camera that moved: the mean along a line of 9 + 12 s px at an angle of up to 45 degrees from level."""
    check(image, severity)
    steps = max(2, round((9 + 12 * severity) * min(image.size) / REFERENCE_SIDE))
    angle = generator.uniform(-np.pi / 4, np.pi / 4)
    pixels, blurred = np.pad(to_pixels(image), ((steps, steps), (steps, steps), (0, 0)), mode="edge"), 0
    for step in np.arange(steps) - (steps - 1) / 2:
        right, down = round(step * np.cos(angle)), round(step * np.sin(angle))
        blurred = blurred + np.roll(pixels, (down, right), (0, 1))
    return to_image(blurred[steps:-steps, steps:-steps] / steps)


def jpegblocks(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Compression: JPEG of quality 12 - 9 s, its blocks 8 px at side = 250. Deterministic."""
    check(image, severity)
    small = image.resize(scaled(image.size, min(1.0, REFERENCE_SIDE / min(image.size))), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=round(12 - 9 * severity))
    with Image.open(file) as blocks:
        return blocks.convert("RGB").resize(image.size, Image.Resampling.BILINEAR)


def pixelated(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Squares of one colour, 4 + 4 s px wide. Deterministic."""
    check(image, severity)
    side = (4 + 4 * severity) * min(image.size) / REFERENCE_SIDE
    small = image.resize(scaled(image.size, 1 / max(1.0, side)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def colournoise(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A sensor at its limit: Gaussian noise of deviation 0.08 + 0.16 s, independent in each channel."""
    check(image, severity)
    columns, rows = scaled(image.size, min(1.0, REFERENCE_SIDE / min(image.size)))
    noise = generator.normal(0, 0.08 + 0.16 * severity, (rows, columns, 3)).astype(np.float32)
    channels = [Image.fromarray(noise[..., c]).resize(image.size, Image.Resampling.NEAREST) for c in range(3)]
    return to_image(to_pixels(image) + np.stack([np.asarray(channel) for channel in channels], -1))


def gammadark(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Darkness that swallows the shadows: x ^ (2.5 + 2 s). Deterministic."""
    check(image, severity)
    return image.point([round(255 * (value / 255) ** (2.5 + 2 * severity)) for value in range(256)] * 3)


def check(image: Image.Image, severity: float) -> None:
    """Raise ValueError for a severity outside 0..1 (or NaN), or an image that is not RGB."""
    if not 0 <= severity <= 1:  # NaN fails this comparison too
        raise ValueError(f"severity={severity}: expected a number in 0..1, from mildest (0) to heaviest (1)")
    if image.mode != "RGB":
        raise ValueError(f"image of mode {image.mode}: expected RGB; call image.convert('RGB') first")


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """(width, height) times `factor`, in whole pixels, at least 1."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def to_pixels(image: Image.Image) -> np.ndarray:
    """RGB image -> (H, W, 3) float32 in 0..1."""
    return np.asarray(image, np.float32) / 255


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) float in 0..1, clipped there -> RGB image."""
    return Image.fromarray((pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8))


Distortion = Callable[[Image.Image, float, np.random.Generator], Image.Image]
DISTORTIONS: dict[str, Distortion] = {
    "blurred": blurred,
    "foggy": foggy,
    "lowlight": lowlight,
    "noisy": noisy,
    "rainy": rainy,
    "resized": resized,
    "sunny": sunny,
}
# For testing only, see tools/unseen_kinds.py. What DISTORT > 0 draws is not these, but the like (degradations.py).
UNSEEN: dict[str, Distortion] = {
    "motionblur": motionblur,
    "jpegblocks": jpegblocks,
    "pixelated": pixelated,
    "colournoise": colournoise,
    "gammadark": gammadark,
}
