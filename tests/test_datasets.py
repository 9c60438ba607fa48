"""Scanner, image loading, transforms and datasets, on small trees written by each test."""

import io
import math
import shutil
import struct
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from facenet_pytorch import fixed_image_standardization
from PIL import Image
from torch.utils.data import DataLoader

from common import UserError
from datasets import (
    FaceClassificationDataset,
    FaceClassificationDatasetWithMapping,
    FaceCleanValDataset,
    FacePairDataset,
    distortion_kind,
    find_unreadable,
    scan_persons,
    source_photo,
    split_holdout,
    warn_shared_persons,
)
from distortions import DISTORTIONS
from transforms import FaceCrop, RandomDistortion, eval_transform, load_image, train_transform


def write(path: Path, colour=(90, 90, 90), size=(8, 8)) -> Path:
    """A photo of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)
    return path


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(suffix: str) -> bytes:
    """A sound 64 x 64 file of noise."""
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, {".jpg": "JPEG", ".png": "PNG"}[suffix])
    return buffer.getvalue()


def first_pixel(image: Image.Image) -> torch.Tensor:
    """Tells which photo of `numbered_tree` an image is."""
    return torch.tensor(image.getpixel((0, 0)))


def jittered_pixel(image: Image.Image) -> torch.Tensor:
    """Stands for a random augmentation: what it drew, and which photo."""
    return torch.cat([torch.rand(2), first_pixel(image).float()])


PERSONS = {"ann": (1, 2), "bob": (2, 2), "cy": (3, 6), "dee": (1, 1)}  # clean and distorted photos of each


def numbered_tree(root: Path, persons=PERSONS) -> Path:
    """Person p's photo k has colour (p, k, 0) if clean, (p, k, 1) if distorted."""
    for p, (name, (clean, distorted)) in enumerate(persons.items()):
        (root / name).mkdir(parents=True)
        for k in range(clean):
            write(root / name / "clean" / f"{name}_{k}.png", (p, k, 0))
        for k in range(distorted):
            write(root / name / "distortion" / f"{name}_{k}_foggy.png", (p, k, 1))
    return root


@pytest.fixture
def tree(tmp_path) -> Path:
    return numbered_tree(tmp_path / "train")


# --- scanner ----------------------------------------------------------------------------------------------------------


def test_photos_in_the_person_folder_and_in_clean_give_the_same_dataset(tmp_path):
    for name in ("bob", "ann"):
        for number in (1, 2):
            write(tmp_path / "flat" / name / f"{number}.png")
            write(tmp_path / "nested" / name / "clean" / f"{number}.png")
        for root in ("flat", "nested"):
            write(tmp_path / root / name / "distortion" / "1_rainy.png")
    flat, nested = (FaceClassificationDataset(tmp_path / root, first_pixel) for root in ("flat", "nested"))
    assert flat.persons == nested.persons == ["ann", "bob"]
    assert [label for _, label in flat.samples] == [label for _, label in nested.samples] == [0, 0, 0, 1, 1, 1]
    assert [path.name for path, _ in flat.samples] == [path.name for path, _ in nested.samples]
    for root in ("flat", "nested"):
        assert [(len(p.clean), len(p.distorted)) for p in scan_persons(tmp_path / root)] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".bmp", ".webp", ".JPG", ".Jpeg", ".PNG", ".BMP", ".WebP"])
def test_each_image_suffix_counts_in_any_case(tmp_path, suffix):
    photo = write(tmp_path / "ann" / "clean" / f"a{suffix}")
    assert scan_persons(tmp_path)[0].clean == (photo,)


def test_hidden_and_foreign_files_and_hidden_folders_are_passed_over(tmp_path, caplog):
    photo = write(tmp_path / "ann" / "clean" / "a.png")
    write(tmp_path / "ann" / "clean" / ".hidden.png")
    (tmp_path / "ann" / "clean" / "notes.txt").write_text("blurred copies follow")
    (tmp_path / "ann" / "clean" / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "ann" / "clean" / "folder.png").mkdir()
    write(tmp_path / ".thumbnails" / "clean" / "b.png")
    write(tmp_path / "loose_in_root.png")
    persons = scan_persons(tmp_path)
    assert [(p.name, p.clean, p.distorted) for p in persons] == [("ann", (photo,), ())]
    assert caplog.messages == []


def test_persons_and_photos_come_sorted_by_name(tmp_path):
    for name in ("cy", "Zoe", "ann", "bob_10", "bob_2"):
        for number in (2, 10, 1):
            write(tmp_path / name / "clean" / f"{number}.png")
    persons = scan_persons(tmp_path)
    assert [p.name for p in persons] == ["Zoe", "ann", "bob_10", "bob_2", "cy"]
    assert all([path.name for path in p.clean] == ["1.png", "10.png", "2.png"] for p in persons)
    assert scan_persons(tmp_path) == persons


def test_photos_beside_a_clean_folder_are_ignored_and_told(tmp_path, caplog):
    photo = write(tmp_path / "ann" / "clean" / "a.png")
    write(tmp_path / "ann" / "b.png")
    assert scan_persons(tmp_path)[0].clean == (photo,)
    assert len(caplog.messages) == 1
    for part in (str(tmp_path), "1 persons", "beside their clean/", "ignored", "(ann)"):
        assert part in caplog.messages[0]


def test_an_empty_clean_folder_leaves_the_photos_beside_it(tmp_path):
    photo = write(tmp_path / "ann" / "a.png")
    (tmp_path / "ann" / "clean").mkdir()
    assert scan_persons(tmp_path)[0].clean == (photo,)


def test_a_folder_without_a_photo_is_told_and_left_out(tmp_path, caplog):
    write(tmp_path / "ann" / "a.png")
    (tmp_path / "bob").mkdir()
    assert [p.name for p in scan_persons(tmp_path)] == ["ann"]
    assert len(caplog.messages) == 1
    assert "1 folders without a photo" in caplog.messages[0] and "(bob)" in caplog.messages[0]


def test_persons_without_a_clean_photo_stay_and_are_told_once_with_their_number_and_names(tmp_path, caplog):
    write(tmp_path / "ann" / "clean" / "a.png")
    for number in range(7):
        write(tmp_path / f"p{number}" / "distortion" / "a_foggy.png")
    for _ in range(3):
        persons = scan_persons(tmp_path)
    assert [p.name for p in persons] == ["ann", "p0", "p1", "p2", "p3", "p4", "p5", "p6"]
    assert len(caplog.messages) == 1
    assert "7 persons without a clean photo" in caplog.messages[0]
    assert "(p0, p1, p2, p3, p4 and 2 more)" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_root_that_is_no_folder_is_named_with_the_way_out(tmp_path, kind):
    root = tmp_path / "train"
    if kind == "a file":
        root.write_text("")
    with pytest.raises(UserError, match="no such folder; set DATA_DIR to the folder that holds train/ and val/") as e:
        scan_persons(root)
    assert str(e.value).startswith(f"{root}: ")


