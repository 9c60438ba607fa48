"""Bad photos of any kind, made on the fly for training: families of degradations, chained at random.

A family is a function (image, severity, generator) -> image: RGB in, RGB of the same size out, the input left as it is.
It draws one of several forms, and the form's details, so that no two photos look alike. Severity runs from 0, barely
seen, to 1, heavy. Lengths scale with the shorter side. From the same generator state, a higher severity changes the
photo more. A new family is a function here and a line in FAMILIES.

Sources: degradations of all families, in random order and more than once, carry over to real photos where a fixed one
does not (Real-ESRGAN, Wang et al. 2021, arXiv:2107.10833); robustness carries over only to what resembles something
trained on (Mintun et al. 2021, arXiv:2102.11273), hence the breadth. Fog, snow and their like go back to Hendrycks and
Dietterich 2019, arXiv:1903.12261.
"""

import io
from collections.abc import Callable, Collection

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from common import UserError, derived_seed
from distortions import Distortion, check, scaled, to_image, to_pixels

FILTERS = (
    *(Image.Resampling.NEAREST, Image.Resampling.BOX, Image.Resampling.BILINEAR),
    *(Image.Resampling.HAMMING, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS),
)
BICUBIC = Image.Resampling.BICUBIC
# Of each clean photo in validation: with one each of 136 photos, epoch 2 was ahead of the tenth by a point, by chance.
VALIDATION_COPIES = 4


def between(low: float, high: float, severity: float) -> float:
    """From `low` at severity 0 to `high` at 1 in equal ratios: for what is seen by its logarithm."""
    return float(low * (high / low) ** severity)


# --- blur -------------------------------------------------------------------------------------------------------------


