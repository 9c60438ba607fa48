"""Decoding, crop and augmentation, against pixels that can be worked out by hand."""

import math
import struct
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from facenet_pytorch import fixed_image_standardization
from PIL import Image, ImageFile

import transforms
from common import UserError
from datasets import FaceClassificationDataset, FacePairDataset, PhotoList
from framing import Frames
from transforms import (
    FORMATS,
    FaceCrop,
    cut_square,
    eval_transform,
    formats,
    load_image,
    suffixes,
    train_transform,
    why_unreadable,
)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_exif_orientation_6_is_turned_upright(tmp_path):
    image = Image.new("RGB", (64, 32), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))  # stored top left: top right once turned clockwise
    tags = Image.Exif()
    tags[0x112] = 6
    image.save(tmp_path / "a.jpg", exif=tags, quality=95)
    upright = load_image(tmp_path / "a.jpg")
    assert upright.size == (32, 64)
    for place, colour in {(28, 4): (254, 0, 0), (4, 4): (255, 255, 255), (28, 60): (255, 255, 255)}.items():
        assert upright.getpixel(place) == pytest.approx(colour, abs=8)


def palette_image() -> Image.Image:
    """Mode P, pixel (0, 0) of index 1 (10, 200, 30), the rest of index 0 (250, 0, 0)."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([250, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 1)
    return image


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint16))


OTHER_MODES = {  # image, transparent colour for the PNG file, its first pixel as RGB; transparency becomes white
    "L": (Image.new("L", (8, 8), 77), None, (77, 77, 77)),
    "P": (palette_image(), None, (10, 200, 30)),
    "P, opaque pixel": (palette_image(), 0, (10, 200, 30)),
    "P, transparent pixel": (palette_image(), 1, (255, 255, 255)),
    "RGB, transparent colour": (Image.new("RGB", (8, 8), (1, 2, 3)), (1, 2, 3), (255, 255, 255)),
    "RGBA, opaque": (Image.new("RGBA", (8, 8), (100, 50, 0, 255)), None, (100, 50, 0)),
    "RGBA, transparent": (Image.new("RGBA", (8, 8), (100, 50, 0, 0)), None, (255, 255, 255)),
    "RGBA, 20 % black": (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), None, (204, 204, 204)),
    "LA, transparent": (Image.new("LA", (8, 8), (77, 0)), None, (255, 255, 255)),
    "1": (Image.new("1", (8, 8), 1), None, (255, 255, 255)),
    "I;16, grey": (grey16(32768), None, (128, 128, 128)),
    "I;16, black": (grey16(255), None, (0, 0, 0)),
}


@pytest.mark.parametrize("image, transparency, expected", OTHER_MODES.values(), ids=OTHER_MODES)
def test_every_pixel_mode_becomes_rgb_of_the_same_appearance(tmp_path, image, transparency, expected):
    image.save(tmp_path / "a.png", transparency=transparency)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB" and loaded.size == (8, 8)
    assert loaded.getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)  # cyan ink alone
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.mode == "RGB" and loaded.getpixel((8, 8)) == pytest.approx((0, 255, 255), abs=8)


def test_16_bit_greys_of_either_order_of_bytes_are_read_alike(tmp_path):
    for order in "<>":
        Image.fromarray(np.full((8, 8), 32768, f"{order}u2")).save(tmp_path / f"{'be'[order == '<']}.tif")
    assert {load_image(path).getpixel((0, 0)) for path in tmp_path.iterdir()} == {(128, 128, 128)}


def test_pixels_of_32_bits_are_refused_when_checked_and_when_loaded(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tif")
    assert "save it with 8 bits per channel" in why_unreadable(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a.tif: cannot be read .*8 bits per channel"):
        load_image(tmp_path / "a.tif")


def test_a_tall_transparent_photo_is_white_behind_in_every_row(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 3, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(load_image(tmp_path / "a.png"), float) - expected).max() <= 1


# --- large JPEGs ------------------------------------------------------------------------------------------------------


def detailed(width: int, height: int) -> Image.Image:
    """Detail of every size, and noise."""
    generator, pixels = np.random.default_rng(0), np.full((height, width), 128.0)
    for cell, contrast in ((64, 40), (16, 20), (4, 8), (1, 5)):
        cells = generator.standard_normal((height // cell + 1, width // cell + 1)).astype(np.float32)
        pixels += contrast * np.asarray(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    "size, name, least, loaded",
    [
        ((760, 1000), "a.jpg", 190, (190, 250)),
        ((760, 1000), "a.jpg", 191, (380, 500)),
        ((1000, 760), "a.jpg", 380, (500, 380)),
        ((760, 1000), "a.jpg", 381, (760, 1000)),
        ((1600, 2000), "a.jpg", 10, (200, 250)),  # an eighth is the least that a decoder offers
        ((762, 1000), "a.jpg", 190, (381, 500)),  # in a quarter all pixels would be displaced
        ((761, 1000), "a.jpg", 190, (761, 1000)),
        ((250, 250), "a.jpg", 770, (250, 250)),
        ((760, 1000), "a.png", 190, (760, 1000)),
        ((760, 1000), "a.webp", 190, (760, 1000)),
        ((760, 1000), "a.mpo", 190, (190, 250)),
    ],
)
def test_a_jpeg_is_decoded_in_fewer_pixels_but_not_in_fewer_than_are_needed(tmp_path, size, name, least, loaded):
    Image.new("RGB", size, "red").save(tmp_path / name)
    assert load_image(tmp_path / name, least).size == loaded
    assert load_image(tmp_path / name).size == size


@pytest.mark.parametrize("orientation", [1, 6])
def test_the_network_sees_the_same_of_a_large_jpeg_within_a_third_of_a_grey_level(tmp_path, orientation):
    photo, tags, path = detailed(760, 1000), Image.Exif(), tmp_path / "a.jpg"
    tags[0x112] = orientation
    stored = photo.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else photo
    stored.save(path, exif=tags, quality=92)
    transform = eval_transform(76, 1.0)
    image = load_image(path, transform.least)
    assert image.size == (190, 250) and image.info["path"] == path
    difference = 128 * (transform(image) - transform(load_image(path))).abs()
    assert 0 < difference.mean() < 0.3


def test_the_smallest_crop_of_a_face_keeps_enough_pixels_and_a_detected_one_all():
    assert eval_transform(76, 0.5).least == 2.5 * 76 / 0.5
    assert train_transform(76, 0.5, 0.1, 0.03).least == pytest.approx(2.5 * 76 / (0.5 * 0.9))
    frames = Frames({})
    for transform in (eval_transform(76, 0.5, frames), train_transform(76, 0.5, 0.1, 0.03, frames=frames)):
        assert transform.least == math.inf


def test_every_dataset_loads_no_more_pixels_than_its_transform_needs(tmp_path):
    sizes = []
    for person in ("ann", "bob"):
        for name in ("clean/a.jpg", "distortion/a_noisy.jpg"):
            path = tmp_path / person / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (760, 1000), "red").save(path)
    seen = eval_transform(76, 1.0, distort=lambda image: sizes.append(image.size) or image)
    for dataset in (
        FaceClassificationDataset(tmp_path, seen),
        FacePairDataset(tmp_path, seen),
        FacePairDataset(tmp_path, seen, degraded=seen, on_the_fly=1.0),
        PhotoList([path], seen),
    ):
        sizes.clear()
        list(dataset)
        assert set(sizes) == {(190, 250)}


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [suffix for of_format in FORMATS.values() for suffix in of_format])
def test_the_first_frame_of_each_format_is_read(tmp_path, suffix):
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    kind = Image.registered_extensions().get(suffix, "JPEG")
    frames = {"save_all": True, "append_images": [blue]} if kind in ("TIFF", "GIF", "WEBP", "PNG", "MPO") else {}
    red.save(tmp_path / f"a{suffix}", kind, **frames)
    assert load_image(tmp_path / f"a{suffix}").getpixel((8, 8)) == pytest.approx((255, 0, 0), abs=3)
    assert why_unreadable(tmp_path / f"a{suffix}") is None


def test_a_tiff_is_turned_upright_once(tmp_path):
    image, tags = Image.new("RGB", (64, 32)), Image.Exif()
    image.paste("red", (0, 0, 16, 16))
    tags[0x112] = 6
    image.save(tmp_path / "a.tif", exif=tags)
    upright = load_image(tmp_path / "a.tif")
    assert upright.size == (32, 64) and upright.getpixel((28, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "DDS", "ICO", "PCX", "TGA", "JPEG2000"])
def test_a_file_of_another_format_is_opened_by_no_decoder_whatever_its_suffix(tmp_path, kind, monkeypatch):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg", kind)
    monkeypatch.setattr(subprocess, "check_call", lambda command, **settings: pytest.fail(f"{command} was started"))
    expected = "cannot identify image file: none of JPEG, PNG, BMP, WEBP, TIFF, GIF"
    assert why_unreadable(tmp_path / "a.jpg").startswith(expected)
    with pytest.raises(UserError, match=f"a.jpg: cannot be read as an image .{expected}"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("fault", [RuntimeError, IndexError, KeyError, struct.error, NotImplementedError, MemoryError])
def test_whatever_a_decoder_raises_the_photo_is_unreadable(tmp_path, monkeypatch, fault):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)

    def fail(image):
        raise fault("the decoder's reason\nand more")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    reason = why_unreadable(path)
    assert "the decoder's reason" in reason and "\n" not in reason
    with pytest.raises(UserError, match=r"a.png: cannot be read as an image \(.?the decoder's reason"):
        load_image(path)


@pytest.fixture
def fresh_formats():
    """The formats are looked for once a process: forgotten before and after the test."""
    for function in (formats, suffixes):
        function.cache_clear()
    yield
    for function in (formats, suffixes):
        function.cache_clear()


def test_photos_of_iphones_are_read_where_pillow_heif_is_installed(tmp_path, monkeypatch, fresh_formats):
    path = tmp_path / "IMG_1.HEIC"
    Image.new("RGB", (16, 16), "red").save(path, "PPM")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    assert ".heic" not in suffixes() and why_unreadable(path).endswith("; pip install pillow-heif adds HEIF")
    for function in (formats, suffixes):
        function.cache_clear()
    heif = types.ModuleType("pillow_heif")  # registers another decoder under the name that the real one takes
    heif.register_heif_opener = lambda: monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PPM"])
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    assert {".heic", ".heif", ".jpg"} <= suffixes()
    assert why_unreadable(path) is None and load_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_threads_decode_no_more_pixels_at_once_than_the_bound_and_finish(tmp_path, monkeypatch):
    paths = [tmp_path / f"{number}.png" for number in range(30)]
    for number, path in enumerate(paths):
        Image.new("RGB", (100, (20, 40, 300)[number % 3])).save(path)  # a third of them is larger than the bound
    held, most, lock, load = [], [], threading.Lock(), ImageFile.ImageFile.load

    def slow_load(image):
        pixels = image.width * image.height
        with lock:
            held.append(pixels)
            most.append(sum(held))
        time.sleep(0.002)
        loaded = load(image)
        with lock:
            held.remove(pixels)
        return loaded

    monkeypatch.setattr(ImageFile.ImageFile, "load", slow_load)
    monkeypatch.setattr(transforms, "_in_flight", transforms.PixelsInFlight(10_000))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(why_unreadable, paths)) == {None}
    assert max(most) == 30_000  # a large one alone
    assert 6_000 <= max(pixels for pixels in most if pixels < 30_000) <= 10_000  # small ones together


# --- crop and transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, fraction, rows, columns",
    [
        (200, 160, 0.5, slice(40, 120), slice(60, 140)),
        (160, 200, 0.5, slice(60, 140), slice(40, 120)),
        (320, 320, 0.25, slice(120, 200), slice(120, 200)),
    ],
)
def test_the_crop_is_exactly_the_central_square(width, height, fraction, rows, columns):
    pixels = noise(width, height)
    cropped = FaceCrop(80, fraction)(Image.fromarray(pixels))  # 80 pixels of the photo to 80: no blending
    assert np.array_equal(np.asarray(cropped), pixels[rows, columns])


def test_jitter_moves_and_scales_the_crop_within_its_bounds():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))  # a pixel's value is its column
    crop = FaceCrop(100, 0.5, zoom=0.1, shift=0.03)
    torch.manual_seed(0)
    rows = [np.asarray(crop(Image.fromarray(ramp)))[50, :, 0].astype(float) for _ in range(200)]
    centres, sides = [row.mean() + 0.5 for row in rows], [(row[-6] - row[5]) * 100 / 89 for row in rows]
    assert 93 <= min(centres) < 96 and 104 < max(centres) <= 107  # 100 +- 0.03 * 200
    assert 88 <= min(sides) < 94 and 106 < max(sides) <= 112  # 100 +- 10 %


@pytest.mark.parametrize(
    "x, y, side",
    [(10, 8, 6), (2, 8, 10), (18, 8, 10), (10, 2, 10), (10, 14, 10), (10, 8, 34), (-4, -3, 4), (50, 8, 70)],
)
def test_a_square_is_that_of_a_photo_continued_by_its_mirror_image(x, y, side):
    pixels = noise(20, 16)
    plane = np.pad(pixels, ((96, 96), (96, 96), (0, 0)), mode="symmetric")
    left, top = 96 + x - side // 2, 96 + y - side // 2
    square = cut_square(Image.fromarray(pixels), x, y, side)
    assert np.array_equal(np.asarray(square), plane[top : top + side, left : left + side])


def test_jitter_continues_the_photo_beyond_its_edges_by_its_mirror_image():
    ramp = np.zeros((150, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(150)[:, None]  # red: column, green: row
    crop = FaceCrop(100, 1.0, zoom=0.2, shift=0.1)
    torch.manual_seed(0)
    sides, middles, mirrored = [], [], 0
    for _ in range(200):
        pixels = np.asarray(crop(Image.fromarray(ramp))).astype(float)
        across, down = (pixels[50, 45:55, 0], pixels[45:55, 50, 1])
        assert np.ptp(across) == pytest.approx(np.ptp(down), abs=1)  # square, and no edge is drawn into the middle
        sides.append(np.ptp(pixels[50, 30:71, 0]) / 40 * 100)
        middles.append(pixels[50, 50, 1])
        rows = np.diff(pixels[:, 50, 1])
        mirrored += (rows < 0).any()  # row numbers fall beyond the edge
        assert pixels[..., 1].max() <= 149 and (np.abs(rows) <= 2).all()  # nothing but the photo, without a jump
    assert 118 <= min(sides) < 125 and 175 < max(sides) <= 182  # 150 +- 20 %
    assert 60 <= min(middles) < 64 and 86 < max(middles) <= 90  # 75 +- 0.1 * 150
    assert 100 < mirrored < 200


def test_a_crop_fits_into_photos_of_any_size():
    torch.manual_seed(0)
    for width in (1, 2, 7, 33, 101, 255):
        for height in (1, 2, 3, 19, 50, 111):
            image = Image.new("RGB", (width, height), (9, 9, 9))
            for fraction in (0.013, 0.3, 0.52, 0.999, 1.0):
                for crop in (FaceCrop(76, fraction), FaceCrop(76, fraction, zoom=0.3, shift=0.5)):
                    cropped = crop(image)  # Pillow refuses a box that leaves the photo
                    assert cropped.size == (76, 76) and cropped.getextrema() == ((9, 9),) * 3


@pytest.mark.parametrize(
    "size, fraction, zoom, shift, message",
    [
        (160, 0, 0, 0, "FACE_CROP = 0: expected a share"),
        (160, 1.1, 0, 0, "FACE_CROP = 1.1: expected a share"),
        (160, math.nan, 0, 0, "FACE_CROP = nan: expected a share"),
        (75, 0.5, 0, 0, "IMAGE_SIZE = 75: expected at least 76 pixels"),
        (160, 0.5, 1.0, 0, "CROP_ZOOM = 1.0: expected a share"),
        (160, 0.5, 0, -0.1, "CROP_SHIFT = -0.1: expected a share"),
        (160, 0.5, 0, 0.6, "CROP_SHIFT = 0.6: expected a share"),
    ],
)
def test_a_crop_out_of_range_is_refused_by_the_name_of_its_constant(size, fraction, zoom, shift, message):
    with pytest.raises(UserError, match=message):
        FaceCrop(size, fraction, zoom=zoom, shift=shift)


def test_eval_transform_scales_pixels_as_facenet_does():
    pixels = noise(200, 160)
    expected = fixed_image_standardization(torch.tensor(pixels[40:120, 60:140]).permute(2, 0, 1).float())
    image = eval_transform(80, 0.5)(Image.fromarray(pixels))
    assert image.dtype == torch.float32 and image.shape == (3, 80, 80)
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mirror, fewest, most", [(True, 160, 240), (False, 0, 0)])  # 200 +- 4 deviations of 10
def test_train_transform_is_the_eval_transform_plus_jitter_and_mirroring(mirror, fewest, most):
    image = Image.fromarray(noise(90, 90))
    plain = eval_transform(76, 1.0)(image)
    augment = train_transform(76, 1.0, zoom=0.0, shift=0.0, mirror=mirror)
    torch.manual_seed(0)
    draws = [augment(image) for _ in range(400)]
    mirrored = sum(torch.equal(draw, plain.flip(2)) for draw in draws)
    assert mirrored + sum(torch.equal(draw, plain) for draw in draws) == 400
    assert fewest <= mirrored <= most
    jittered = train_transform(76, 0.8, zoom=0.1, shift=0.03, mirror=mirror)
    assert len({round(jittered(image).mean().item(), 5) for _ in range(5)}) == 5


def test_train_transform_distorts_the_whole_photo_before_the_crop():
    sizes = []

    def black(image: Image.Image) -> Image.Image:
        sizes.append(image.size)
        return Image.new("RGB", image.size)

    image = train_transform(76, 0.5, zoom=0, shift=0, distort=black)(Image.new("RGB", (200, 300), "white"))
    assert sizes == [(200, 300)] and image.shape == (3, 76, 76)
    torch.testing.assert_close(image, torch.full_like(image, -127.5 / 128))