def test_an_empty_root_is_named_with_the_layout_expected(tmp_path):
    with pytest.raises(ValueError, match="no person with a photo") as e:
        scan_persons(tmp_path)
    for part in (f"{tmp_path}: ", f"{tmp_path}/<person>/clean/*.jpg", f"{tmp_path}/<person>/distortion/*.jpg"):
        assert part in str(e.value)


def test_a_root_may_be_given_as_text(tree):
    assert scan_persons(str(tree)) == scan_persons(tree)


# --- unreadable files -------------------------------------------------------------------------------------------------

BROKEN = {
    "truncated.jpg": encoded(".jpg")[: len(encoded(".jpg")) * 6 // 10],
    "truncated.png": encoded(".png")[: len(encoded(".png")) * 6 // 10],
    "empty.jpg": b"",
    "text.jpg": b"this is no picture\n" * 100,
}


def test_each_kind_of_broken_file_is_listed_by_path_and_left_out(tmp_path, caplog):
    sound = write(tmp_path / "ann" / "clean" / "sound.png")
    copy = write(tmp_path / "ann" / "distortion" / "sound_foggy.png")
    broken = [tmp_path / "ann" / folder / name for folder in ("clean", "distortion") for name in BROKEN]
    for path in broken:
        path.write_bytes(BROKEN[path.name])
    [ann] = scan_persons(tmp_path)
    assert ann.clean == (sound,) and ann.distorted == (copy,)
    assert len(caplog.messages) == 1 and "8 unreadable images" in caplog.messages[0]
    assert all(f"{path}: " in caplog.messages[0] for path in broken)
    assert str(sound) not in caplog.messages[0]


def test_a_person_with_nothing_but_broken_files_is_dropped(tmp_path):
    write(tmp_path / "ann" / "clean" / "a.png")
    (tmp_path / "bob" / "clean").mkdir(parents=True)
    (tmp_path / "bob" / "clean" / "b.jpg").write_bytes(BROKEN["truncated.jpg"])
    assert [p.name for p in scan_persons(tmp_path)] == ["ann"]
    assert FaceClassificationDataset(tmp_path, first_pixel).persons == ["ann"]


def test_a_root_of_broken_files_alone_is_an_error(tmp_path):
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "b.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no person with a photo"):
        scan_persons(tmp_path)


@pytest.mark.parametrize("name", BROKEN)
def test_unchecked_broken_files_raise_with_their_path_when_loaded(tmp_path, name):
    path = tmp_path / "ann" / name
    path.parent.mkdir()
    path.write_bytes(BROKEN[name])
    dataset = FaceClassificationDataset(tmp_path, first_pixel, check_images=False)
    assert dataset.samples == [(path, 0)]
    with pytest.raises(UserError, match="cannot be read as an image") as e:
        dataset[0]
    assert str(e.value).startswith(f"{path}: ") and "CHECK_IMAGES = True" in str(e.value)


def test_a_file_replaced_between_scans_is_read_again(tmp_path):
    sound = write(tmp_path / "ann" / "clean" / "sound.png")
    changing = write(tmp_path / "ann" / "clean" / "changing.png")
    content = changing.read_bytes()
    assert scan_persons(tmp_path)[0].clean == (changing, sound)
    changing.write_bytes(content[:40])
    assert scan_persons(tmp_path)[0].clean == (sound,)
    changing.write_bytes(content)
    assert scan_persons(tmp_path)[0].clean == (changing, sound)


def test_checking_files_leaves_the_warning_filters_as_they_were(tmp_path):
    paths = [tmp_path / f"{number}.jpg" for number in range(40)]
    for path in paths:
        Image.fromarray(noise(256, 256)).save(path)
    with warnings.catch_warnings():  # so that a failure here does not silence the tests after it
        before = list(warnings.filters)
        for _ in range(4):
            for path in paths:
                path.touch()  # checked anew
            assert find_unreadable(paths) == {}
            assert warnings.filters == before


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


ORIENTATION_6 = struct.pack(">HHIHH", 0x112, 3, 1, 6, 0)
ODD_EXIF = {
    "no TIFF header": b"Exif\0\0XXXXXXXXXXXX",
    "pointer that is text": exif(ORIENTATION_6, struct.pack(">HHII", 0x8769, 2, 2, 0x41000000)),
    "strip offset that is a float": exif(struct.pack(">HHIf", 0x111, 11, 1, 1.5), ORIENTATION_6),
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("block", ODD_EXIF)
def test_an_odd_exif_block_costs_no_photo(tmp_path, block, suffix):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (32, 32), (200, 100, 50)).save(path, exif=ODD_EXIF[block])
    assert find_unreadable([path]) == {}
    assert load_image(path).getpixel((16, 16)) == pytest.approx((200, 100, 50), abs=6)  # JPEG and WebP lose a little


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a_0001_blurred.jpg", "blurred"),
        ("001_frontal_SUNNY.JPG", "sunny"),
        ("x_LowLight.png", "lowlight"),
        ("a_1.v2_noisy.png", "noisy"),
        ("portrait.jpg", "unknown"),
        ("portrait_.jpg", "unknown"),
    ],
)
def test_the_kind_of_distortion_is_what_follows_the_last_underscore(name, kind):
    assert distortion_kind(Path("train/ann_lee/distortion") / name) == kind


def test_the_source_of_a_distorted_photo_is_the_clean_one_it_is_named_after():
    clean = [Path("c") / name for name in ("a_1.jpg", "a_10.jpg", "001_frontal.jpg", "b.png")]
    expected = {
        "a_1_blurred.jpg": "a_1.jpg",
        "a_10_blurred.jpg": "a_10.jpg",
        "a_1_very_foggy.png": "a_1.jpg",
        "001_frontal_sunny.jpg": "001_frontal.jpg",  # FACECOM names photos after their folder
        "b.jpg": "b.png",
        "a_100_blurred.jpg": None,
        "a.jpg": None,
        "bb_foggy.jpg": None,
    }
    found = {name: source_photo(Path("d") / name, clean) for name in expected}
    assert {name: photo and photo.name for name, photo in found.items()} == expected
    assert source_photo(Path("d/a_1_blurred.jpg"), clean[::-1]) == clean[0]
    assert source_photo(Path("d/a_1_blurred.jpg"), []) is None


def test_the_longest_clean_name_is_the_source_where_several_fit():
    clean = [Path("c/ann.jpg"), Path("c/ann_smiling_left.jpg"), Path("c/ann_smiling.jpg")]
    assert source_photo(Path("d/ann_smiling_left_foggy.jpg"), clean) == clean[1]
    assert source_photo(Path("d/ann_smiling_foggy.jpg"), clean) == clean[2]


# --- persons held out -------------------------------------------------------------------------------------------------


