"""task_b_from_lfw.py: its three trees and its extra faces, from a fake LFW, and the photo list that it comes with."""

import re

import pytest
from conftest import files_in, made_with_seeds, write_photo

from common import UserError
from datasets import scan_persons
from distortions import DISTORTIONS
from folders import distortion_kind, source_photos
from tools import task_b_from_lfw

LIST = """# a comment
facecom train Ann_Lee_0001
facecom train Ann_Lee_0002
facecom train Bo_0001
facecom val Cy_de_la_Cruz_0003
cross val Di-Ming_0004
cross val Di-Ming_0002
cross val Di-Ming_0009
extra all Fay_0002
"""
STEMS = [line.split()[2] for line in LIST.splitlines()[1:]]
DEFAULT_LIST = task_b_from_lfw.PHOTO_LIST


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The tool on a fake LFW, in which each person has a photo beyond the list."""
    beyond = ["Ann_Lee_0003", "Bo_0002", "Cy_de_la_Cruz_0001", "Di-Ming_0001", "Ed_0001", "Fay_0001"]
    for number, stem in enumerate([*STEMS, *beyond]):
        person = stem.rpartition("_")[0]
        write_photo(tmp_path / "lfw" / person / f"{stem}.jpg", (90, 120, 150), seed=number)
    (tmp_path / "list.txt").write_text(LIST)
    monkeypatch.setattr(task_b_from_lfw, "PHOTO_LIST", tmp_path / "list.txt")
    monkeypatch.setattr(task_b_from_lfw, "LFW_DIR", tmp_path / "lfw")
    monkeypatch.setattr(task_b_from_lfw, "OUT_DIR", tmp_path / "made" / "trees")
    return task_b_from_lfw


def copies(folder: str, stem: str) -> set[str]:
    return {f"{folder}/distortion/{stem}_{kind}.jpg" for kind in DISTORTIONS}


def test_trees_and_extra_faces_hold_the_listed_photos_alone_and_undistorted_ones_byte_for_byte(script, capsys):
    script.main()
    train = {"train/Ann_Lee/clean/Ann_Lee_0001.jpg", "train/Ann_Lee/clean/Ann_Lee_0002.jpg"}
    train |= {"train/Bo/clean/Bo_0001.jpg"} | copies("train/Bo", "Bo_0001")
    train |= copies("train/Ann_Lee", "Ann_Lee_0001") | copies("train/Ann_Lee", "Ann_Lee_0002")
    cy, di = "val/Cy_de_la_Cruz", "val/Di-Ming"
    facecom = train | {f"{cy}/clean/Cy_de_la_Cruz_0003.jpg"} | copies(cy, "Cy_de_la_Cruz_0003")
    gallery = {f"{di}/clean/Di-Ming_0002.jpg"}  # the first listed photo, though LFW has a 0001
    cross = train | gallery | copies(di, "Di-Ming_0004") | copies(di, "Di-Ming_0009")
    clean = gallery | {f"{di}/distortion/Di-Ming_0004_clean.jpg", f"{di}/distortion/Di-Ming_0009_clean.jpg"}
    assert set(files_in(script.OUT_DIR / "facecom")) == facecom
    assert files_in(script.OUT_DIR / "facecom" / "train") == files_in(script.OUT_DIR / "cross" / "train")
    assert set(files_in(script.OUT_DIR / "cross")) == cross
    assert set(files_in(script.OUT_DIR / "clean")) == clean
    assert set(files_in(script.OUT_DIR / "extra")) == {"Fay_0002.jpg"}
    lfw = {path.stem: path.read_bytes() for path in script.LFW_DIR.rglob("*.jpg")}
    undistorted = ("*/*/*/clean/*.jpg", "clean/*/*/*/*.jpg", "extra/*.jpg")
    for path in {path for pattern in undistorted for path in script.OUT_DIR.glob(pattern)}:
        assert path.read_bytes() == lfw[path.stem.removesuffix("_clean")]
    assert sorted(path.name for path in script.OUT_DIR.iterdir()) == ["clean", "cross", "extra", "facecom"]
    assert [path.name for path in script.OUT_DIR.parent.iterdir()] == ["trees"]  # no temporary folder stays
    out = capsys.readouterr().out
    assert f"train: 2 persons, 3 clean photos, {3 * len(DISTORTIONS)} in distortion/" in out
    assert "val: 1 persons, 1 clean photos, 2 in distortion/" in out and "extra: 1 photos\n" in out
    assert f"set EXTRA_FACES of train_stage2.py to {script.OUT_DIR / 'extra'}: " in out


def test_the_scanner_reads_every_tree_and_finds_the_sources_of_facecom_alone(script):
    script.main()
    for tree, split, names, has_source in (
        ("cross", "train", ["Ann_Lee", "Bo"], True),
        ("facecom", "val", ["Cy_de_la_Cruz"], True),
        ("cross", "val", ["Di-Ming"], False),
        ("clean", "val", ["Di-Ming"], False),
    ):
        persons = scan_persons(script.OUT_DIR / tree / split)
        assert [person.name for person in persons] == names
        for person in persons:
            for path in person.distorted:
                stem, kind = path.stem.rsplit("_", 1)
                (source,) = source_photos([path], person.clean)
                assert source == (person.clean[0].with_name(f"{stem}.jpg") if has_source else None)
                assert distortion_kind(path) == kind
                assert kind == "clean" if tree == "clean" else kind in DISTORTIONS


def test_the_same_seed_writes_the_same_files_and_another_one_others(script, monkeypatch, tmp_path):
    first, again, other = made_with_seeds(script, monkeypatch, tmp_path / "runs", seeds=(0, 0, 1))
    assert first == again
    differ = {name.rpartition("_")[2] for name in first if first[name] != other[name]}
    assert differ == {f"{kind}.jpg" for kind in DISTORTIONS if "Deterministic." not in DISTORTIONS[kind].__doc__}


def test_no_copy_depends_on_the_other_photos_of_the_list(script, monkeypatch, tmp_path):
    script.main()
    whole = files_in(script.OUT_DIR)
    shorter = "facecom train Bo_0001\nfacecom val Cy_de_la_Cruz_0003\ncross val Di-Ming_0009\ncross val Di-Ming_0002\n"
    shorter += "extra all Fay_0002\n"
    script.PHOTO_LIST.write_text(shorter)
    monkeypatch.setattr(script, "OUT_DIR", tmp_path / "fewer")
    script.main()
    fewer = files_in(script.OUT_DIR)
    assert fewer and fewer.items() < whole.items()


def test_missing_photos_are_counted_and_the_first_three_named(script):
    for stem in ("Ann_Lee_0002", "Bo_0001", "Di-Ming_0002", "Di-Ming_0004"):
        (script.LFW_DIR / stem.rpartition("_")[0] / f"{stem}.jpg").unlink()
    named = r"4 of 8 photos are missing \(Ann_Lee_0002.jpg, Bo_0001.jpg, Di-Ming_0002.jpg and 1 more\).*set LFW_DIR to"
    with pytest.raises(UserError, match=f"^{re.escape(str(script.LFW_DIR))}: {named}"):
        script.main()
    assert not script.OUT_DIR.exists()


def test_a_photo_that_cannot_be_read_leaves_no_half_tree(script):
    photo = script.LFW_DIR / "Bo" / "Bo_0001.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    with pytest.raises(UserError, match=r"Bo_0001.jpg: cannot be read"):
        script.main()
    assert not list(script.OUT_DIR.parent.iterdir())


def test_an_existing_folder_is_never_written_into(script):
    script.OUT_DIR.mkdir(parents=True)
    with pytest.raises(UserError, match="trees: already exists; delete it, or give OUT_DIR another name"):
        script.main()
    assert not list(script.OUT_DIR.iterdir())


@pytest.mark.parametrize(
    "constant, value", [("SEVERITY", 1.1), ("SEVERITY", "mild"), ("JPEG_QUALITY", 0), ("SEED", "one")]
)
def test_a_constant_out_of_range_is_refused_before_anything_is_written(script, monkeypatch, constant, value):
    monkeypatch.setattr(script, constant, value)
    with pytest.raises(UserError, match=f"^{constant} = {value!r}: expected a (whole )?number, "):
        script.main()
    assert not script.OUT_DIR.exists()


def test_lfw_is_downloaded_once_to_where_scikit_learn_keeps_it(script, monkeypatch, tmp_path):
    def fetch(min_faces_per_person):
        (tmp_path / "home" / "lfw_home").mkdir(parents=True)
        (tmp_path / "lfw").rename(tmp_path / "home" / "lfw_home" / "lfw_funneled")  # fails the second time

    monkeypatch.setattr(script, "LFW_DIR", None)
    monkeypatch.setattr(script, "get_data_home", lambda: str(tmp_path / "home"))
    monkeypatch.setattr(script, "fetch_lfw_people", fetch)
    first, second = made_with_seeds(script, monkeypatch, tmp_path / "runs", seeds=(0, 0))
    assert first == second and "facecom/train/Bo/clean/Bo_0001.jpg" in first


def test_without_internet_the_archive_and_the_constant_are_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "LFW_DIR", None)
    monkeypatch.setattr(script, "get_data_home", lambda: str(tmp_path / "home"))
    monkeypatch.setattr(script, "fetch_lfw_people", lambda min_faces_per_person: (tmp_path / "nothing").read_bytes())
    with pytest.raises(UserError, match=r"\(.*No such file.*\); fetch lfw-funneled.tgz from https://.* set LFW_DIR to"):
        script.main()
    assert not script.OUT_DIR.exists()


def test_the_list_has_the_persons_and_photos_that_the_docstring_gives():
    listed = task_b_from_lfw.read_list(DEFAULT_LIST)
    persons = {key: {task_b_from_lfw.person_of(stem) for stem in stems} for key, stems in listed.items()}
    counts = {key: (len(persons[key]), len(set(stems)), len(stems)) for key, stems in listed.items()}
    assert counts == {
        ("facecom", "train"): (788, 1837, 1837),
        ("facecom", "val"): (222, 394, 394),
        ("cross", "val"): (100, 253, 253),
        ("extra", "all"): (2452, 3379, 3379),
    }
    assert len(set.union(*persons.values())) == 788 + 222 + 100 + 2452  # nobody is in two of them
    assert all(re.fullmatch(r"[A-Za-z_-]+_\d{4}", stem) for stems in listed.values() for stem in stems)
    for person in persons["cross", "val"]:
        assert sum(task_b_from_lfw.person_of(stem) == person for stem in listed["cross", "val"]) >= 2
    for phrase in (
        "788 persons, 1,837 photos",
        "222 other persons, 394 photos",
        "100 persons",
        "253 photos",
        "3,379 photos of 2,452 persons",
    ):
        assert phrase in task_b_from_lfw.__doc__