def blur(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Defocus, an anisotropic Gaussian, or motion, see below."""
    check(image, severity)
    form, angle, narrow = generator.integers(3), generator.uniform(0, np.pi), generator.uniform(0.15, 1)
    return motion(image, severity, angle) if form == 2 else out_of_focus(image, severity, form, angle, narrow)


def out_of_focus(image: Image.Image, severity: float, form: int, angle: float, narrow: float) -> Image.Image:
    """Form 0: the mean over a disc of radius 0.3 to 5 % of the side; 1: a Gaussian, deviation 0.3 to 4 % at `angle`.

    narrow: the Gaussian's deviation across the angle, over that along it, 0..1.
    """
    radius = between(0.003, 0.05 if form == 0 else 0.04, severity) * min(image.size)  # px
    shrink = max(1.0, radius / (2 if form == 0 else 1))  # a wide kernel leaves no detail: fewer pixels do
    radius, small = radius / shrink, image.resize(scaled(image.size, 1 / shrink), Image.Resampling.BOX)
    y, x = np.mgrid[-2:3, -2:3]  # Pillow knows kernels of 5 x 5
    if form == 0:
        kernel = (radius + 0.5 - np.hypot(x, y)).clip(0, 1)
    else:
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        kernel = np.exp(-(along**2) / (2 * radius**2) - across**2 / (2 * max(0.3, narrow * radius) ** 2))
    blurred = padded(small, 2).filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist(), kernel.sum()))
    return blurred.crop((2, 2, 2 + small.width, 2 + small.height)).resize(image.size, BICUBIC)


def padded(image: Image.Image, margin: int) -> Image.Image:
    """`image` with a margin, px, of its outermost pixels all around."""
    return Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge"))


def motion(image: Image.Image, severity: float, angle: float) -> Image.Image:
    """The mean along a line of 1 to 18 % of the side at `angle`.

    Halves of the line are averaged, then their halves, and so on: 64 copies in six steps.
    """
    length = between(0.01, 0.18, severity) * min(image.size)  # px
    margin = int(np.ceil(length)) + 1
    moved, ahead = padded(image, margin), np.zeros(2)
    while length >= 1:
        length /= 2
        step = np.round(length * np.array([np.cos(angle), np.sin(angle)]))
        moved, ahead = Image.blend(moved, ImageChops.offset(moved, *step.astype(int).tolist()), 0.5), ahead + step
    left, top = (margin + ahead / 2).astype(int).tolist()
    return moved.crop((left, top, left + image.width, top + image.height))


# --- resolution -------------------------------------------------------------------------------------------------------


def resolution(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Few pixels: down to 70 % of the side, or as little as 6.5 %, and up again, each by any of Pillow's six filters.

    Of a 308 px photo whose face is 130 px wide 6.5 % leave 20 px, and a face of 8. Up by nearest or box gives squares.
    A third of the photos goes down in two steps, by two filters.
    """
    check(image, severity)
    down, halfway, up = (FILTERS[place] for place in generator.integers(len(FILTERS), size=3))
    share, steps = between(0.7, 0.065, severity), generator.random()
    if steps < 1 / 3:
        first = scaled(image.size, share ** (0.3 + steps))
        return image.resize(first, halfway).resize(scaled(image.size, share), down).resize(image.size, up)
    return image.resize(scaled(image.size, share), down).resize(image.size, up)


# --- noise ------------------------------------------------------------------------------------------------------------


def noise(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Gaussian (deviation 0.015 to 0.3), Poisson (0.02 to 0.4 on white) or salt and pepper (0.3 to 25 % of the pixels).

    Grey or in colour; grains of 1 to 2.5 px at a side of 308, sharp or soft. Poisson counts are taken as Gaussian with
    their variance, which is close from ten photons on and ten times as fast.
    """
    check(image, severity)
    form, channels, grain = generator.integers(3), generator.choice([1, 3]), generator.uniform(1, 2.5)
    salt, resampling = generator.uniform(0, 1), generator.choice([Image.Resampling.NEAREST, Image.Resampling.BILINEAR])
    columns, rows = scaled(image.size, min(1.0, 308 / min(image.size)) / grain)
    if form == 2:
        share = between(0.003, 0.25, severity)
        draw = generator.random((rows, columns, channels), dtype=np.float32)
        black_white = np.where(draw < share * salt, 0, np.where(draw < share, 255, 128)).astype(np.uint8)
        layer = enlarged(black_white, image.size, Image.Resampling.NEAREST)
        pixels = np.asarray(image)
        return Image.fromarray(np.where(layer == 128, pixels, layer))
    grains = generator.standard_normal((rows, columns, channels), dtype=np.float32)
    grains = enlarged((grains * 32 + 128).clip(0, 255).astype(np.uint8), image.size, resampling)
    grains = (grains.astype(np.float32) - 128) / 32
    pixels = to_pixels(image)
    if form == 0:
        return to_image(pixels + between(0.015, 0.3, severity) * grains)
    return to_image(pixels + between(0.02, 0.4, severity) * np.sqrt(pixels) * grains)


def enlarged(layer: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    """(h, w, 1 or 3) uint8 -> (height, width, 1 or 3) uint8 of `size` (width, height)."""
    layer = Image.fromarray(layer[..., 0] if layer.shape[2] == 1 else layer)
    layer = np.asarray(layer if layer.size == size else layer.resize(size, Image.Resampling(int(resampling))))
    return layer if layer.ndim == 3 else layer[..., None]


# --- compression ------------------------------------------------------------------------------------------------------


def compression(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """JPEG of quality 70 to 3 with any chroma subsampling, twice on a third of the photos, or WEBP of quality 50 to 0.

    The photo has 0.5 to 1 of its side meanwhile (no less than 32 px), so blocks are of many sizes.
    """
    check(image, severity)
    form, scale, subsampling = generator.random(), generator.uniform(0.5, 1), int(generator.integers(3))
    scale = max(scale * min(1.0, 308 / min(image.size)), min(1.0, 32 / min(image.size)))
    packed = image.resize(scaled(image.size, scale), Image.Resampling.BILINEAR)
    if form < 0.25:
        return reopened(packed, "WEBP", quality=round(50 * (1 - severity)), method=0).resize(image.size, BICUBIC)
    packed = reopened(packed, "JPEG", quality=round(between(70, 3, severity)), subsampling=subsampling)
    if form > 2 / 3:  # the second time its grid of blocks lies elsewhere
        packed = ImageChops.offset(packed, 4)
        packed = reopened(packed, "JPEG", quality=round(between(85, 8, severity)), subsampling=subsampling)
        packed = ImageChops.offset(packed, -4)
    return packed.resize(image.size, BICUBIC)


def reopened(image: Image.Image, form: str, **settings: int) -> Image.Image:
    """The image after it was saved in the format `form` and read again."""
    file = io.BytesIO()
    image.save(file, form, **settings)
    with Image.open(file) as packed:
        return packed.convert("RGB")


# --- exposure ---------------------------------------------------------------------------------------------------------


def exposure(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Light and colour, x a value in 0..1: a gamma, a gain, a contrast, a cast, less colour, or a shadow on one side.

    Gamma x^g, g 1.1 to 4.5 or its inverse; gain 0.92 x to 0.1 x, or 1.08 x to 3.5 x, clipped; contrast 0.9 to 0.15
    around any grey, or 1.1 to 5; gains of the channels apart by up to 1.1 to 6; the shadow takes 0.1 to 0.95.
    """
    check(image, severity)
    form, grey = generator.integers(8), generator.uniform(0.2, 0.8)
    cast, angle, place = generator.uniform(-1, 1, 3), generator.uniform(0, 2 * np.pi), generator.uniform(0.3, 0.7)
    if form == 6:
        return Image.blend(image, image.convert("L").convert("RGB"), 0.2 + 0.8 * severity)
    if form == 7:
        y, x = (np.linspace(-1, 1, 24) * np.sin(angle))[:, None], np.linspace(-1, 1, 24) * np.cos(angle)
        shade = ((x + y + 2 * place) / 1.2).clip(0, 1)
        light = 1 - (0.1 + 0.85 * severity) * (1 - shade)
        light = Image.fromarray((255 * light + 0.5).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
        return ImageChops.multiply(image, light.convert("RGB"))
    x = np.linspace(0, 1, 256)[:, None].repeat(3, 1)
    if form in (0, 1):
        x = x ** (between(1.1, 4.5, severity) if form else 1 / between(1.1, 4.5, severity))
    elif form in (2, 3):
        x = x * (between(1.08, 3.5, severity) if form == 3 else between(0.92, 0.1, severity))
    elif form == 4:
        x = grey + (x - grey) * (between(0.9, 0.15, severity) if cast[0] > 0 else between(1.1, 5, severity))
    else:  # the farthest channels differ by the whole ratio
        x = x * between(1.1, 6, severity) ** ((cast - cast.mean()) / max(1e-6, np.ptp(cast)))
    x = x * (1 + 0.1 * severity * cast)  # such light is seldom white
    return image.point([int(value) for value in (x.T.ravel().clip(0, 1) * 255 + 0.5)])


# --- weather ----------------------------------------------------------------------------------------------------------


def weather(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Fog, rain or snow, see below; rain on half of the photos."""
    check(image, severity)
    return (fog, rain, rain, snow)[generator.integers(4)](image, severity, generator)


def fog(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """(1 - a) x + a h: a haze h of 0.6 to 1, slightly coloured, that covers 0.08 to 0.75 of the light on average.

    a has clouds of two sizes, 2..5 and twice as many per side.
    """
    share, cells, strength = 0.08 + 0.67 * severity, generator.integers(2, 6), generator.uniform(0.3, 0.9)
    haze = generator.uniform(0.6, 0.97) + generator.uniform(-0.05, 0.05, 3)
    clouds = [generator.uniform(-1, 1, (count * cells, count * cells)).astype(np.float32) for count in (1, 2)]
    coarse, fine = (np.asarray(Image.fromarray(cloud).resize((32, 32), BICUBIC)) for cloud in clouds)
    cover = share * (1 + strength * min(1.0, 1.2 - share) * (0.7 * coarse + 0.3 * fine))
    cover = Image.fromarray((cover.clip(0, 0.97) * 255).astype(np.uint8)).resize(image.size, BICUBIC)
    colour = tuple(int(value) for value in haze.clip(0, 1) * 255)
    return Image.composite(Image.new("RGB", image.size, colour), image, cover)


def rain(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """20 to 700 streaks of any slant, 2 to 20 % of the side long and 0.3 to 1.2 % wide, a veil, darkness and blur.

    Drizzle of short streaks is dense, long streaks are fewer.
    """
    side = min(image.size)
    slant, long = generator.uniform(-1.1, 1.1), between(0.02, 0.2, generator.random())
    wide, bright = between(0.003, 0.012, generator.random()), generator.uniform(0.5, 1)
    most = 700 * (0.02 / long) ** 0.5
    places, lengths = generator.random((700, 2)), generator.uniform(0.6, 1.4, 700) * long * side
    lights = (255 * bright * generator.uniform(0.4, 1, 700)).astype(int)
    streaks = Image.new("L", image.size)
    draw, width, (right, down) = ImageDraw.Draw(streaks), max(1, round(wide * side)), (np.sin(slant), np.cos(slant))
    starts = places * (1.3 * image.width, 1.3 * image.height) - (0.15 * image.width, 0.15 * image.height)
    ends = starts + lengths[:, None] * (right, down)
    lines, count = np.concatenate([starts, ends], 1).tolist(), max(1, round(between(20, most, severity)))
    for line, light in zip(lines[:count], lights[:count].tolist(), strict=True):
        draw.line(line, light, width)
    streaks = streaks.filter(ImageFilter.BoxBlur(0.0015 * side))
    image = image.filter(ImageFilter.BoxBlur(float(0.008 * severity * side)))
    wet = image.point([int((1 - 0.3 * severity) * value + 25 * severity) for value in range(256)] * 3)
    return Image.composite(Image.new("RGB", image.size, (225, 228, 232)), wet, streaks)


def snow(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """10 to 260 soft flakes of 0.4 to 3.5 % of the side, most of them small, before a white veil of up to 0.35."""
    side, count = min(image.size), round(between(10, 260, severity))
    places = generator.random((260, 2)) * image.size
    sizes = 0.5 * side * 0.004 * 9 ** (generator.random(260) ** 2)  # radii
    lights = generator.integers(130, 256, 260).tolist()
    drift = generator.uniform(-1, 1, 2) * side * 0.01
    flakes = Image.new("L", image.size)
    draw, boxes = ImageDraw.Draw(flakes), np.concatenate([places - sizes[:, None], places + sizes[:, None]], 1)
    for box, light in zip(boxes[:count].tolist(), lights[:count], strict=True):
        draw.ellipse(box, light)
    flakes = flakes.filter(ImageFilter.BoxBlur(0.003 * side))
    moved = ImageChops.offset(flakes, round(drift[0]), round(drift[1]))
    veil = Image.blend(image, Image.new("RGB", image.size, (225, 228, 235)), 0.35 * severity)
    return Image.composite(Image.new("RGB", image.size, "white"), veil, ImageChops.lighter(flakes, moved))


# --- glare ------------------------------------------------------------------------------------------------------------


def glare(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """Light in the lens, 1 - (1 - x)(1 - g): a disc, a streak or a veil, anywhere in the frame, of any colour.

    The disc's radius is 4 to 32 % of the side with a hard or soft rim, the streak's width 2 to 15 %, the veil's
    deviation 20 to 60 %; the light in the middle is 0.2 to 2, so that heavy glare burns white. Most are white or
    yellowish.
    """
    check(image, severity)
    form, angle, rim = generator.integers(3), generator.uniform(0, np.pi), between(0.02, 0.25, generator.random())
    centre, light = generator.uniform(-0.05, 1.05, 2), between(0.2, 2.0, severity)
    colour = 1 - generator.uniform(0, 0.6, 3) * generator.random() ** 2
    columns, rows = scaled(image.size, 96 / max(image.size))  # smooth enough to be enlarged
    x = ((np.arange(columns) + 0.5) / columns - centre[0]) * image.width / min(image.size)
    y = (((np.arange(rows) + 0.5) / rows - centre[1]) * image.height / min(image.size))[:, None]
    if form == 0:
        radius = between(0.04, 0.32, severity)
        shape = ((radius - np.hypot(x, y)) / rim + 1).clip(0, 1)
    elif form == 1:
        across = x * np.sin(angle) - y * np.cos(angle)
        shape = np.exp(-(across**2) / (2 * between(0.01, 0.075, severity) ** 2))
    else:
        shape = 0.6 * np.exp(-(x**2 + y**2) / (2 * between(0.2, 0.6, severity) ** 2))
    shine = (light * shape[..., None] * colour).clip(0, 1)
    shine = Image.fromarray((255 * shine).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    return ImageChops.screen(image, shine)


# --- occlusion --------------------------------------------------------------------------------------------------------


def occlusion(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
    """A rectangle (6 to 45 % of the side), 1 to 3 bars (1 to 12 %) at any angle, or a blob (8 to 45 %) from an edge.

    Filled with one colour or a texture, with sharp or soft edges: hands, scarves, glasses, fences, other heads.
    """
    check(image, severity)
    side, (width, height) = min(image.size), image.size
    form, angle, bars = generator.integers(3), generator.uniform(0, np.pi), int(generator.integers(1, 4))
    places, edge, ratio = generator.uniform(0, 1, (3, 2)), generator.integers(4), generator.uniform(0.5, 2)
    wobble, soft = generator.uniform(0.6, 1.2, 12), generator.uniform(0, 0.015)
    cells = int(generator.choice([1, 1, 4, 16]))
    fill = generator.integers(0, 256, 3) + generator.integers(-60, 61, (cells, cells, 3)) * (cells > 1)
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    if form == 0:
        extent = between(0.06, 0.45, severity) * side * np.array([ratio, 1 / ratio]) ** 0.5
        corner = places[0] * (image.size - extent * 0.5) - extent * 0.25
        draw.rectangle([*corner.tolist(), *(corner + extent).tolist()], 255)
    elif form == 1:
        thick = max(1, round(between(0.01, 0.12, severity) * side))
        reach = (width + height) * np.array([np.cos(angle), np.sin(angle)])
        for middle in places[:bars] * image.size:
            draw.line([*(middle - reach).tolist(), *(middle + reach).tolist()], 255, thick)
    else:
        along = places[0, 0]
        middle = np.array(((along, 0), (along, 1), (0, along), (1, along))[edge]) * image.size
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        radii = between(0.08, 0.45, severity) * side * wobble[:, None]
        corners = middle + radii * np.stack([np.cos(turns) * ratio**0.5, np.sin(turns) / ratio**0.5], 1)
        draw.polygon([tuple(corner) for corner in corners.tolist()], 255)
    mask = mask.filter(ImageFilter.BoxBlur(soft * side))
    texture = Image.fromarray(fill.clip(0, 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(texture, image, mask)


# --- all of them ------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Distortion] = {
    "blur": blur,
    "resolution": resolution,
    "noise": noise,
    "compression": compression,
    "exposure": exposure,
    "weather": weather,
    "glare": glare,
    "occlusion": occlusion,
}


def families_without(left_out: Collection[str]) -> dict[str, Callable]:
    """FAMILIES but for those of the names WITHOUT_FAMILIES. Raises UserError for a name that no family has."""
    known = isinstance(left_out, (tuple, list, set)) and all(name in FAMILIES for name in left_out)
    if not known:
        raise UserError(
            f"WITHOUT_FAMILIES = {left_out!r}: expected names of families of degradations, as in "
            f'("{next(iter(FAMILIES))}",); there are {", ".join(FAMILIES)}'
        )
    return {name: family for name, family in FAMILIES.items() if name not in left_out}


class RandomDegradation:
    """With `probability` (0..1), 1..`most` different families in random order: PIL image -> RGB PIL image.

    Each number of families is equally likely. For n of them each severity is u^((n + 1) / 2), u uniform in 0..1: alone
    a family may be as heavy as it gets, in a chain mild ones are commoner, for four heavy ones leave no face to learn.
    families: name -> function, such as FAMILIES. side: photos whose shorter side has more pixels are shrunk to it
    first, which saves time: the crop is small. Drawn from torch's generator. Raises UserError if a number is out of
    range.
    """

    def __init__(self, families: dict[str, Distortion], probability: float, most: int, side: int):
        if not 0 <= probability <= 1:
            raise UserError(f"DISTORT = {probability}: expected a probability, 0..1")
        if not 1 <= most <= len(families):
            raise UserError(f"DISTORT_MOST = {most}: expected 1..{len(families)} families on one photo")
        self.families, self.probability, self.most, self.side = dict(families), probability, most, side

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.probability:
            return image
        shrink = self.side / min(image.size)
        if shrink < 1:
            image = image.resize(scaled(image.size, shrink), Image.Resampling.BILINEAR, reducing_gap=2.0)
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        count = generator.integers(1, self.most, endpoint=True)
        for name in generator.permutation(sorted(self.families))[:count]:
            severity = generator.random() ** ((count + 1) / 2)
            image = self.families[name](image, float(severity), generator)
        return image


class FixedDegradation:
    """A RandomDegradation that depends on the photo's name alone, for photos to compare networks on: PIL -> PIL image.

    The photo is one that `load_image` read. copy: a number; each one gives another degraded copy of the photo.
    """

    def __init__(self, degradation: RandomDegradation, copy: int):
        self.degradation, self.copy = degradation, copy

    def __call__(self, image: Image.Image) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derived_seed(self.copy, *image.info["path"].name.encode()))
            return self.degradation(image)


def validation_degradations(left_out: Collection[str], most: int, side: int) -> list[FixedDegradation]:
    """What each clean photo is degraded by in validation, once by each: families left out of training, to see what
    becomes of them without it; or all. most, side: see RandomDegradation."""
    families = {name: FAMILIES[name] for name in left_out} or FAMILIES
    degradation = RandomDegradation(families, 1.0, min(most, len(families)), side)
    return [FixedDegradation(degradation, copy) for copy in range(VALIDATION_COPIES)]