def test_holdout_is_a_sorted_draw_by_seed_whatever_the_order_of_the_names():
    names = [f"p{number:02d}" for number in range(30)]
    held_out = split_holdout(names, 5, seed=0)
    assert len(set(held_out)) == 5 and set(held_out) < set(names) and held_out == sorted(held_out)
    assert split_holdout(names[::-1], 5, seed=0) == held_out
    assert len({tuple(split_holdout(names, 5, seed)) for seed in range(5)}) == 5


def test_holdout_may_leave_two_persons_or_take_nobody():
    assert split_holdout(["a", "b", "c"], 0, seed=0) == []
    assert len(split_holdout(["a", "b", "c"], 1, seed=0)) == 1


@pytest.mark.parametrize("count", [-1, 9, 10, 11])
def test_a_holdout_that_leaves_fewer_than_two_persons_is_refused_with_the_range(count):
    with pytest.raises(ValueError, match=rf"HOLDOUT_PERSONS = {count}: 10 persons are there, two must stay"):
        split_holdout([f"p{number}" for number in range(10)], count, seed=0)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_exif_orientation_6_is_turned_upright(tmp_path):
    image = Image.new("RGB", (64, 32), "white")
    image.paste((255, 0, 0), (0, 0, 16, 16))  # stored top left: top right once turned clockwise
    tags = Image.Exif()
    tags[0x112] = 6
    image.save(tmp_path / "a.jpg", exif=tags, quality=95)
    upright = load_image(tmp_path / "a.jpg")
    assert upright.size == (32, 64)
    assert upright.getpixel((28, 4)) == pytest.approx((254, 0, 0), abs=8)
    assert upright.getpixel((4, 4)) == pytest.approx((255, 255, 255), abs=8)
    assert upright.getpixel((28, 60)) == pytest.approx((255, 255, 255), abs=8)


