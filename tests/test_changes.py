"""What has changed between a folder of persons and the gallery of its photos."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from changes import Photo, find_changes
from datasets import Person
from enrolment import empty_gallery, enroll, names_of
from gallery import Gallery

E_ACUTE, E_AND_ACCENT = "Jos\u00e9", "Jose\u0301"  # one letter in two forms
PHOTOS = {"ann/1": b"a", "ann/2": b"bb", "bob/1": b"ccc"}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with people/ of ann (two photos) and bob."""
    monkeypatch.chdir(tmp_path)
    for name, content in PHOTOS.items():
        write(f"people/{name}.png", content)
    return tmp_path


def write(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def persons(folder: str = "people") -> list[Person]:
    folders = sorted(path for path in Path(folder).iterdir() if any(path.iterdir()))
    return [Person(path.name, clean=tuple(sorted(path.iterdir())), distorted=()) for path in folders]


def add(gallery: Gallery | None, photos: list[Photo]) -> Gallery:
    """`gallery` with `photos`, each at an angle of its own."""
    gallery = gallery or empty_gallery(2, template="mean", made_by={}, rated=False, wide=False)
    angles = [len(gallery.paths) + number for number in range(len(photos))]
    return enroll(
        gallery,
        torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles]),
        persons=[photo.person for photo in photos],
        paths=[photo.path for photo in photos],
        digests=[photo.digest for photo in photos],
    )


@pytest.fixture
def enrolled(here) -> Gallery:
    return add(None, find_changes(None, persons()).new)


def names(photos: list[Photo]) -> list[str]:
    return [f"{photo.person}/{photo.path.name}" for photo in photos]


def places(gallery: Gallery) -> list[str]:
    """name:path relative to the current folder, of each photo."""
    return [
        f"{name}:{path.relative_to(Path.cwd()).as_posix()}"
        for name, path in zip(names_of(gallery), gallery.paths, strict=True)
    ]


def assert_only(changes, **expected) -> None:
    """`changes` has what is expected, and nothing else has changed."""
    found = {"new": names(changes.new), "changed": names(changes.changed)}
    found |= {"moved": changes.moved, "copies": changes.copies, "missing": changes.missing}
    assert found == {"new": [], "changed": [], "moved": 0, "copies": 0, "missing": []} | expected


AS_ENROLLED = ["ann:people/ann/1.png", "ann:people/ann/2.png", "bob:people/bob/1.png"]


@pytest.mark.parametrize("folder", ["people", "../{here}/people", "{root}/people", "link"])
def test_nothing_has_changed_however_the_folder_is_spelt(enrolled, here, folder):
    if folder == "link":
        Path("link").symlink_to("people")
    changes = find_changes(enrolled, persons(folder.format(here=here.name, root=here)))
    if folder == "link":  # another place, of the same photos
        assert_only(changes, moved=3)
    else:
        assert_only(changes)
        assert places(changes.gallery) == AS_ENROLLED
    assert torch.equal(changes.gallery.embeddings, enrolled.embeddings)


def test_a_relative_path_is_that_of_the_folder_where_it_was_enrolled(enrolled, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write("people/ann/1.png", b"another photo of another ann")
    assert_only(find_changes(enrolled, persons()), new=["ann/1.png"])


def test_a_photo_replaced_under_its_path_has_changed_and_a_touched_one_has_not(enrolled):
    os.utime("people/ann/2.png", (0, 0))
    write("people/ann/1.png", b"A")  # of the same size
    assert_only(find_changes(enrolled, persons()), changed=["ann/1.png"])


def test_what_is_new_is_found_once(enrolled):
    write("people/ann/3.png", b"new")
    write("people/cy/1.png", b"new too")
    write("people/cy/2.png", b"new too")
    changes = find_changes(enrolled, persons())
    assert_only(changes, new=["ann/3.png", "cy/1.png"], copies=1)
    assert_only(find_changes(add(changes.gallery, changes.new), persons()), copies=1)


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_is_moved_renamed_or_copied_is_not_embedded_again(enrolled, keep):
    shutil.copytree("people", "persons")
    if not keep:
        shutil.rmtree("people")
    changes = find_changes(enrolled, persons("persons"))
    assert_only(changes, moved=3)
    assert places(changes.gallery) == [place.replace("people", "persons") for place in AS_ENROLLED]
    assert_only(find_changes(changes.gallery, persons("persons")))


def test_a_person_whose_folder_is_renamed_has_the_new_name_and_the_same_embeddings(enrolled):
    os.rename("people/ann", "people/zoe")
    changes = find_changes(enrolled, persons())
    assert_only(changes, moved=2)
    assert places(changes.gallery) == ["bob:people/bob/1.png", "zoe:people/zoe/1.png", "zoe:people/zoe/2.png"]
    assert changes.gallery.persons == ["bob", "zoe"]
    assert torch.equal(changes.gallery.embeddings, enrolled.embeddings[[2, 0, 1]])


def test_photos_that_change_places_take_their_embeddings_along(enrolled):
    for a, b in (("ann/1", "ann/2"), ("ann/1", "bob/1")):
        os.rename(f"people/{a}.png", "other")
        os.rename(f"people/{b}.png", f"people/{a}.png")
        os.rename("other", f"people/{b}.png")
    changes = find_changes(enrolled, persons())
    assert_only(changes, moved=3)
    assert places(changes.gallery) == ["ann:people/ann/2.png", "ann:people/ann/1.png", "bob:people/bob/1.png"]
    assert torch.equal(changes.gallery.embeddings, enrolled.embeddings[[0, 2, 1]])


def test_a_copy_under_another_name_is_a_new_photo(enrolled):
    shutil.copytree("people/bob", "people/cy")
    assert_only(find_changes(enrolled, persons()), new=["cy/1.png"])


def test_photos_that_are_nowhere_are_reported_and_stay(enrolled):
    shutil.rmtree("people/bob")
    os.remove("people/ann/1.png")
    changes = find_changes(enrolled, persons())
    assert_only(changes, missing=["ann", "bob"])
    assert places(changes.gallery) == AS_ENROLLED


def test_the_photos_of_another_folder_that_is_still_there_are_not_missing(enrolled):
    write("more/di/1.png", b"di")
    assert_only(find_changes(enrolled, persons("more")), new=["di/1.png"])


def test_a_gallery_without_digests_gets_them_at_the_old_places(enrolled):
    changes = find_changes(replace(enrolled, digests=[]), persons())
    assert_only(changes)
    assert changes.gallery.digests == enrolled.digests and len(set(enrolled.digests)) == 3


@pytest.mark.parametrize("before, after", [(E_ACUTE, E_AND_ACCENT), (E_AND_ACCENT, E_ACUTE)])
def test_a_name_in_the_other_unicode_form_is_the_same_person(here, before, after):
    os.rename("people/bob", f"people/{before}")
    gallery = add(None, find_changes(None, persons()).new)
    assert gallery.persons == [E_ACUTE, "ann"]
    os.rename(f"people/{before}", f"people/{after}")
    write(f"people/{after}/2.png", b"second")
    changes = find_changes(gallery, persons())
    assert_only(changes, new=[f"{E_ACUTE}/2.png"], moved=1)
    assert changes.gallery.persons == [E_ACUTE, "ann"]


def test_a_photo_that_cannot_be_read_is_not_taken_for_another(enrolled, monkeypatch):
    read = Path.read_bytes

    def denied(path: Path) -> bytes:
        if path.parent.name == "cy":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    for number in (1, 2):
        write(f"people/cy/{number}.png", b"")
    assert_only(find_changes(enrolled, persons()), new=["cy/1.png", "cy/2.png"])
