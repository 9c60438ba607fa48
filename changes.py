"""What has happened to the photos of a gallery since they were enrolled: which are new, changed, moved or missing."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from common import plain_name
from datasets import Person
from enrolment import absolute, enroll, names_of, select
from gallery import Gallery


@dataclass(frozen=True)
class Photo:
    """A photo of a person at an absolute path; digest: SHA-256 of its bytes, "" where they are not known.

    given: the path as it was found, for messages.
    """

    person: str
    path: Path
    digest: str
    given: Path = field(compare=False)


@dataclass(frozen=True)
class Changes:
    """gallery: the one compared, its moved photos at their new places and under their new names; None: there is none.

    new, changed: photos to embed; a changed one has other bytes than when it was enrolled, and its old embedding is
    still in the gallery. moved, copies: how many photos; a copy has the bytes of another photo of its person. missing:
    the person of each photo of the gallery that is found nowhere.
    """

    gallery: Gallery | None
    new: list[Photo]
    changed: list[Photo]
    moved: int
    copies: int
    missing: list[str]


def find_changes(gallery: Gallery | None, persons: Sequence[Person]) -> Changes:
    """Compare the clean photos of `persons` with those of a gallery, by absolute path and content.

    A photo whose bytes are found at another place has moved: under its person's name, or under another name if those
    bytes are no longer at its old place.
    """
    held, found = _held_photos(gallery), _found_photos(persons)
    now = _whereabouts(held, found)  # row -> photo
    rows = {(photo.person, photo.path): row for row, photo in enumerate(held)}
    content = {(photo.person, photo.digest) for photo in now.values()}
    new, changed, copies, at_their_place = [], [], 0, set(now.values())
    for photo in found:
        if photo in at_their_place:
            continue
        row = rows.get((photo.person, photo.path))
        if row is not None and row not in now:
            changed.append(photo)
        elif photo.digest and (photo.person, photo.digest) in content:
            copies += 1
        else:
            new.append(photo)
        content.add((photo.person, photo.digest))
    replaced = {photo.path for photo in changed}
    missing = [
        photo.person
        for row, photo in enumerate(held)
        if row not in now and photo.path not in replaced and not photo.path.exists()
    ]
    moved = sum((held[row].person, held[row].path) != (photo.person, photo.path) for row, photo in now.items())
    if gallery is not None:
        photos = [now.get(row, photo) for row, photo in enumerate(held)]
        moved_there = replace(
            gallery, paths=[photo.path for photo in photos], digests=[photo.digest for photo in photos]
        )
        gallery = select(moved_there, range(len(photos)), [photo.person for photo in photos])
    return Changes(gallery=gallery, new=new, changed=changed, moved=moved, copies=copies, missing=missing)


def _held_photos(gallery: Gallery | None) -> list[Photo]:
    if gallery is None:
        return []
    digests = gallery.digests or [""] * len(gallery.paths)
    return [
        Photo(person, absolute(path), digest, path)
        for person, path, digest in zip(names_of(gallery), gallery.paths, digests, strict=True)
    ]


def _found_photos(persons: Sequence[Person]) -> list[Photo]:
    places = [(plain_name(person.name), path) for person in persons for path in person.clean]
    with ThreadPoolExecutor() as pool:  # reading and hashing leave Python to other threads
        digests = pool.map(_digest, [path for _, path in places])
        return [
            Photo(person, absolute(path), digest, path) for (person, path), digest in zip(places, digests, strict=True)
        ]


def add_photos(gallery: Gallery, photos: Sequence[Photo], embeddings: Tensor, quality: Tensor | None) -> Gallery:
    """`gallery` with `photos`, each in place of the one of that person at that path, if there is one."""
    added = {(photo.person, photo.path) for photo in photos}
    names = names_of(gallery)
    places = zip(names, gallery.paths, strict=True)
    others = [row for row, place in enumerate(places) if place not in added]
    return enroll(
        select(gallery, others, names),
        embeddings,
        persons=[photo.person for photo in photos],
        paths=[photo.path for photo in photos],
        quality=quality,
        digests=[photo.digest for photo in photos],
    )


def content_of(persons: Sequence[Person]) -> str:
    """Identifies the photos of persons by their bytes, names and persons, wherever they lie: a SHA-256."""
    places = [
        (f"{person.name}/{part}/{path.name}", path)
        for person in persons
        for part, paths in (("clean", person.clean), ("distorted", person.distorted))
        for path in paths
    ]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, [path for _, path in places])
        lines = [f"{digest} {plain_name(place)}" for (place, _), digest in zip(places, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""  # whoever embeds it reports why


def _whereabouts(held: Sequence[Photo], found: Sequence[Photo]) -> dict[int, Photo]:
    """Index into `held` -> the photo found with the same bytes, at the same place if there is one."""
    rows = {(photo.person, photo.path): row for row, photo in enumerate(held)}
    now, elsewhere = {}, []
    for photo in found:
        row = rows.get((photo.person, photo.path))
        if row is not None and held[row].digest in ("", photo.digest):  # "": of a gallery that has no digests
            now[row] = photo
        else:
            elsewhere.append(photo)
    left: dict[str, list[int]] = {}
    for row, photo in enumerate(held):
        if photo.digest and row not in now:
            left.setdefault(photo.digest, []).append(row)
    places = {photo.path for photo in found}
    for photo in elsewhere:
        same_bytes = left.get(photo.digest, [])
        gone = [row for row in same_bytes if held[row].path in places or not held[row].path.exists()]
        own = [row for row in same_bytes if held[row].person == photo.person]
        for row in (own + gone)[:1]:
            now[row] = photo
            same_bytes.remove(row)
    return now