def palette_image() -> Image.Image:
    """Mode P, pixel (0, 0) of index 1 (10, 200, 30), the rest of index 0 (250, 0, 0)."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([250, 0, 0, 10, 200, 30])
    image.putpixel((0, 0), 1)
    return image


def other_modes() -> dict:
    """mode -> image, how to save it, its first pixel as RGB."""
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.putpixel((0, 0), (100, 50, 0, 255))
    return {
        "L": (Image.new("L", (8, 8), 77), {}, (77, 77, 77)),
        "P": (palette_image(), {}, (10, 200, 30)),
        "P, opaque pixel": (palette_image(), {"transparency": 0}, (10, 200, 30)),
        "P, transparent pixel": (palette_image(), {"transparency": 1}, (255, 255, 255)),
        "RGB with a transparent colour": (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255,) * 3),
        "RGBA, opaque": (half, {}, (100, 50, 0)),
        "RGBA, clear": (Image.new("RGBA", (8, 8), (100, 50, 0, 0)), {}, (255, 255, 255)),
        "RGBA, half": (Image.new("RGBA", (8, 8), (0, 0, 0, 51)), {}, (204, 204, 204)),  # 51 / 255 = 0.2 black
        "LA": (Image.new("LA", (8, 8), (77, 255)), {}, (77, 77, 77)),
        "LA, clear": (Image.new("LA", (8, 8), (77, 0)), {}, (255, 255, 255)),
        "1": (Image.new("1", (8, 8), 1), {}, (255, 255, 255)),
        "I;16": (Image.fromarray(np.full((8, 8), 32768, np.uint16)), {}, (128, 128, 128)),
        "I;16 black": (Image.fromarray(np.full((8, 8), 255, np.uint16)), {}, (0, 0, 0)),
        "I;16 white": (Image.fromarray(np.full((8, 8), 65535, np.uint16)), {}, (255, 255, 255)),
    }


@pytest.mark.parametrize("mode", other_modes())
def test_every_pixel_mode_becomes_rgb_of_the_same_look(tmp_path, mode):
    image, options, expected = other_modes()[mode]
    image.save(tmp_path / "a.png", **options)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB" and loaded.size == (8, 8)
    assert loaded.getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_a_cmyk_jpeg_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)  # cyan ink alone
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.mode == "RGB" and loaded.getpixel((8, 8)) == pytest.approx((0, 255, 255), abs=8)


# --- crop and transforms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, height, fraction, rows, columns",
    [
        (160, 160, 0.5, slice(40, 120), slice(40, 120)),
        (200, 160, 0.5, slice(40, 120), slice(60, 140)),
        (160, 200, 0.5, slice(60, 140), slice(40, 120)),
        (80, 120, 1.0, slice(20, 100), slice(0, 80)),
        (80, 80, 1.0, slice(0, 80), slice(0, 80)),
        (320, 320, 0.25, slice(120, 200), slice(120, 200)),
    ],
)
def test_the_crop_is_exactly_the_central_square(width, height, fraction, rows, columns):
    pixels = noise(width, height)
    cropped = FaceCrop(80, fraction)(Image.fromarray(pixels))  # 80 pixels of the photo to 80: no blending
    assert np.array_equal(np.asarray(cropped), pixels[rows, columns])


def test_a_square_of_the_crops_size_fills_it_and_a_smaller_one_does_not():
    for side, filled in ((100, True), (92, False)):
        image = Image.new("RGB", (200, 260), (0, 0, 255))
        margin_x, margin_y = (200 - side) // 2, (260 - side) // 2
        image.paste((255, 0, 0), (margin_x, margin_y, margin_x + side, margin_y + side))
        cropped = np.asarray(FaceCrop(76, 0.48)(image))  # 96 pixels wide: the shrinking filter sees 1 more
        assert (cropped == (255, 0, 0)).all() == filled


def test_jitter_moves_and_scales_the_crop_within_its_bounds():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3))  # a pixel's value is its column
    crop = FaceCrop(100, 0.5, zoom=0.1, shift=0.03)
    torch.manual_seed(0)
    centres, sides = [], []
    for _ in range(200):
        row = np.asarray(crop(Image.fromarray(ramp)))[50, :, 0].astype(float)
        centres.append(row.mean() + 0.5)
        sides.append((row[-6] - row[5]) * 100 / 89)
    assert 93 <= min(centres) < 96 and 104 < max(centres) <= 107  # 100 +- 0.03 * 200
    assert 88 <= min(sides) < 94 and 106 < max(sides) <= 112  # 100 +- 10 %


def test_a_crop_of_the_whole_photo_grows_and_moves_too_into_its_mirror_image():
    ramp = np.zeros((150, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200)[None, :], np.arange(150)[:, None]  # red: column, green: row
    crop = FaceCrop(100, 1.0, zoom=0.2, shift=0.1)
    torch.manual_seed(0)
    sides, middles, turned = [], [], 0
    for _ in range(200):
        pixels = np.asarray(crop(Image.fromarray(ramp))).astype(float)
        across, down = (pixels[50, 45:55, 0], pixels[45:55, 50, 1])
        assert np.ptp(across) == pytest.approx(np.ptp(down), abs=1)  # square, and no edge is drawn into the middle
        sides.append(np.ptp(pixels[50, 30:71, 0]) / 40 * 100)
        middles.append(pixels[50, 50, 1])
        rows = np.diff(pixels[:, 50, 1])
        turned += (rows < 0).any()  # the rows count back beyond the edge
        assert pixels[..., 1].max() <= 149 and (np.abs(rows) <= 2).all()  # nothing but the photo, without a jump
    assert 118 <= min(sides) < 125 and 175 < max(sides) <= 182  # 150 +- 20 %
    assert 60 <= min(middles) < 64 and 86 < max(middles) <= 90  # 75 +- 0.1 * 150
    assert 100 < turned < 200


def test_a_jittered_crop_fits_into_photos_of_any_size():
    torch.manual_seed(0)
    for width in (*range(1, 20), 33, 101, 255):
        for height in (1, 2, 3, 7, 19, 50, 111):
            image = Image.new("RGB", (width, height), (9, 9, 9))
            for fraction in (0.013, 0.3, 0.52, 0.999, 1.0):
                cropped = FaceCrop(76, fraction, zoom=0.3, shift=0.5)(image)  # Pillow refuses a box outside the photo
                assert cropped.size == (76, 76) and cropped.getextrema() == ((9, 9),) * 3
                assert FaceCrop(76, fraction)(image).getextrema() == ((9, 9),) * 3


@pytest.mark.parametrize(("name", "value"), [("zoom", -0.1), ("zoom", 1.0), ("shift", -0.1), ("shift", 0.6)])
def test_a_jitter_out_of_range_is_refused_by_its_constant(name, value):
    with pytest.raises(ValueError, match=rf"CROP_{name.upper()} = {value}: expected a share"):
        FaceCrop(160, 0.5, **{name: value})


@pytest.mark.parametrize("fraction", [0, -0.5, 1.1, math.nan])
def test_a_crop_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match=rf"FACE_CROP = {fraction}: expected a share .* in \(0, 1\]"):
        FaceCrop(160, fraction)


def test_an_image_size_that_the_network_cannot_take_is_refused():
    with pytest.raises(ValueError, match="IMAGE_SIZE = 75: expected at least 76 pixels"):
        FaceCrop(75, 0.5)
    FaceCrop(76, 0.5)


def test_eval_transform_scales_pixels_as_facenet_does():
    pixels = noise(200, 160)
    expected = fixed_image_standardization(torch.tensor(pixels[40:120, 60:140]).permute(2, 0, 1).float())
    image = eval_transform(80, 0.5)(Image.fromarray(pixels))
    assert image.dtype == torch.float32 and image.shape == (3, 80, 80)
    torch.testing.assert_close(image, expected, atol=1e-6, rtol=0)


def test_train_transform_without_jitter_is_the_eval_transform_mirrored_about_half_of_the_time():
    image = Image.fromarray(noise(80, 80))
    plain = eval_transform(76, 1.0)(image)
    augment = train_transform(76, 1.0, zoom=0.0, shift=0.0)
    torch.manual_seed(0)
    draws = [augment(image) for _ in range(400)]
    mirrored = sum(torch.equal(draw, plain.flip(2)) for draw in draws)
    assert mirrored + sum(torch.equal(draw, plain) for draw in draws) == 400
    assert 160 <= mirrored <= 240  # 200 +- 4 standard deviations of 10


def test_train_transform_without_mirror_and_jitter_is_the_eval_transform():
    image = Image.fromarray(noise(90, 90))
    augment = train_transform(76, 1.0, zoom=0.0, shift=0.0, mirror=False)
    plain = eval_transform(76, 1.0)(image)
    assert not torch.equal(plain, plain.flip(2))
    assert all(torch.equal(augment(image), plain) for _ in range(20))


# --- classification datasets ------------------------------------------------------------------------------------------


def test_classification_holds_every_photo_with_its_persons_label(tree):
    dataset = FaceClassificationDataset(tree, first_pixel)
    assert dataset.persons == ["ann", "bob", "cy", "dee"]
    assert dataset.label2idx == {"ann": 0, "bob": 1, "cy": 2, "dee": 3}
    assert len(dataset) == 18
    items = [(tuple(pixel.tolist()), label) for pixel, label in dataset]
    expected = {
        (p, k, distorted)
        for p, counts in enumerate(PERSONS.values())
        for distorted, count in enumerate(counts)
        for k in range(count)
    }
    assert len(items) == len(expected) and {pixel for pixel, _ in items} == expected
    assert all(label == pixel[0] for pixel, label in items)


def test_excluded_persons_get_no_label(tree):
    dataset = FaceClassificationDataset(tree, first_pixel, exclude=["bob"])
    assert dataset.persons == ["ann", "cy", "dee"] and dataset.label2idx == {"ann": 0, "cy": 1, "dee": 2}
    assert len(dataset) == 14
    assert {(int(pixel[0]), label) for pixel, label in dataset} == {(0, 0), (2, 1), (3, 2)}


def test_excluding_everybody_is_an_error(tree):
    with pytest.raises(ValueError, match="every person is held out; lower HOLDOUT_PERSONS"):
        FaceClassificationDataset(tree, first_pixel, exclude=list(PERSONS))


def test_augmentation_depends_on_seed_epoch_and_index_alone(tree):
    def draws(seed: int, epoch: int, order=range(18)) -> list:
        dataset = FaceClassificationDataset(tree, jittered_pixel, seed=seed)
        dataset.set_epoch(epoch)
        images = {index: tuple(dataset[index][0].tolist()) for index in order}
        return [images[index] for index in range(18)]

    first = draws(0, 1)
    torch.manual_seed(99)
    assert draws(0, 1, order=reversed(range(18))) == first
    others = [draws(0, 2), draws(1, 1), draws(1, 0)]
    jitters = {image[:2] for drawn in (first, *others) for image in drawn}
    assert len(jitters) == 4 * 18


def test_drawing_an_item_leaves_torchs_generators_untouched(tree, monkeypatch):
    gpu_seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", gpu_seeds.append)
    torch.manual_seed(5)
    gpu_seeds.clear()  # of the line above
    state = torch.get_rng_state()
    FaceClassificationDataset(tree, jittered_pixel)[3]
    FacePairDataset(tree, jittered_pixel)[3]
    assert torch.equal(torch.get_rng_state(), state)
    assert gpu_seeds == []  # otherwise, without workers, every step on a GPU would draw dropout from the same few seeds


def test_val_datasets_label_by_the_mapping_of_the_training_set(tree, tmp_path):
    val = numbered_tree(tmp_path / "val", {"bob": (1, 2), "dee": (2, 0)})
    train_set = FaceClassificationDataset(tree, first_pixel)
    both = FaceClassificationDatasetWithMapping(val, first_pixel, train_set.persons, train_set.label2idx)
    assert [(path.name, label) for path, label in both.samples] == [
        ("bob_0.png", 1),
        ("bob_0_foggy.png", 1),
        ("bob_1_foggy.png", 1),
        ("dee_0.png", 3),
        ("dee_1.png", 3),
    ]
    clean = FaceCleanValDataset(val, train_set.persons, train_set.label2idx, first_pixel)
    assert [(path.name, label) for path, label in clean.samples] == [
        ("bob_0.png", 1),
        ("dee_0.png", 3),
        ("dee_1.png", 3),
    ]
    for dataset in (both, clean):
        assert dataset.persons == train_set.persons and dataset.label2idx == train_set.label2idx
        assert len(dataset) == len(dataset.samples) and dataset[0][1] == 1
        assert dataset[0][0].tolist() == [0, 0, 0]  # bob's clean photo


def with_mapping(root, persons, label2idx):
    return FaceClassificationDatasetWithMapping(root, first_pixel, persons, label2idx)


def clean_val(root, persons, label2idx):
    return FaceCleanValDataset(root, persons, label2idx, first_pixel)


@pytest.mark.parametrize("build", [with_mapping, clean_val])
def test_a_val_person_that_training_does_not_know_is_named_and_retrieval_pointed_to(tree, build):
    with pytest.raises(ValueError, match="2 of 4 persons are not among the 2 trained ones") as e:
        build(tree, ["bob", "cy"], {"bob": 0, "cy": 1})
    for part in (str(tree), "(ann, dee)", "retrieval (build_gallery"):
        assert part in str(e.value)


@pytest.mark.parametrize("build", [with_mapping, clean_val])
def test_persons_and_labels_of_different_training_sets_are_refused(tree, build):
    with pytest.raises(ValueError, match="name different persons"):
        build(tree, list(PERSONS), {"ann": 0, "bob": 1})


def test_a_val_split_without_a_clean_photo_is_an_error(tmp_path):
    root = numbered_tree(tmp_path / "val", {"bob": (0, 2)})
    with pytest.raises(ValueError, match="no clean photo; expected") as e:
        clean_val(root, ["bob"], {"bob": 0})
    assert str(e.value).startswith(f"{root}: ")


# --- pairs ------------------------------------------------------------------------------------------------------------


def draw_all(dataset: FacePairDataset, epoch: int) -> list:
    """(anchor, positive, negative) pixels, label and negative label of every item."""
    dataset.set_epoch(epoch)
    items = (dataset[index] for index in range(len(dataset)))
    return [(*(tuple(pixel.tolist()) for pixel in pixels), label, other) for *pixels, label, other in items]


def loaded(loader: DataLoader, epoch: int) -> list:
    """The same by way of a DataLoader."""
    loader.dataset.set_epoch(epoch)
    return [
        (*(tuple(pixel) for pixel in pixels), label, other)
        for batch in loader
        for *pixels, label, other in zip(*(column.tolist() for column in batch), strict=True)
    ]


def test_pairs_are_anchor_positive_of_its_person_and_negative_of_another(tree):
    dataset = FacePairDataset(tree, first_pixel)
    assert dataset.persons == ["ann", "bob", "cy", "dee"] and dataset.label2idx["cy"] == 2
    negatives = set()
    for epoch in range(20):
        items = draw_all(dataset, epoch)
        anchors = sorted(anchor for anchor, *_ in items)
        assert anchors == [
            (0, 0, 0),
            (1, 0, 0),
            (1, 1, 0),
            (2, 0, 0),
            (2, 1, 0),
            (2, 2, 0),
            (3, 0, 0),
        ]  # each clean one
        for anchor, positive, negative, label, negative_label in items:
            assert anchor[0] == positive[0] == label and positive[2] == 1
            assert negative[0] == negative_label != label
            negatives.add(negative)
    assert {pixel[2] for pixel in negatives} == {0, 1}  # clean and distorted ones


def test_pairs_change_with_the_epoch_and_with_the_seed(tree):
    dataset, other_seed = FacePairDataset(tree, first_pixel), FacePairDataset(tree, first_pixel, seed=1)
    draws = [draw_all(dataset, 0), draw_all(dataset, 1), draw_all(other_seed, 0), draw_all(other_seed, 1)]
    assert all(a != b for i, a in enumerate(draws) for b in draws[:i])
    assert draw_all(dataset, 0) == draws[0]
    assert draw_all(FacePairDataset(tree, first_pixel, seed=1), 1) == draws[3]


def test_pairs_are_the_same_with_and_without_workers(tree):
    dataset = FacePairDataset(tree, jittered_pixel, seed=3)
    alone = loaded(DataLoader(dataset, 3), epoch=4)
    assert len(alone) == 7
    assert loaded(DataLoader(dataset, 2, num_workers=2), epoch=4) == alone


def test_workers_that_live_on_follow_set_epoch(tree):
    dataset = FacePairDataset(tree, jittered_pixel)
    loader = DataLoader(dataset, 3, num_workers=2, persistent_workers=True)
    by_workers = [loaded(loader, epoch) for epoch in (0, 1, 0)]
    assert by_workers == [loaded(DataLoader(dataset, 3), epoch) for epoch in (0, 1, 0)]
    assert by_workers[0] != by_workers[1]


def test_the_negatives_person_is_drawn_evenly_and_then_the_photo(tree):
    dataset = FacePairDataset(tree, first_pixel)
    generator = torch.Generator().manual_seed(0)
    draws = [dataset.draw(0, generator) for _ in range(3000)]  # anchor: ann's only clean photo
    persons = Counter(negative_label for *_, negative_label in draws)
    assert set(persons) == {1, 2, 3}  # bob has 4 photos, cy 9, dee 2
    assert all(abs(count - 1000) < 110 for count in persons.values())  # standard deviation 26
    photos = Counter(negative for *_, negative, _, negative_label in draws if negative_label == 2)
    assert len(photos) == 9 and all(abs(count - 111) < 45 for count in photos.values())  # standard deviation 10
    positives = Counter(positive.name for _, positive, *_ in draws)
    assert set(positives) == {"ann_0_foggy.png", "ann_1_foggy.png"}
    assert all(abs(count - 1500) < 110 for count in positives.values())  # standard deviation 27


def test_persons_without_a_pair_are_told_once_and_serve_as_negatives(tmp_path, caplog):
    root = numbered_tree(tmp_path / "train", {"ann": (1, 1), "bob": (2, 0), "cy": (0, 2)})
    for _ in range(2):
        dataset = FacePairDataset(root, first_pixel)
    told = [message for message in caplog.messages if "give no pair" in message]
    assert len(told) == 1 and "2 of 3 persons" in told[0] and "(bob, cy)" in told[0]
    assert [path.name for path, _ in dataset.anchors] == ["ann_0.png"] and len(dataset) == 1
    items = [draw_all(dataset, epoch)[0] for epoch in range(40)]
    assert {negative for _, _, negative, *_ in items} == {(1, 0, 0), (1, 1, 0), (2, 0, 1), (2, 1, 1)}


def test_excluded_persons_are_neither_anchor_nor_negative(tree):
    dataset = FacePairDataset(tree, first_pixel, exclude=["ann", "bob"])
    assert dataset.persons == ["cy", "dee"] and len(dataset) == 4
    seen = {pixel[0] for epoch in range(5) for item in draw_all(dataset, epoch) for pixel in item[:3]}
    assert seen == {2, 3}


def test_a_tree_without_any_pair_is_an_error(tmp_path):
    root = numbered_tree(tmp_path / "train", {"ann": (2, 0), "bob": (0, 2)})
    with pytest.raises(ValueError, match="no person has both clean and distorted photos") as e:
        FacePairDataset(root, first_pixel)
    assert str(e.value).startswith(f"{root}: ")


def test_a_single_person_has_no_negative(tree):
    with pytest.raises(ValueError, match="a negative needs a second person, found only cy"):
        FacePairDataset(tree, first_pixel, exclude=["ann", "bob", "dee"])


def test_excluding_everybody_from_the_pairs_says_so(tree):
    with pytest.raises(ValueError, match="every person is held out; lower HOLDOUT_PERSONS"):
        FacePairDataset(tree, first_pixel, exclude=list(PERSONS))


def test_skipped_kinds_are_left_out_of_both_training_sets_and_nothing_else(task_b):
    both = FaceClassificationDataset(task_b / "train", eval_transform(76, 1.0))
    some = FaceClassificationDataset(task_b / "train", eval_transform(76, 1.0), skip_kinds=("blurred",))
    assert [path for path, _ in some.samples] == [p for p, _ in both.samples if not p.stem.endswith("_blurred")]
    assert len(both) - len(some) == 7  # a blurred copy of each of the 7 clean photos
    pairs = FacePairDataset(task_b / "train", eval_transform(76, 1.0), skip_kinds=("blurred",))
    drawn = [pairs.draw(i, torch.Generator().manual_seed(seed))[1:3] for i in range(7) for seed in range(20)]
    assert not any(path.stem.endswith("_blurred") for paths in drawn for path in paths)


def test_a_skipped_kind_that_is_not_there_is_told_with_those_that_are(task_b, caplog):
    FacePairDataset(task_b / "train", eval_transform(76, 1.0), skip_kinds=("suny",))
    assert "no train photo is of kind 'suny'; there are blurred, lowlight" in caplog.text


def test_a_skipped_kind_among_clean_photos_alone_is_told_with_that(task_b, caplog):
    for folder in (task_b / "train").glob("*/distortion"):
        shutil.rmtree(folder)
    FaceClassificationDataset(task_b / "train", eval_transform(76, 1.0), skip_kinds=("sunny",))
    assert "no train photo is of kind 'sunny'; there are no distorted ones" in caplog.text


def test_skipping_every_kind_leaves_no_pair(task_b):
    with pytest.raises(ValueError, match="no person has both clean and distorted"):
        FacePairDataset(task_b / "train", eval_transform(76, 1.0), skip_kinds=("blurred", "lowlight"))


def test_persons_of_both_splits_are_told(task_b, caplog):
    train, val = scan_persons(task_b / "train"), scan_persons(task_b / "val")
    warn_shared_persons(train, val)
    assert caplog.text == ""
    shutil.copytree(task_b / "train" / "bob", task_b / "val" / "bob")
    warn_shared_persons(train, scan_persons(task_b / "val"))
    assert "1 of 3 val persons are train persons too" in caplog.text and "(bob)" in caplog.text
    assert "more than one person" not in caplog.text  # bob's photos in both splits have one name


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_under_two_persons_is_told_with_its_paths(task_b, caplog, split):
    original = task_b / "train" / "bob" / "clean" / "bob_0001.png"
    person = next((task_b / split).iterdir()).name if split == "val" else "di"
    copy = task_b / split / person / "clean" / "holiday.png"
    shutil.copy(original, copy)
    warn_shared_persons(scan_persons(task_b / "train"), scan_persons(task_b / "val"))
    assert f"{original} = {copy}" in caplog.text
    assert "1 images lie under more than one person" in caplog.text


def test_files_of_equal_size_but_other_content_are_no_copies(tmp_path, caplog):
    for name, colour in (("ann", (10, 20, 30)), ("bob", (30, 20, 10))):
        path = tmp_path / "train" / name / "clean" / "a.bmp"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(path)
    persons = scan_persons(tmp_path / "train")
    assert persons[0].clean[0].stat().st_size == persons[1].clean[0].stat().st_size
    warn_shared_persons(persons, [])
    assert caplog.text == ""


# --- pairs without negatives, with chosen positives, and beyond len ---------------------------------------------------


def test_without_negatives_an_item_is_anchor_positive_label_and_the_anchors_place(tree):
    pairs, triplets = (FacePairDataset(tree, first_pixel, seed=2, negatives=negatives) for negatives in (False, True))
    for index in range(3 * len(pairs)):
        anchor, positive, label, place = pairs[index]
        assert place == index % len(pairs) and pairs.anchors[place][1] == label
        assert first_pixel(load_image(pairs.anchors[place][0])).tolist() == anchor.tolist()
        assert anchor[0] == positive[0] == label and (anchor[2], positive[2]) == (0, 1)
        assert [anchor.tolist(), positive.tolist(), label] == [
            *(pixel.tolist() for pixel in triplets[index][:2]),
            triplets[index][3],
        ]  # a negative or none: the pair is the same


def marked(image: Image.Image) -> torch.Tensor:
    return first_pixel(image) + 100


@pytest.mark.parametrize("negatives", [False, True])
@pytest.mark.parametrize("shares", [{}, {"clean": 1.0}, {"anew": 1.0, "distort": lambda image: image}])
def test_every_photo_goes_through_the_transform(tree, negatives, shares):
    pixels = FacePairDataset(tree, marked, negatives=negatives, **shares)[0][: 2 + negatives]
    assert all((pixel >= 100).all() for pixel in pixels)


def drawn_positives(dataset: FacePairDataset, times: int) -> dict[tuple, Counter]:
    """How often each positive came to each anchor, both as pixels, in so many epochs."""
    drawn: dict[tuple, Counter] = {}
    for epoch in range(times):
        for anchor, positive, *_ in draw_all(dataset, epoch):
            drawn.setdefault(anchor, Counter())[positive] += 1
    return drawn


def test_positives_are_any_distorted_photo_of_the_person_and_with_copies_those_of_the_anchor_alone(tmp_path):
    persons = {"ann": (2, 2), "bob": (1, 3)}
    root = numbered_tree(tmp_path / "train", persons)
    write(root / "ann" / "distortion" / "ann_0_rainy.png", (0, 9, 1))  # a second copy of ann's photo 0
    any_of, copies = (
        drawn_positives(FacePairDataset(root, first_pixel, copies=copies), 40) for copies in (False, True)
    )
    assert any_of[0, 0, 0].keys() == any_of[0, 1, 0].keys() == {(0, 0, 1), (0, 1, 1), (0, 9, 1)}
    assert any_of[1, 0, 0].keys() == {(1, 0, 1), (1, 1, 1), (1, 2, 1)}
    assert copies[0, 0, 0].keys() == {(0, 0, 1), (0, 9, 1)} and min(copies[0, 0, 0].values()) >= 10  # of 40
    assert copies[0, 1, 0].keys() == {(0, 1, 1)}
    assert copies[1, 0, 0].keys() == {(1, 0, 1)}  # the two others are of photos that are not there


def test_an_anchor_without_a_copy_of_its_own_takes_those_of_the_persons_other_photos(tmp_path):
    root = numbered_tree(tmp_path / "train", {"ann": (3, 2), "bob": (1, 1)})
    drawn = drawn_positives(FacePairDataset(root, first_pixel, copies=True), 40)
    assert drawn[0, 2, 0].keys() == {(0, 0, 1), (0, 1, 1)}


def test_a_copy_of_a_skipped_kind_is_no_copy(tmp_path):
    root = numbered_tree(tmp_path / "train", {"ann": (2, 2), "bob": (1, 1)})
    write(root / "ann" / "distortion" / "ann_0_rainy.png", (0, 9, 1))
    drawn = drawn_positives(FacePairDataset(root, first_pixel, copies=True, skip_kinds=("foggy",)), 20)
    assert {anchor: set(positives) for anchor, positives in drawn.items()} == {
        (0, 0, 0): {(0, 9, 1)},
        (0, 1, 0): {(0, 9, 1)},
    }


def repainted(image: Image.Image) -> Image.Image:
    """A distortion that marks what it was given."""
    return Image.new("RGB", image.size, (*image.getpixel((0, 0))[:2], image.getpixel((0, 0))[2] + 200))


@pytest.mark.parametrize("negatives", [False, True])
def test_shares_of_the_positives_are_the_anchor_as_it_is_or_distorted_anew_and_the_rest_are_files(tree, negatives):
    options = {"clean": 0.2, "anew": 0.5, "distort": repainted, "negatives": negatives}
    dataset, count = FacePairDataset(tree, first_pixel, **options), Counter()
    for index in range(100 * len(dataset)):
        anchor, positive, *others = (item.tolist() if torch.is_tensor(item) else item for item in dataset[index])
        assert anchor[2] == 0
        if positive[2] != 1:
            assert positive[:2] == anchor[:2]
        if negatives:
            assert others[0][2] in (0, 1)  # nothing is done to negatives
        count[positive[2]] += 1
    assert count.keys() == {0, 1, 200}  # 200: the clean photo repainted; 201 would be a file distorted once more
    assert [count[kind] / 700 for kind in (0, 200, 1)] == pytest.approx([0.2, 0.5, 0.3], abs=0.08)  # 4 deviations


@pytest.mark.parametrize("shares, expected", [({"clean": 1.0}, 0), ({"anew": 1.0, "distort": repainted}, 200), ({}, 1)])
def test_a_share_of_1_leaves_no_other_positive_and_one_of_0_none_of_its_own(tree, shares, expected):
    dataset = FacePairDataset(tree, first_pixel, negatives=False, **shares)
    assert {dataset[index][1][2].item() for index in range(20 * len(dataset))} == {expected}


def test_the_choice_among_the_shares_is_the_same_with_and_without_workers_and_differs_between_epochs(tree):
    dataset = FacePairDataset(tree, first_pixel, clean=0.3, anew=0.4, distort=repainted, seed=3)
    alone = [loaded(DataLoader(dataset, 3), epoch) for epoch in (1, 2)]
    assert [loaded(DataLoader(dataset, 2, num_workers=2), epoch) for epoch in (1, 2)] == alone
    of_first, of_second = ([positive[2] for _, positive, *_ in items] for items in alone)
    assert of_first != of_second


@pytest.mark.parametrize("clean, anew", [(-0.1, 0.5), (0.5, -0.1), (0.6, 0.5), (0.0, 1.1), (1.1, 0.0), (math.nan, 0.0)])
def test_shares_that_are_none_are_refused(tree, clean, anew):
    told = f"CLEAN = {clean}, DISTORT = {anew}: expected shares of 0..1 that make 1 at most, together"
    with pytest.raises(ValueError, match=told):
        FacePairDataset(tree, first_pixel, clean=clean, anew=anew, distort=repainted)


def test_an_index_beyond_len_is_the_anchor_again_with_draws_of_its_own(tree):
    dataset = FacePairDataset(tree, jittered_pixel)
    cy = next(i for i, (_, label) in enumerate(dataset.anchors) if label == 2)
    items = [dataset[cy + n * len(dataset)] for n in range(40)]
    assert {(tuple(anchor[2:].tolist()), label) for anchor, *_, label, _ in items} == {((2, 0, 0), 2)}
    assert {tuple(positive[2:].tolist()) for _, positive, *_ in items} == {(2, k, 1) for k in range(6)}
    assert {negative_label for *_, negative_label in items} == {0, 1, 3}
    assert len({tuple(anchor[:2].tolist()) for anchor, *_ in items}) == 40  # the augmentation differs too
    again = dataset[cy + 5 * len(dataset)]
    assert all(torch.equal(a, b) for a, b in zip(again[:3], items[5][:3], strict=True)) and again[3:] == items[5][3:]


# --- random distortions -----------------------------------------------------------------------------------------------


class Recorder:
    """Kinds of distortion that do nothing but note what they are given."""

    def __init__(self, *names: str):
        self.seen: list[tuple[str, tuple[int, int], float]] = []
        self.kinds = {name: self.kind(name) for name in names}

    def kind(self, name: str):
        def distort(image: Image.Image, severity: float, generator: np.random.Generator) -> Image.Image:
            assert isinstance(severity, float) and isinstance(generator, np.random.Generator)
            self.seen.append((name, image.size, severity))
            return image.copy()

        return distort

    def calls(self, times: int, size=(8, 8), **options) -> list[list[tuple[str, tuple[int, int], float]]]:
        """What each of `times` calls gave to the kinds."""
        distortion = RandomDistortion(self.kinds, **({"probability": 1, "most": 1, "side": 100} | options))
        calls = []
        for _ in range(times):
            self.seen = []
            distortion(Image.new("RGB", size))
            calls.append(self.seen)
        return calls


def test_a_distortion_of_probability_0_is_the_image_itself():
    image = Image.fromarray(noise(300, 200))
    distort = RandomDistortion(DISTORTIONS, probability=0, most=7, side=100)
    torch.manual_seed(0)
    assert all(distort(image) is image for _ in range(200))


@pytest.mark.parametrize("kind", DISTORTIONS)
def test_a_distortion_of_probability_1_always_marks_the_image_and_leaves_the_original(kind):
    pixels = noise(100, 100)
    image = Image.fromarray(pixels)
    distort = RandomDistortion({kind: DISTORTIONS[kind]}, probability=1, most=1, side=100)
    torch.manual_seed(0)
    for _ in range(20):
        distorted = distort(image)
        assert distorted.size == image.size and distorted.mode == "RGB"
        assert not np.array_equal(np.asarray(distorted), pixels)
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_a_share_of_the_photos_is_distorted(probability):
    torch.manual_seed(0)
    calls = Recorder("a", "b").calls(1000, probability=probability)
    assert sum(map(bool, calls)) == pytest.approx(1000 * probability, abs=64)  # 4 standard deviations of at most 16


def test_severities_are_even_in_0_to_1_for_every_kind_of_a_mixture():
    torch.manual_seed(0)
    calls = Recorder("a", "b", "c").calls(600, most=3)
    for place in range(3):
        severities = [call[place][2] for call in calls if len(call) > place]
        found, _ = np.histogram(severities, bins=4, range=(0, 1))
        assert found.sum() == len(severities) > 150  # none outside
        assert found.min() > 0.17 * len(severities)  # a quarter each
        assert min(severities) < 0.03 and max(severities) > 0.97
    assert all(len({severity for *_, severity in call}) == len(call) for call in calls)  # each kind its own


@pytest.mark.parametrize("most", [1, 2, 4])
def test_1_to_most_kinds_are_mixed_evenly_without_repeats_and_in_any_order(most):
    torch.manual_seed(0)
    calls = [[name for name, *_ in call] for call in Recorder(*"abcd").calls(800, most=most)]
    assert all(len(set(call)) == len(call) for call in calls)
    numbers = Counter(map(len, calls))
    assert set(numbers) == set(range(1, most + 1))
    assert all(count == pytest.approx(800 / most, abs=60) for count in numbers.values())
    for place in range(most):
        kinds = Counter(call[place] for call in calls if len(call) > place)
        assert set(kinds) == set("abcd") and min(kinds.values()) > 0.17 * kinds.total()  # a quarter each


def test_kinds_act_in_turn_on_what_the_last_one_left():
    def add(image, severity, generator):
        return image.point(lambda value: value + 1)

    torch.manual_seed(0)
    distort = RandomDistortion(dict.fromkeys("abcd", add), probability=1, most=4, side=100)
    black = Image.new("RGB", (8, 8))
    assert {distort(black).getpixel((3, 3)) for _ in range(100)} == {(n, n, n) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((300, 600), (100, 200)),
        ((600, 300), (200, 100)),
        ((101, 101), (100, 100)),
        ((5000, 120), (4167, 100)),
        ((100, 300), (100, 300)),
        ((99, 3000), (99, 3000)),
        ((8, 8), (8, 8)),
    ],
)
def test_large_frames_are_shrunk_before_the_kinds_see_them_and_small_ones_are_not(size, seen):
    recorder = Recorder("a", "b")
    assert {shape for call in recorder.calls(5, size, most=2) for _, shape, _ in call} == {seen}
    assert RandomDistortion(recorder.kinds, 1, 1, side=100)(Image.new("RGB", size)).size == seen


def test_a_frame_that_is_not_distorted_keeps_its_size():
    image = Image.new("RGB", (300, 600))
    assert RandomDistortion(DISTORTIONS, 0, 1, side=100)(image) is image and image.size == (300, 600)


def test_a_shrunk_frame_shows_the_same_scene():
    ramp = np.tile(np.linspace(0, 250, 400).astype(np.uint8)[None, :, None], (400, 1, 3))
    small = RandomDistortion(Recorder("a").kinds, 1, 1, side=50)(Image.fromarray(ramp))
    assert np.asarray(small)[25, ::10, 0] == pytest.approx(ramp[200, 4::80, 0], abs=4)


def test_distortions_follow_torchs_seed_and_nothing_else():
    image = Image.fromarray(noise(80, 60))
    distort = RandomDistortion(DISTORTIONS, probability=0.8, most=3, side=50)

    def draws(seed: int, numpy_seed: int) -> list[bytes]:
        torch.manual_seed(seed)
        np.random.seed(numpy_seed)
        return [distort(image).tobytes() for _ in range(10)]

    first = draws(0, 0)
    assert draws(0, 1) == first
    assert len(set(first)) > 5
    assert not set(draws(1, 0)) & (set(first) - {image.tobytes()})


def test_the_order_in_which_kinds_are_named_changes_no_draw():
    torch.manual_seed(3)
    calls = Recorder(*"abc").calls(20, most=3)
    torch.manual_seed(3)
    assert Recorder(*"cab").calls(20, most=3) == calls


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_distortion_share_that_is_no_probability_is_refused_by_its_constant(probability):
    with pytest.raises(ValueError, match=rf"DISTORT = {probability}: expected a probability, 0\.\.1"):
        RandomDistortion(DISTORTIONS, probability, most=1, side=100)


@pytest.mark.parametrize("most", [-1, 0, 8])
def test_a_number_of_distortions_that_cannot_be_mixed_is_refused_by_its_constant(most):
    with pytest.raises(ValueError, match=rf"DISTORT_MOST = {most}: expected 1\.\.7 kinds on one photo"):
        RandomDistortion(DISTORTIONS, 0.5, most, side=100)
    assert RandomDistortion(DISTORTIONS, 0.5, 7, side=100).most == 7


def test_train_transform_distorts_the_whole_photo_before_the_crop():
    recorder = Recorder("a")
    distort = RandomDistortion(recorder.kinds, 1, 1, side=500)
    assert train_transform(76, 0.5, zoom=0, shift=0, distort=distort)(Image.new("RGB", (200, 300))).shape == (3, 76, 76)
    assert [size for _, size, _ in recorder.seen] == [(200, 300)]


def test_distortions_are_the_same_with_and_without_workers_and_differ_between_items_and_epochs(tmp_path):
    for name in ("ann", "bob"):
        for number in range(4):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(noise(90, 90)).save(path)  # one and the same photo: what differs are the draws
    distort = RandomDistortion(DISTORTIONS, probability=1, most=3, side=80)
    dataset = FaceClassificationDataset(tmp_path, train_transform(76, 1.0, zoom=0, shift=0, distort=distort), seed=1)

    def drawn(epoch: int, workers: int) -> torch.Tensor:
        dataset.set_epoch(epoch)
        return torch.cat([images for images, _ in DataLoader(dataset, 3, num_workers=workers)])

    first, second = drawn(1, 0), drawn(2, 0)
    assert torch.equal(drawn(1, 2), first) and torch.equal(drawn(2, 2), second)
    assert len(torch.cat([first, second]).unique(dim=0)) == 16


def test_an_index_beyond_the_photos_is_the_same_photo_with_another_crop(task_b):
    photos = FaceClassificationDataset(task_b / "train", train_transform(76, 0.5, 0.2, 0.1))
    (once, label), (again, same_label) = photos[2], photos[2 + len(photos)]
    assert label == same_label and photos.files(2) == photos.files(2 + len(photos))
    assert not torch.equal(once, again)
