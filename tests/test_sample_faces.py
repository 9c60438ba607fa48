import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from distortions import DISTORTIONS
from tools import face_drawing, face_identity, sample_faces
from tools.face_drawing import draw_face
from tools.face_identity import random_identity
from tools.sample_faces import contact_sheet

SMALL = {"IMAGE_SIDE": 64, "TRAIN_PERSONS": 2, "VAL_PERSONS": 1, "MIN_PHOTOS": 1, "MAX_PHOTOS": 3, "SHEET_CELL": 32}


def run(monkeypatch, folder, **constants):
    for name, value in (SMALL | {"OUT_DIR": folder} | constants).items():
        monkeypatch.setattr(sample_faces, name, value)
    sample_faces.main()
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """One small run: its folder and its photos, path -> bytes."""
    folder = tmp_path_factory.mktemp("sample") / "Task_B"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run(monkeypatch, folder)


@functools.lru_cache
def person(number, photo, side=96):
    identity = random_identity(np.random.default_rng((0, number)))
    return draw_face(identity, np.random.default_rng((0, number, photo)), side)


def test_each_clean_photo_has_its_seven_distorted_ones_beside_it(tree):
    _, files = tree
    clean = [path for path in files if "/clean/" in path]
    expected = set(clean)
    for path in clean:
        match = re.fullmatch(r"(train|val)/(person_\d{4})/clean/(\2_\d{4})\.jpg", path)
        assert match, path
        split, name, stem = match.groups()
        expected |= {f"{split}/{name}/distortion/{stem}_{kind}.jpg" for kind in DISTORTIONS}
    assert set(files) == expected


def test_train_and_val_hold_the_asked_number_of_persons_and_share_none(tree):
    folder, _ = tree
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["person_0001", "person_0002"]
    assert sorted(path.name for path in (folder / "val").iterdir()) == ["person_0003"]


