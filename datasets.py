"""From a folder of persons to tensors: the scanner, the datasets of both stages and the image transforms.

root/<person>/clean/*.jpg          clean photos (or directly in the person folder, as FACECOM is released)
root/<person>/distortion/*.jpg     their distorted copies, <clean stem>_<kind>.jpg
"""

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common import UserError, derived_seed, list_names, warn_once
from transforms import READ_ERRORS, Transform, load_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
CLEAN, DISTORTION = "clean", "distortion"


# --- folders -> persons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """One folder of the tree; both lists sorted by name."""

    name: str
    clean: tuple[Path, ...]
    distorted: tuple[Path, ...]


def find_photos(folder: Path) -> list[Path]:
    """Sorted image files directly in `folder`; hidden and other files are passed over; [] if there is no folder."""
    if not folder.is_dir():
        return []
    photos = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    return sorted(photos, key=lambda path: path.name)  # paths themselves sort by other rules on Windows


@functools.cache
def _read_error(path: Path, size: int, mtime_ns: int) -> str | None:
    """Why `path` does not decode, or None. Size and time are the cache's key: a changed file is read again."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (64, 64))  # a JPEG decodes at 1/8: faster, and a truncated one fails all the same
            image.load()
    except READ_ERRORS as error:
        return str(error) or type(error).__name__
    return None


def find_unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Decode every file once; path -> reason of those that Pillow cannot read to their end."""

    def check(path: Path) -> str | None:
        try:
            stat = path.stat()
        except OSError as error:
            return str(error)
        return _read_error(path, stat.st_size, stat.st_mtime_ns)

    # An odd EXIF block or a large photo is no reason to leave it out. Ignored here, not in the threads: the filters
    # belong to the process, and threads that put them back in another order would leave them off for good.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        warnings.simplefilter("ignore")
        return {path: reason for path, reason in zip(paths, pool.map(check, paths), strict=True) if reason}


def scan_persons(root: Path | str, *, check_images: bool = True) -> list[Person]:
    """Persons of `root`, sorted by name: every visible sub-folder with at least one photo.

    Clean photos lie in `<person>/clean/` or directly in `<person>/`; where both hold some, `clean/` counts.
    With `check_images`, every file is decoded once and unreadable ones are listed and left out. Folders without a
    photo, and persons without a clean one (they cannot be enrolled or be an anchor), are told once.
    Raises FileNotFoundError if `root` is no folder, ValueError if it holds no person with a readable photo.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set DATA_DIR to the folder that holds train/ and val/")
    persons, empty, loose = [], [], []
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for folder in sorted(folders, key=lambda path: path.name):
        in_clean, direct = find_photos(folder / CLEAN), find_photos(folder)
        if in_clean and direct:
            loose.append(folder.name)
        person = Person(folder.name, tuple(in_clean or direct), tuple(find_photos(folder / DISTORTION)))
        if person.clean or person.distorted:
            persons.append(person)
        else:
            empty.append(folder.name)
    if loose:
        warn_once(f"{root}: {len(loose)} persons hold photos beside their clean/ folder, ignored ({list_names(loose)})")
    if empty:
        warn_once(f"{root}: {len(empty)} folders without a photo, ignored ({list_names(empty)})")
    if check_images:
        persons = _without_unreadable(root, persons)
    if not persons:
        raise UserError(
            f"{root}: no person with a photo; expected {root}/<person>/clean/*.jpg or {root}/<person>/*.jpg, "
            f"and {root}/<person>/distortion/*.jpg"
        )
    no_clean = [person.name for person in persons if not person.clean]
    if no_clean:
        warn_once(
            f"{root}: {len(no_clean)} persons without a clean photo, never enrolled and never an anchor; "
            f"add one to clean/ or remove the folder ({list_names(no_clean)})"
        )
    return persons


def _without_unreadable(root: Path, persons: list[Person]) -> list[Person]:
    bad = find_unreadable([path for person in persons for path in person.clean + person.distorted])
    if not bad:
        return persons
    listed = "\n".join(f"  {path}: {reason}" for path, reason in bad.items())
    warn_once(f"{root}: {len(bad)} unreadable images, left out; replace or delete them:\n{listed}")
    readable = [
        Person(p.name, tuple(f for f in p.clean if f not in bad), tuple(f for f in p.distorted if f not in bad))
        for p in persons
    ]
    return [person for person in readable if person.clean or person.distorted]


def distortion_kind(path: Path) -> str:
    """'blurred' of a_0001_blurred.jpg: what follows the stem's last underscore; 'unknown' if that is no word."""
    _, underscore, kind = path.stem.rpartition("_")
    return kind.lower() if underscore and kind and not kind.isdigit() else "unknown"


