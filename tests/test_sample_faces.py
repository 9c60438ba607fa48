"""The drawn persons: the tree, its seeds, and faces in which only the identity tells persons apart."""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import files_in, made_with_seeds
from PIL import Image, ImageOps

from common import UserError
from distortions import DISTORTIONS
from tools import face_drawing, face_identity, sample_faces
from tools.face_drawing import draw_face
from tools.face_identity import random_identity
from tools.sample_faces import contact_sheet

SETTINGS = sample_faces.Settings(
    seed=0, min_photos=1, max_photos=3, side=32, severity_range=(0.3, 0.7), jpeg_quality=92
)


@pytest.fixture(scope="module")
def script():
    """sample_faces.py, set to three persons of 64 px."""
    small = {"IMAGE_SIDE": 64, "TRAIN_PERSONS": 2, "VAL_PERSONS": 1, "MIN_PHOTOS": 1, "MAX_PHOTOS": 3, "SHEET_CELL": 32}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in small.items():
            monkeypatch.setattr(sample_faces, name, value)
        yield sample_faces


@pytest.fixture(scope="module")
def tree(script, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script, "OUT_DIR", tmp_path_factory.mktemp("sample") / "Task_B")
        script.main()
        return script.OUT_DIR


@functools.lru_cache
def drawn(number: int, photo: int, side: int = 96) -> np.ndarray:
    identity = random_identity(np.random.default_rng((0, number)))
    return np.asarray(draw_face(identity, np.random.default_rng((0, number, photo)), side), float)


