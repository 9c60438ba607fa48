"""distort_photos.py: own photos become a Task_B tree."""

import shutil

import pytest
from conftest import files_in, made_with_seeds, write_photo

from common import UserError
from datasets import kinds_of, scan_persons
from distortions import DISTORTIONS
from tools import distort_photos

PERSONS = [f"person_{number}" for number in range(10)]


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The tool on ten persons with two photos each, of the same names; one has a bad photo of her own."""
    for number, person in enumerate(PERSONS):
        for photo in ("1.jpg", "2.png"):
            write_photo(tmp_path / "photos" / person / photo, (90, 120, 150), seed=number * 2 + len(photo))
    write_photo(tmp_path / "photos" / "person_0" / "distortion" / "1_dirty.jpg", (90, 90, 90), seed=99)
    monkeypatch.setattr(distort_photos, "IN_DIR", tmp_path / "photos")
    monkeypatch.setattr(distort_photos, "OUT_DIR", tmp_path / "made" / "Task_B")
    return distort_photos


def test_persons_are_split_and_each_clean_photo_has_a_copy_of_every_kind(script, capsys):
    script.main()
    train, val = (scan_persons(script.OUT_DIR / split) for split in ("train", "val"))
    assert (len(train), len(val)) == (8, 2)
    assert sorted(person.name for person in train + val) == PERSONS
    for person in train + val:
        for photo in person.clean:
            assert photo.read_bytes() == (script.IN_DIR / person.name / photo.name).read_bytes()
        expected = sorted([*DISTORTIONS, *DISTORTIONS] + ["dirty"] * (person.name == "person_0"))
        assert sorted(kinds_of(person)) == expected
    assert [path.name for path in script.OUT_DIR.parent.iterdir()] == ["Task_B"]  # no temporary folder stays
    out = capsys.readouterr().out
    assert "val: 2 persons, 4 clean photos, " in out and "set DATA_DIR of train_stage1.py" in out
    photos = sum(len(person.photos) for person in train)
    assert "PERSONS_PER_BATCH of train_stage2.py to at most 8, " in out
    assert f"BATCH_SIZE of train_stage1.py to at most {photos}" in out


def test_the_same_seed_writes_the_same_files_and_another_one_others(script, monkeypatch, tmp_path):
    first, again, other = made_with_seeds(script, monkeypatch, tmp_path / "runs", seeds=(0, 0, 1))
    assert first == again != other


def test_photos_of_equal_names_and_pixels_get_noise_of_their_own(script):
    for person in PERSONS[1:]:
        shutil.copy(script.IN_DIR / "person_0" / "1.jpg", script.IN_DIR / person / "1.jpg")
    script.main()
    noisy = [data for name, data in files_in(script.OUT_DIR).items() if name.endswith("/1_noisy.jpg")]
    assert len(noisy) == len(set(noisy)) == 10
    assert len({data for name, data in files_in(script.OUT_DIR).items() if name.endswith("/1_blurred.jpg")}) == 1


def test_a_bad_photo_of_ones_own_stays_where_a_copy_would_have_its_name(script):
    own = script.IN_DIR / "person_3" / "distortion" / "1_foggy.jpg"
    write_photo(own, (1, 2, 3), seed=5)
    script.main()
    [made] = script.OUT_DIR.glob("*/person_3/distortion/1_foggy.jpg")
    assert made.read_bytes() == own.read_bytes()


def test_three_persons_are_too_few(script):
    for person in PERSONS[3:]:
        shutil.rmtree(script.IN_DIR / person)
    with pytest.raises(UserError, match="3 persons with clean photos, expected 4 or more"):
        script.main()


def test_photos_whose_copies_would_have_the_same_names_are_refused(script):
    write_photo(script.IN_DIR / "person_4" / "1.PNG", (9, 9, 9), seed=1)
    with pytest.raises(UserError, match=r"person_4: the copies of 1\.PNG, 1\.jpg would have the same names; rename"):
        script.main()
    assert not script.OUT_DIR.parent.exists()


@pytest.mark.parametrize(
    "constant, value, message",
    [
        ("VAL_SHARE", 0, "VAL_SHARE = 0: expected a share of the persons"),
        ("VAL_SHARE", 0.9, "VAL_SHARE = 0.9: expected a share of the persons"),
        ("SEVERITY", "mild", "SEVERITY = 'mild': expected a number, 0..1"),
        ("IN_DIR", "nowhere", "IN_DIR = nowhere: no such folder"),
    ],
)
def test_a_constant_out_of_range_is_refused_before_anything_is_written(script, monkeypatch, constant, value, message):
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError, match=message):
        script.main()
    assert not script.OUT_DIR.parent.exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(script, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "OUT_DIR", tmp_path / "file" / "Task_B")
    monkeypatch.setattr(script, "write_copies", None)
    with pytest.raises(UserError, match="OUT_DIR"):
        script.main()