def without_kinds(persons: Sequence[Person], kinds: Collection[str]) -> list[Person]:
    """`persons` less their distorted photos of these kinds."""
    _warn_unknown_kinds("SKIP_KINDS", kinds, persons)
    return [
        Person(p.name, p.clean, tuple(path for path in p.distorted if distortion_kind(path) not in kinds))
        for p in persons
    ]


def _warn_unknown_kinds(constant: str, kinds: Collection[str], persons: Sequence[Person]) -> None:
    """A warning for each of `kinds` that no photo is of: perhaps misspelt."""
    found = {distortion_kind(path) for person in persons for path in person.distorted}
    there = list_names(sorted(found), most=10) or "no distorted ones"
    for kind in kinds:
        if kind not in found:
            warn_once(f"{constant}: no train photo is of kind {kind!r}; there are {there}")


def source_photo(distorted: Path, clean: Sequence[Path]) -> Path | None:
    """The clean photo that `distorted` was made from: the longest clean stem that prefixes its name, None if none does.

    The prefix ends at an underscore: a_10_blurred.jpg comes from a_10.jpg, never from a_1.jpg.
    """
    sources = [photo for photo in clean if distorted.stem == photo.stem or distorted.stem.startswith(photo.stem + "_")]
    return max(sources, key=lambda photo: len(photo.stem), default=None)


def _copies(person: Person) -> dict[Path, tuple[Path, ...]]:
    """The distorted copies of each clean photo of a person that has any."""
    copies: dict[Path, list[Path]] = {}
    for path in person.distorted:
        if source := source_photo(path, person.clean):
            copies.setdefault(source, []).append(path)
    return {source: tuple(paths) for source, paths in copies.items()}


def files_digest(persons: Sequence[Person]) -> str:
    """What tells one set of files from another: their number, and 12 hexadecimal digits of their names and persons."""
    names = [f"{person.name}/{path.name}" for person in persons for path in person.clean + person.distorted]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    return f"{len(names)} files, {digest}"


def warn_shared_persons(train: Sequence[Person], val: Sequence[Person]) -> None:
    """Tell what would make val figures flatter or labels wrong: persons of both splits, and one image file (by content)
    under two persons, within or across the splits."""
    val_names = {person.name for person in val}
    shared = [person.name for person in train if person.name in val_names]
    if shared:
        warn_once(
            f"{len(shared)} of {len(val)} val persons are train persons too: val then does not measure unseen persons "
            f"({list_names(shared)})"
        )
    owners: dict[Path, str] = {p: person.name for person in [*train, *val] for p in person.clean + person.distorted}
    _warn_equal_files(
        [paths for paths in equal_files(list(owners)) if len({owners[path] for path in paths}) > 1],
        "images lie under more than one person; one of the names is wrong",
    )


def warn_duplicate_photos(persons: Sequence[Person]) -> None:
    """Tell clean photos of one person that are one file: a query's own source then has a twin in the gallery, which
    no protocol leaves out."""
    _warn_equal_files(
        [paths for person in persons for paths in equal_files(person.clean)],
        "clean photos of one person are one file: its copy then passes for another photo of the person; delete one",
    )