def test_the_files_are_rgb_jpegs_of_the_asked_side(tree):
    folder, files = tree
    for path in files:
        with Image.open(folder / path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_the_contact_sheet_lies_next_to_the_splits_and_is_light(tree):
    folder, _ = tree
    with Image.open(folder / "sample_faces.png") as sheet:
        assert sheet.width == (3 + 7) * 32 and sheet.height >= 3 * 32
    assert (folder / "sample_faces.png").stat().st_size < 400_000


def test_the_distorted_file_shows_the_clean_photo_under_its_kind(tree):
    folder, _ = tree
    clean = np.asarray(Image.open(folder / "val/person_0003/clean/person_0003_0001.jpg"), float)
    dark = np.asarray(Image.open(folder / "val/person_0003/distortion/person_0003_0001_lowlight.jpg"), float)
    scale = (dark * clean).sum() / (clean * clean).sum()
    assert 0.5 - 0.4 * 0.7 - 0.02 < scale < 0.5 - 0.4 * 0.3 + 0.02  # SEVERITY_RANGE is 0.3..0.7
    assert np.abs(dark - scale * clean).mean() < 3


def test_the_first_photos_of_two_persons_have_different_backgrounds(tree):
    folder, _ = tree
    corners = []
    for name in ("person_0001", "person_0002"):
        with Image.open(folder / "train" / name / "clean" / f"{name}_0001.jpg") as image:
            corners.append(np.asarray(image, float)[:8, :8].mean((0, 1)))
    assert np.abs(corners[0] - corners[1]).max() > 10


def test_the_same_seed_writes_the_same_bytes_with_any_number_of_workers(tree, tmp_path, monkeypatch):
    assert run(monkeypatch, tmp_path / "again", WORKERS=1) == tree[1]


def test_another_seed_draws_other_persons(tree, tmp_path, monkeypatch):
    other = run(monkeypatch, tmp_path / "other", SEED=1)
    first = "train/person_0001/clean/person_0001_0001.jpg"
    assert other[first] != tree[1][first]


def test_a_photo_stays_when_more_persons_and_photos_are_asked_for(tree, tmp_path, monkeypatch):
    constants = {"TRAIN_PERSONS": 3, "VAL_PERSONS": 2, "MIN_PHOTOS": 4, "MAX_PHOTOS": 4}
    more = run(monkeypatch, tmp_path / "more", **constants)
    assert len(more) == 5 * 4 * 8
    by_name = {Path(path).name: content for path, content in more.items()}
    for path, content in tree[1].items():  # person 3 moved from val to train
        assert by_name[Path(path).name] == content


def test_the_number_of_photos_stays_in_its_range_and_few_is_commonest(tmp_path):
    counts = []
    for number in range(1, 31):
        folder = tmp_path / f"person_{number:04d}"
        counts.append(sample_faces.write_person((folder, number, 0, 1, 3, 32, (0.3, 0.7), 92)))
        assert len(list((folder / "clean").iterdir())) == counts[-1]
    assert set(counts) == {1, 2, 3}
    assert counts.count(1) > counts.count(2)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_filled_folder_is_refused_with_the_way_out_and_left_alone(split, tmp_path, monkeypatch):
    kept = tmp_path / split / "cy" / "cy.jpg"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{split} is not empty: delete .* or choose another OUT_DIR"):
        run(monkeypatch, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"TRAIN_PERSONS": 0}, "TRAIN_PERSONS = 0: expected 1 or more"),
        ({"VAL_PERSONS": 0}, "VAL_PERSONS = 0: expected 1 or more"),
        ({"MIN_PHOTOS": 0}, "MIN_PHOTOS = 0: expected 1 or more"),
        ({"WORKERS": 0}, "WORKERS = 0: expected 1 or more"),
        ({"MIN_PHOTOS": 5}, "MAX_PHOTOS = 3: expected MIN_PHOTOS = 5 or more"),
        ({"IMAGE_SIDE": 8}, "IMAGE_SIDE = 8: expected 32 px or more"),
        ({"SEVERITY_RANGE": (0.7, 0.3)}, "SEVERITY_RANGE = (0.7, 0.3): expected (lowest, highest) within 0..1"),
        ({"SEVERITY_RANGE": (0.3, 1.2)}, "SEVERITY_RANGE = (0.3, 1.2): expected (lowest, highest) within 0..1"),
    ],
)
def test_a_constant_out_of_range_stops_before_the_first_file(constants, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(monkeypatch, tmp_path, **constants)
    assert not list(tmp_path.iterdir())


def test_two_photos_of_one_person_differ_and_the_identity_does_not():
    first, second = (np.asarray(person(1, photo), float) for photo in (1, 2))
    assert np.abs(first - second).mean() > 10
    assert random_identity(np.random.default_rng((0, 1))) == random_identity(np.random.default_rng((0, 1)))
    assert random_identity(np.random.default_rng((0, 1))) != random_identity(np.random.default_rng((0, 2)))


def test_photos_of_one_person_are_closer_in_the_face_than_those_of_different_persons():
    persons, photos = range(1, 13), range(1, 5)
    crops = np.array([[np.asarray(person(p, k))[24:72, 24:72] for k in photos] for p in persons], float)
    crops /= crops.mean((2, 3, 4), keepdims=True)  # brightness belongs to the photo, not to the person
    flat = crops.reshape(len(persons), len(photos), -1)
    gaps = np.abs(flat[:, None, :, None] - flat[None, :, None]).mean(-1)  # (person, person, photo, photo)
    same = gaps[np.arange(12), np.arange(12)][:, ~np.eye(4, dtype=bool)].mean()
    different = gaps[~np.eye(12, dtype=bool)].mean()
    assert same < 0.75 * different


def test_the_background_says_nothing_about_the_person():
    persons, photos = range(1, 13), range(1, 5)
    strips = np.array([[np.asarray(person(p, k))[:48, :8].mean((0, 1)) for k in photos] for p in persons], float)
    within = strips.std(1).mean()  # over the photos of one person
    between = strips.mean(1).std(0).mean()  # over persons; independent draws: within / sqrt(4 photos), about
    assert between < 0.8 * within


def test_the_skin_of_the_face_fills_the_middle_of_the_frame():
    for number in range(1, 9):
        identity = random_identity(np.random.default_rng((0, number)))
        plain = dataclasses.replace(identity, beard="none", glasses="none", hair_style="bald", freckles=0, moles=())
        pixels = np.asarray(draw_face(plain, np.random.default_rng((0, number, 1)), 100), float)
        share = pixels / pixels.sum(2, keepdims=True)
        tone = share[60:66, 38:62].reshape(-1, 3).mean(0)  # cheeks and nose
        skin = np.abs(share - tone).sum(2) < 0.12
        assert skin[30:72, 36:64].mean() > 0.75, "forehead to mouth is skin"
        assert skin[:10].mean() < 0.5 and skin[:50, :12].mean() < 0.5, "the rim is background"


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
    small, large = person(3, 1, 100), person(3, 1, 200).resize((100, 100), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(large, float)).mean() < 4


def test_every_style_can_be_drawn_and_changes_the_picture():
    identity = random_identity(np.random.default_rng((0, 3)))
    for name, styles in (
        ("hair_style", face_identity.HAIR_STYLES),
        ("beard", face_identity.BEARDS),
        ("glasses", face_identity.GLASSES),
    ):
        faces = {
            draw_face(dataclasses.replace(identity, **{name: style}), np.random.default_rng(0), 64).tobytes()
            for style in styles
        }
        assert len(faces) == len(set(styles)), name


def test_the_contact_sheet_has_a_row_per_person_and_leaves_missing_photos_white(tmp_path):
    folders = [tmp_path / "person_0001", tmp_path / "person_0002"]
    for number, folder in enumerate(folders, 1):
        sample_faces.write_person((folder, number, 0, number, number, 32, (0.5, 0.5), 92))
    sheet = np.asarray(contact_sheet(folders, 2, 40))
    assert sheet.shape[1] == (2 + 7) * 40
    rows = sheet[-80:].reshape(2, 40, 9, 40, 3)
    assert (rows[0, :, 1] == 255).all(), "person 1 has one photo only"
    assert rows[1, :, 1].std() > 10
