"""Which files are photos, which clean photo a copy is of, and names that differ only in how they are written."""

import os
import sys
import time
from pathlib import Path

import pytest
from conftest import MeanColour, as_float, write_plain
from torchvision.transforms.functional import pil_to_tensor

from common import UserError
from datasets import (
    FacePairDataset,
    Person,
    files_digest,
    folder_of,
    kinds_of,
    scan_persons,
    split_persons,
    warn_shared_persons,
    without_kinds,
)
from degradations import families_without
from folders import distortion_kind, photos_below, source_photos, walk
from framing import sources_of
from gallery import embed_split
from validation import thinned

TYPED, OF_A_MAC = "Jos\u00e9", "Jose\u0301"  # é as one letter, and as e with an accent
NO_UTF8 = os.fsdecode(b"Jos\xe9")  # out of a Latin-1 zip
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse or change such names")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_the_source_of_a_distorted_photo_is_the_clean_photo_it_is_named_after():
    clean = [Path("c") / name for name in ("a_1.jpg", "a_10.jpg", "b.png", "b_smiling.jpg")]
    sources = {
        "a_1_blurred.jpg": "a_1.jpg",
        "a_10_blurred.jpg": "a_10.jpg",
        "a_1_very_foggy.png": "a_1.jpg",
        "b.jpg": "b.png",
        "b_smiling_left_foggy.jpg": "b_smiling.jpg",  # not b.png: the longest name
        **dict.fromkeys(("a_100_blurred.jpg", "a.jpg", "bb_foggy.jpg")),  # None
    }
    for photos in (clean, clean[::-1]):
        found = {name: source_photos([Path("d") / name], photos)[0] for name in sources}
        assert {name: photo and photo.name for name, photo in found.items()} == sources
        assert source_photos([Path("d") / name for name in sources], photos) == list(found.values())


@pytest.mark.parametrize(
    "clean, copy, source",
    [
        (["a.jpg", "a.png"], "a_foggy.png", "a.png"),
        (["a.jpg", "a.png"], "a_foggy.JPG", "a.jpg"),
        (["a.jpg", "a.JPG"], "a_foggy.JPG", "a.JPG"),
        (["a.jpg", "a.png"], "a_foggy.bmp", None),  # no telling: better none than another photo
        ([f"{TYPED}.png"], f"{OF_A_MAC}_foggy.png", f"{TYPED}.png"),
        ([f"{TYPED}.png", f"{OF_A_MAC}.png"], f"{OF_A_MAC}_foggy.png", f"{OF_A_MAC}.png"),
    ],
)
def test_of_clean_photos_with_one_stem_the_one_most_like_the_copy_is_its_source(clean, copy, source):
    for names in (clean, clean[::-1]):
        (found,) = source_photos([Path("d") / copy], [Path("c") / name for name in names])
        assert (found and found.name) == source


def test_the_sources_of_a_person_with_1500_photos_take_less_than_a_second():
    clean = [Path(f"ann/clean/ann_lee_{number:04d}.jpg") for number in range(1500)]
    kinds = ("blurred", "foggy", "lowlight", "noisy", "rainy", "resized", "sunny")
    distorted = [Path(f"ann/distortion/{photo.stem}_{kind}.jpg") for photo in clean for kind in kinds]
    persons = [Person(name, tuple(clean), tuple(distorted)) for name in ("ann", "bob")]
    start = time.process_time()
    assert source_photos(distorted, clean) == [photo for photo in clean for _ in kinds]
    pairs = FacePairDataset(persons, transform=None)
    assert time.process_time() - start < 1
    assert pairs._positives[1] == tuple(distorted[7:14])


# --- names ------------------------------------------------------------------------------------------------------------


@on_linux
def test_a_name_typed_and_the_same_name_from_a_mac_are_one_person(tmp_path):
    first = write_plain(tmp_path / "train" / TYPED / "clean" / "1.png")
    copy = write_plain(tmp_path / "train" / OF_A_MAC / "distortion" / "1_foggy.png")
    second = write_plain(tmp_path / "train" / OF_A_MAC / "2.png")
    [person] = scan_persons(tmp_path / "train")
    assert (person.name, set(person.clean), person.distorted) == (TYPED, {first, second}, (copy,))
    assert source_photos(person.distorted, person.clean) == [first]
    assert folder_of([Person(TYPED, (second,), ())]) == tmp_path / "train"


def test_names_of_persons_and_kinds_are_compared_however_their_accents_are_written(tmp_path, caplog):
    copies = {name: write_plain(tmp_path / name / "1_br\u00fbm\u00e9.png") for name in (TYPED, OF_A_MAC)}
    typed, of_a_mac = (Person(name, (), (copy,)) for name, copy in copies.items())
    ann = Person("ann", (Path("t/ann/1.png"),), (Path("t/ann/1_bru\u0302me\u0301.png"),))
    assert split_persons([typed, ann], [OF_A_MAC]) == ([ann], [typed])
    assert split_persons([of_a_mac, ann], [TYPED]) == ([ann], [of_a_mac])
    assert files_digest([typed]) == files_digest([of_a_mac])
    assert distortion_kind(ann.distorted[0]) == distortion_kind(typed.distorted[0])
    assert without_kinds([ann], ("bru\u0302m\u00e9",)) == [Person("ann", ann.clean, ())]
    assert caplog.messages == []
    warn_shared_persons([Person(TYPED, (), ())], [Person(OF_A_MAC, (), ())])
    assert "1 of 1 val persons are train persons too" in caplog.text