def equal_files(paths: Sequence[Path]) -> list[list[Path]]:
    """Groups of two and more files with the same bytes."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        by_size.setdefault(path.stat().st_size, []).append(path)
    by_content: dict[bytes, list[Path]] = {}
    for of_size in by_size.values():
        if len(of_size) > 1:  # only files of one size can be equal: few need to be read
            for path in of_size:
                by_content.setdefault(hashlib.sha256(path.read_bytes()).digest(), []).append(path)
    return [equal for equal in by_content.values() if len(equal) > 1]


def _warn_equal_files(groups: list[list[Path]], what: str) -> None:
    if groups:
        listed = "\n".join("  " + " = ".join(map(str, paths[:4])) for paths in groups[:10])
        more = f"\n  and {len(groups) - 10} more" if len(groups) > 10 else ""
        warn_once(f"{len(groups)} {what}:\n{listed}{more}")


def split_holdout(persons: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` names drawn from `persons` by `seed`, sorted; the same for any order of `persons`.

    Raises ValueError unless 0 <= count and at least two persons are left to train on.
    """
    if count and not 0 < count <= len(persons) - 2:
        raise UserError(f"HOLDOUT_PERSONS = {count}: {len(persons)} persons are there, two must stay in training")
    order = torch.randperm(len(persons), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(sorted(persons)[i] for i in order[:count])


# --- photos -> tensors ------------------------------------------------------------------------------------------------


# --- datasets ---------------------------------------------------------------------------------------------------------


class _SeededDataset(Dataset):
    """What an item draws depends on (seed, epoch, index) alone: not on the worker, nor on what was drawn before."""

    def __init__(self, transform: Transform, seed: int):
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on between epochs

    def set_epoch(self, epoch: int) -> None:
        """Give the epoch that the coming items are drawn for."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple]:
        return (self[index] for index in range(len(self)))  # Python's own way ends at an IndexError: none comes

    def files(self, index: int) -> list[Path]:
        """The files that item `index` is made of, in the present epoch."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _seeded(self, index: int) -> Iterator[torch.Generator]:
        """A generator for this item; torch's own, which transforms draw from, is seeded as well and then put back."""
        seed = derived_seed(self.seed, int(self._epoch), index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's too
            yield torch.Generator().manual_seed(seed ^ 1)


class _LabelledPhotos(_SeededDataset):
    """(image (3, H, W) float32, label int) of `samples`, a list of (path, label).

    Index i + n * len(self) is sample i once more, with another crop (see ShuffledBatches).
    """

    samples: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index % len(self)]
        with self._seeded(index):
            return self.transform(load_image(path)), label

    def files(self, index: int) -> list[Path]:
        return [self.samples[index % len(self)][0]]


def _scan_for_training(
    root: Path | str, exclude: Collection[str], skip_kinds: Collection[str], check_images: bool
) -> list[Person]:
    """Scan `root` less the persons `exclude` and the kinds `skip_kinds`; ValueError if that leaves no photo."""
    scanned = [p for p in scan_persons(root, check_images=check_images) if p.name not in exclude]
    if not scanned:
        raise UserError(f"{root}: every person is held out; lower HOLDOUT_PERSONS")
    kept = [person for person in without_kinds(scanned, skip_kinds) if person.clean or person.distorted]
    if not kept:
        raise UserError(f"{root}: SKIP_KINDS leaves no photo to train on")
    return kept


class FaceClassificationDataset(_LabelledPhotos):
    """Every photo of `root`, clean and distorted, less the kinds `skip_kinds`.

    Item: image (3, H, W) float32 from `transform`; label int in 0..len(persons)-1.
    `.persons` (sorted, less `exclude`) and `.label2idx` (person -> label) are the mapping that a head is trained with.
    Raises what `scan_persons` raises; ValueError if `exclude` or `skip_kinds` leaves nothing.
    """

    def __init__(
        self,
        root: Path | str,
        transform: Transform,
        *,
        exclude: Collection[str] = (),
        skip_kinds: Collection[str] = (),
        seed: int = 0,
        check_images: bool = True,
    ):
        super().__init__(transform, seed)
        scanned = _scan_for_training(root, exclude, skip_kinds, check_images)
        self.persons = [person.name for person in scanned]
        self.label2idx = {name: label for label, name in enumerate(self.persons)}
        self.samples = [(path, self.label2idx[p.name]) for p in scanned for path in p.clean + p.distorted]


def _scan_with_mapping(
    root: Path | str, persons: Sequence[str], label2idx: dict[str, int], check_images: bool
) -> list[Person]:
    """Scan `root`; ValueError where one of its persons is not among those that the labels are for."""
    if set(persons) != set(label2idx):
        raise UserError("persons and label2idx name different persons; pass both from the same training dataset")
    scanned = scan_persons(root, check_images=check_images)
    strangers = [person.name for person in scanned if person.name not in label2idx]
    if strangers:
        raise UserError(
            f"{root}: {len(strangers)} of {len(scanned)} persons are not among the {len(persons)} trained ones "
            f"({list_names(strangers)}): classification cannot name them; "
            "retrieval (build_gallery and evaluate) is the evaluation for unseen persons"
        )
    return scanned


class FaceClassificationDatasetWithMapping(_LabelledPhotos):
    """Every photo of `root`, labelled by the mapping of a training set: for val splits of the same persons.

    Item as in FaceClassificationDataset; `persons` and `label2idx` are that dataset's.
    Raises ValueError naming a few persons of `root` that the mapping does not know.
    """

    def __init__(
        self,
        root: Path | str,
        transform: Transform,
        persons: Sequence[str],
        label2idx: dict[str, int],
        *,
        seed: int = 0,
        check_images: bool = True,
    ):
        super().__init__(transform, seed)
        self.persons, self.label2idx = list(persons), dict(label2idx)
        scanned = _scan_with_mapping(root, persons, label2idx, check_images)
        self.samples = [(path, label2idx[p.name]) for p in scanned for path in p.clean + p.distorted]


class FaceCleanValDataset(_LabelledPhotos):
    """The clean photos of `root` alone, labelled by the mapping of a training set.

    Item as in FaceClassificationDataset. Raises ValueError naming a few persons that the mapping does not know, or if
    `root` holds no clean photo.
    """

    def __init__(
        self,
        root: Path | str,
        persons: Sequence[str],
        label2idx: dict[str, int],
        transform: Transform,
        *,
        seed: int = 0,
        check_images: bool = True,
    ):
        super().__init__(transform, seed)
        self.persons, self.label2idx = list(persons), dict(label2idx)
        scanned = _scan_with_mapping(root, persons, label2idx, check_images)
        self.samples = [(path, label2idx[p.name]) for p in scanned for path in p.clean]
        if not self.samples:
            raise UserError(f"{root}: no clean photo; expected {root}/<person>/clean/*.jpg or {root}/<person>/*.jpg")


class FacePairDataset(_SeededDataset):
    """Triplets as in Schroff et al. 2015, arXiv:1503.03832: each clean photo is an anchor once per epoch.

    Item: anchor (clean), positive (a distorted photo of the same person), negative (any photo of another person),
    three (3, H, W) float32; label and negative label, int in 0..len(persons)-1. The negative's person is drawn evenly
    over persons, then the photo evenly over that person's. Positive and negative are drawn by (seed, epoch, index).
    A person without clean or without distorted photos is no anchor (told once, with the count), yet can be a negative.
    With `negatives` False an item is (anchor, positive, label, place of the anchor in `.anchors`), for negatives that
    are mined. With `copies` the positive is a copy of the anchor itself (see source_photo), of another photo of the
    person only where it has none. A share `clean` of the positives is the anchor itself, undistorted, and a share
    `anew` is `distort` of it, such as RandomDistortion, instead of a file. With `mirror` all photos of every second
    item are mirrored: `transform` alone would do it to one photo of a pair and not to the other.
    `exclude` and `skip_kinds` leave out persons and kinds of distortion; positives of the kinds `often` are drawn twice
    as often as others.
    Index i + n * len(self) is anchor i once more, with another positive (see PersonBatches).
    Raises what `scan_persons` raises; ValueError if no anchor or fewer than two persons are left.
    """

    def __init__(
        self,
        root: Path | str,
        transform: Transform,
        *,
        negatives: bool = True,
        copies: bool = False,
        clean: float = 0.0,
        anew: float = 0.0,
        distort: Callable[[Image.Image], Image.Image] | None = None,
        mirror: bool = False,
        often: Collection[str] = (),
        exclude: Collection[str] = (),
        skip_kinds: Collection[str] = (),
        seed: int = 0,
        check_images: bool = True,
    ):
        super().__init__(transform, seed)
        if not (clean >= 0 and anew >= 0 and clean + anew <= 1):
            raise UserError(f"CLEAN = {clean}, DISTORT = {anew}: expected shares of 0..1 that make 1 at most, together")
        if anew and distort is None:
            raise UserError(f"DISTORT = {anew}: photos are to be distorted anew, but no distortion is given")
        self.negatives, self.clean, self.anew, self.distort, self.mirror = negatives, clean, anew, distort, mirror
        self._scanned = _scan_for_training(root, exclude, skip_kinds, check_images)
        self.persons = [person.name for person in self._scanned]
        self.label2idx = {name: label for label, name in enumerate(self.persons)}
        self.anchors = [
            (path, label) for label, p in enumerate(self._scanned) if p.distorted for path in p.clean
        ]  # (path, label)
        _warn_unknown_kinds("OFTEN", often, self._scanned)
        drawn = [  # what is drawn twice as often stands there twice
            Person(p.name, p.clean, (*p.distorted, *(path for path in p.distorted if distortion_kind(path) in often)))
            for p in self._scanned
        ]
        copies_of = [_copies(person) if copies and person.clean else {} for person in drawn]
        self._positives = [
            copies_of[label].get(path, drawn[label].distorted) for path, label in self.anchors
        ]  # of each anchor
        unpaired = [p.name for p in self._scanned if not (p.clean and p.distorted)]
        if unpaired:
            warn_once(
                f"{root}: {len(unpaired)} of {len(self.persons)} persons lack clean or distorted photos and give no "
                f"pair; they serve as negatives only ({list_names(unpaired)})"
            )
        if not self.anchors:
            raise UserError(f"{root}: no person has both clean and distorted photos, so there is no pair to train on")
        if len(self.persons) < 2:
            raise UserError(f"{root}: a negative needs a second person, found only {self.persons[0]}")

    def __len__(self) -> int:
        return len(self.anchors)

    def draw(self, index: int, generator: torch.Generator) -> tuple[Path, Path, Path, int, int]:
        """Paths of (anchor, positive, negative), label and negative label of item `index`."""

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        anchor, label = self.anchors[index % len(self)]
        positives = self._positives[index % len(self)]
        negative_label = (label + 1 + pick(len(self.persons) - 1)) % len(self.persons)  # any but `label`, evenly
        negatives = self._scanned[negative_label].clean + self._scanned[negative_label].distorted
        return anchor, positives[pick(len(positives))], negatives[pick(len(negatives))], label, negative_label

    def _origin(self, generator: torch.Generator) -> str:
        """Where a positive comes from: "clean", "anew" or "file"."""
        which = torch.rand((), generator=generator).item()
        return "clean" if which < self.clean else "anew" if which < self.clean + self.anew else "file"

    def __getitem__(self, index: int) -> tuple:
        with self._seeded(index) as generator:
            anchor, positive, negative, label, negative_label = self.draw(index, generator)
            origin = self._origin(generator)
            mirrored = self.mirror and torch.rand((), generator=generator).item() < 0.5
            photos = [load_image(anchor), load_image(positive if origin == "file" else anchor)]
            if origin == "anew":
                photos[1] = self.distort(photos[1])
            if self.negatives:
                photos.append(load_image(negative))
            images = [self.transform(photo) for photo in photos]
            if mirrored:
                images = [image.flip(2) for image in images]
            return (*images, label, negative_label) if self.negatives else (*images, label, index % len(self))

    def files(self, index: int) -> list[Path]:
        with self._seeded(index) as generator:
            anchor, positive, negative, *_ = self.draw(index, generator)
            files = [anchor, positive if self._origin(generator) == "file" else anchor, negative]
            return files[: 2 + self.negatives]


class PhotoList(Dataset):
    """Images (3, H, W) float32 of `paths`, in their order, for embedding."""

    def __init__(self, paths: Sequence[Path], transform: Transform):
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(load_image(self.paths[index]))


# --- batches ----------------------------------------------------------------------------------------------------------