def test_each_clean_photo_has_a_distorted_one_of_every_kind_beside_it(tree):
    files = {path for path in files_in(tree) if path.endswith(".jpg")}
    expected = {path for path in files if "/clean/" in path}
    for path in list(expected):
        split, name, stem = re.fullmatch(r"(train|val)/(person_\d{4})/clean/(\2_\d{4})\.jpg", path).groups()
        expected |= {f"{split}/{name}/distortion/{stem}_{kind}.jpg" for kind in DISTORTIONS}
        with Image.open(tree / path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert files == expected
    assert sorted(path.name for path in tree.glob("train/*")) == ["person_0001", "person_0002"]


def test_a_seed_writes_the_same_bytes_with_any_number_of_workers(script, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WORKERS", 1)
    same, other = made_with_seeds(script, monkeypatch, tmp_path, seeds=(0, 1))
    assert same == files_in(tree) != other


def test_a_photo_stays_when_there_are_more_photos_and_the_counts_of_photos_keep_their_range(tree, tmp_path):
    counts = []
    for number in range(1, 31):
        folder = tmp_path / f"person_{number:04d}"
        counts.append(sample_faces.write_person(folder, number, SETTINGS))
        assert len(list((folder / "clean").iterdir())) == counts[-1]
    assert set(counts) == {1, 2, 3} and counts.count(1) > counts.count(2)
    few = files_in(tree / "train" / "person_0001")
    folder = tmp_path / "more" / "person_0001"
    sample_faces.write_person(folder, 1, dataclasses.replace(SETTINGS, side=64, min_photos=4, max_photos=4))
    assert few.items() < files_in(folder).items()


def test_a_new_kind_needs_no_more_than_its_line_in_the_table(tmp_path, monkeypatch):
    folder, kinds, severities = tmp_path / "person_0001", len(DISTORTIONS), []

    def inverted(image, severity, generator):
        severities.append(severity)
        return ImageOps.invert(image)

    monkeypatch.setitem(DISTORTIONS, "inverted", inverted)
    sample_faces.write_person(folder, 1, SETTINGS)
    clean, made = folder / "clean/person_0001_0001.jpg", folder / "distortion/person_0001_0001_inverted.jpg"
    assert np.abs(255 - np.asarray(Image.open(clean), float) - np.asarray(Image.open(made))).mean() < 3
    assert all(0.3 <= severity <= 0.7 for severity in severities)
    assert contact_sheet([folder], photos=1, cell=40).width == (1 + kinds + 1) * 40


def test_a_filled_folder_is_refused_with_the_way_out_and_left_alone(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "OUT_DIR", tmp_path)
    for split in ("val", "train"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "cy.jpg").write_bytes(b"mine")
        with pytest.raises(UserError, match=f"{split} is not empty: delete .* or choose another OUT_DIR"):
            script.main()
    assert files_in(tmp_path) == {"train/cy.jpg": b"mine", "val/cy.jpg": b"mine"}


@pytest.mark.parametrize(
    ("constant", "value", "expected"),
    [
        ("TRAIN_PERSONS", 0, "1 or more"),
        ("WORKERS", 0, "1 or more"),
        ("MAX_PHOTOS", 0, "MIN_PHOTOS = 1 or more"),
        ("IMAGE_SIDE", 8, "32 px or more"),
        ("SEVERITY_RANGE", (0.3, 1.2), "(lowest, highest) within 0..1"),
    ],
)
def test_a_constant_out_of_range_stops_before_the_first_file(script, constant, value, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "OUT_DIR", tmp_path)
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError, match="^" + re.escape(f"{constant} = {value}: expected {expected}")):
        script.main()
    assert not list(tmp_path.iterdir())


def test_the_contact_sheet_has_a_row_per_person_and_leaves_missing_photos_white(tree, tmp_path):
    folders = [tmp_path / "person_0001", tmp_path / "person_0002"]
    for number, folder in enumerate(folders, 1):
        sample_faces.write_person(folder, number, dataclasses.replace(SETTINGS, min_photos=number, max_photos=number))
    sheet = np.asarray(contact_sheet(folders, photos=2, cell=40))
    rows = sheet[-80:].reshape(2, 40, 2 + len(DISTORTIONS), 40, 3)
    assert (rows[0, :, 1] == 255).all() and rows[1, :, 1].std() > 10  # person 1 has one photo only
    assert (tree / "sample_faces.png").stat().st_size < 400_000


def test_photos_of_one_person_are_closer_in_the_face_than_those_of_different_persons():
    crops = np.array([[drawn(p, k)[24:72, 24:72] for k in range(1, 5)] for p in range(1, 13)])
    crops /= crops.mean((2, 3, 4), keepdims=True)  # brightness belongs to the photo, not to the person
    flat = crops.reshape(12, 4, -1)
    gaps = np.abs(flat[:, None, :, None] - flat[None, :, None]).mean(-1)  # (person, person, photo, photo)
    same = gaps[np.arange(12), np.arange(12)][:, ~np.eye(4, dtype=bool)].mean()
    assert 0 < same < 0.75 * gaps[~np.eye(12, dtype=bool)].mean()


def test_the_background_says_nothing_about_the_person():
    strips = np.array([[drawn(p, k)[:48, :8].mean((0, 1)) for k in range(1, 5)] for p in range(1, 13)])
    # Over persons against over photos of one person: about 1 / sqrt(4 photos) for independent draws.
    assert strips.mean(1).std(0).mean() < 0.8 * strips.std(1).mean()


def test_the_face_spans_about_half_of_the_frame_in_width_and_height():
    generator = np.random.default_rng(0)
    sizes = []
    for number in range(1, 21):
        identity = random_identity(np.random.default_rng((0, number)))
        photo = face_identity.random_photo(generator)
        painter = face_drawing.Painter(Image.new("RGB", (100, 100)), photo, identity.head_width)
        left, top, right, bottom = painter.mask(face_drawing.head_outline(identity, photo)).getbbox()
        hairline = top + 0.4 / 2.4 * (bottom - top)  # skull -1.3, hairline -0.9, chin 1.05
        sizes.append((right - left, bottom - hairline))
        assert abs((left + right) / 2 - 50) < 8 and abs((hairline + bottom) / 2 - 50) < 8
    assert np.mean(sizes, axis=0) == pytest.approx((48, 52), abs=6)


def test_a_photo_looks_the_same_at_another_size():
    assert np.abs(drawn(3, 1, 100) - drawn(3, 1, 200).reshape(100, 2, 100, 2, 3).mean((1, 3))).mean() < 4


def test_every_style_can_be_drawn_and_changes_the_picture():
    identity = random_identity(np.random.default_rng((0, 3)))
    for styled in (
        [dataclasses.replace(identity, hair_style=style) for style in face_identity.HAIR_STYLES],
        [dataclasses.replace(identity, beard=style) for style in face_identity.BEARDS],
        [dataclasses.replace(identity, glasses=style) for style in face_identity.GLASSES],
    ):
        faces = {draw_face(one, np.random.default_rng(0), 64).tobytes() for one in styled}
        assert len(faces) == len(set(styled))