@on_linux
def test_files_and_folders_whose_names_are_not_utf8_are_left_out_and_counted(tmp_path, caplog):
    photo = write_plain(tmp_path / "ann/1.png")
    for name in (f"ann/{NO_UTF8}.png", f"ann/distortion/{NO_UTF8}_foggy.png", f"{NO_UTF8}/clean/1.png"):
        os.renames(write_plain(tmp_path / "other.png"), tmp_path / name)
    assert scan_persons(tmp_path) == [Person("ann", (photo,), ())]
    expected = "3 files left out: 3 with a name or folder that is not UTF-8, to be renamed (Jos\\udce9/clean/1.png, "
    assert caplog.messages == [f"{tmp_path}: {expected}ann/Jos\\udce9.png and 1 more)"]
    assert files_digest([Person("ann", (photo,), ())]).startswith("1 files, ")


@pytest.mark.parametrize("odd", [None, 3, ("noisy", None)])
def test_kinds_that_are_no_list_of_texts_are_refused(task_b, odd):
    with pytest.raises(UserError, match=r"^OFTEN = .*: expected a list of kinds"):
        FacePairDataset(task_b / "train", transform=None, often=odd)
    with pytest.raises(UserError, match=r"^SKIP_KINDS = .*: expected a list of kinds"):
        without_kinds(scan_persons(task_b / "train"), odd)
    with pytest.raises(UserError, match=r"^WITHOUT_FAMILIES = .*: expected names of families"):
        families_without(odd)


@pytest.mark.parametrize("constant", ["SKIP_KINDS", "OFTEN"])
def test_kinds_in_brackets_without_a_comma_are_refused(task_b, constant):
    with pytest.raises(UserError, match=rf"^{constant} = 'noisy': the comma is missing .*; write \('noisy',\)$"):
        if constant == "OFTEN":
            FacePairDataset(task_b / "train", transform=None, often=("noisy"))
        else:
            without_kinds(scan_persons(task_b / "train"), ("noisy"))


# --- trees ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights of their own")
def test_links_lead_elsewhere_but_never_in_circles(tmp_path):
    root = tmp_path / "photos"
    for name in ("photos/b/1.png", "photos/b/c/2.png", "elsewhere/3.png", "elsewhere/deep/4.png"):
        write_plain(tmp_path / name)
    links = {"photos/b/c/loop": "photos", "photos/a": "photos/b", "photos/up": ".", "elsewhere/back": "photos"}
    links |= {"photos/x": "elsewhere", "photos/y": "elsewhere", "elsewhere/self": "elsewhere"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target, target_is_directory=True)
    for name in ("gone", "gone.png", "itself"):  # the last one leads to itself
        (root / name).symlink_to(tmp_path / "nowhere" if name[0] == "g" else root / name)
    names = [folder.relative_to(root).as_posix() for folder in walk(root)]
    assert names == [".", "b", "b/c", "x", "x/deep"]
    assert [path.name for path in photos_below(root)] == ["1.png", "2.png", "3.png", "4.png"]


def test_a_folder_that_may_not_be_opened_is_reported(tmp_path, monkeypatch, caplog):
    photo, locked = write_plain(tmp_path / "ann/1.png"), tmp_path / "lost+found"
    locked.mkdir()
    scandir = os.scandir

    def refuse(folder):
        if Path(folder) == locked:
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert scan_persons(tmp_path) == [Person("ann", (photo,), ())]
    assert caplog.messages[0] == f"{locked}: left out, the folder cannot be opened (Permission denied)"


def test_copies_of_a_damaged_photo_are_not_those_of_another_with_a_shorter_name(tmp_path):
    names = ("clean/ann.png", "distortion/ann_foggy.png", "distortion/ann_2_blurred.png")
    sound, own, copy = (tmp_path / "ann" / name for name in names)
    for path in (sound, own, copy, tmp_path / "bob/clean/bob.png", tmp_path / "bob/distortion/bob_foggy.png"):
        write_plain(path, (200, 0, 0))
    (tmp_path / "ann/clean/ann_2.png").write_bytes(b"damaged")
    persons = scan_persons(tmp_path)
    assert persons[0].clean == (sound,) and persons[0].distorted == (copy, own)
    for kept in (persons, without_kinds(persons, ("foggy",)), thinned(persons, 1)):
        assert kinds_of(kept[0]) == ("blurred", "foggy")[: len(kept[0].distorted)]
        assert copy not in sources_of(kept)
    dataset = FacePairDataset(persons, pil_to_tensor)
    assert {dataset.files(n * len(dataset))[1] for n in range(50)} == {own}
    gallery, queries = embed_split(MeanColour(), persons, as_float, "cpu", template="mean")
    assert queries.kinds == ["blurred", "foggy", "foggy"]
    assert [row if row < 0 else gallery.paths[row] for row in queries.sources.tolist()[:2]] == [-1, sound]
