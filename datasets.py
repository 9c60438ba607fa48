"""From a folder of persons to labelled images: the scanner, and the datasets of both stages.

root/<person>/clean/*.jpg          clean photos (or directly in the person folder, as FACECOM is released)
root/<person>/distortion/*.jpg     their distorted copies, <clean stem>_<kind>.jpg
"""

import contextlib
import functools
import hashlib
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common import UserError, check_list, derived_seed, list_names, plain_name, warn_once
from folders import (
    DISTORTION,
    describe_left_out,
    distortion_kind,
    equal_files,
    find_left_out,
    is_text,
    photos_of_person,
    source_photos,
    subfolders,
)
from transforms import PhotoTransform, Transform, load_image, why_unreadable

# --- folders -> persons -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Person:
    """One person's folder; the photos of both kinds sorted by file name. name: that of the folder, in NFC.

    unreadable: clean photos that were left out, as copies of theirs are not copies of another photo.
    """

    name: str
    clean: tuple[Path, ...]
    distorted: tuple[Path, ...]
    unreadable: tuple[Path, ...] = ()

    @property
    def photos(self) -> tuple[Path, ...]:
        return self.clean + self.distorted

    @property
    def sources(self) -> list[Path | None]:
        """Of each distorted photo, the clean one that it was made from, readable or not; see source_photos."""
        return source_photos(self.distorted, self.clean + self.unreadable)


Split = Path | str | Sequence[Person]  # a folder of persons, or what `scan_persons` found there


@functools.cache
def _read_error(path: Path, size: int, mtime_ns: int) -> str | None:
    """`why_unreadable`. Size and time are the cache's key: a changed file is read again."""
    return why_unreadable(path)


def find_unreadable(paths: Sequence[Path]) -> dict[Path, str]:
    """Decode every file once; path -> reason for each one that Pillow cannot read to its end."""

    def check(path: Path) -> str | None:
        try:
            stat = path.stat()
        except OSError as error:
            return str(error)
        return _read_error(path, stat.st_size, stat.st_mtime_ns)

    # Pillow warns of odd EXIF blocks and large photos, which are readable. Ignored here, not in the threads: filters
    # belong to the process, and threads that restore them out of order would leave warnings off for good.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:  # Pillow decodes outside the GIL
        warnings.simplefilter("ignore")
        return {path: reason for path, reason in zip(paths, pool.map(check, paths), strict=True) if reason}


def scan_persons(root: Path | str, *, check_images: bool = True) -> list[Person]:
    """Persons of `root`, sorted by name: every visible sub-folder with at least one photo.

    Clean photos lie in `<person>/clean/` or directly in `<person>/`; where both hold some, `clean/` counts. Two folders
    whose names differ only in how their accents are written are one person. Files that are left out are counted by
    their reasons in a warning. With `check_images`, every file is decoded once; unreadable ones are listed in a warning
    and left out. Folders without a photo, and persons without a clean one (never enrolled, never an anchor), are
    counted in a warning. Raises UserError if `root` is not a folder, or holds no person with a readable photo.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; set DATA_DIR to the folder that holds train/ and val/")
    found: dict[str, Person] = {}
    for folder in subfolders(root):
        if not is_text(folder.name):
            continue
        direct, in_clean, distorted = photos_of_person(folder)
        name = plain_name(folder.name)
        so_far = found.get(name, Person(name, (), ()))
        found[name] = Person(
            name,
            clean=so_far.clean + tuple(path for path in in_clean or direct if is_text(path.name)),
            distorted=so_far.distorted + tuple(path for path in distorted if is_text(path.name)),
        )
    persons = [found[name] for name in sorted(found)]
    left_out = find_left_out(root, read=set(photos_of(persons)))
    if left_out:
        warn_once(describe_left_out(root, left_out))
    empty = [person.name for person in persons if not person.photos]
    if empty:
        warn_once(f"{root}: {len(empty)} folders without a photo, ignored ({list_names(empty)})")
    if check_images:
        persons = _without_unreadable(root, persons)
    persons = [person for person in persons if person.photos]
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
    bad = find_unreadable(photos_of(persons))
    if not bad:
        return persons
    listed = "\n".join(f"  {path}: {reason}" for path, reason in bad.items())
    warn_once(f"{root}: {len(bad)} unreadable images, left out; replace or delete them:\n{listed}")
    return [
        Person(
            person.name,
            clean=tuple(path for path in person.clean if path not in bad),
            distorted=tuple(path for path in person.distorted if path not in bad),
            unreadable=tuple(path for path in person.clean if path in bad),
        )
        for person in persons
    ]


def kinds_of(person: Person) -> tuple[str, ...]:
    """The kind of each distorted photo of `person`."""
    return tuple(map(distortion_kind, person.distorted, person.sources))


def persons_of(root: Split) -> list[Person]:
    """The persons of a folder, or those already scanned. Raises what `scan_persons` raises, or UserError for none."""
    if isinstance(root, (Path, str)):
        return scan_persons(root)
    folder_of(root)  # raises if no person is left
    return list(root)


def photos_of(persons: Sequence[Person]) -> list[Path]:
    """All photos of `persons`, person by person."""
    return [photo for person in persons for photo in person.photos]


def folder_of(persons: Sequence[Person]) -> Path:
    """The folder that holds the folders of `persons`, for messages. Raises UserError if none of them has a photo."""
    for person in persons:
        for photo in person.photos[:1]:
            name = plain_name(person.name)
            return next((folder.parent for folder in photo.parents if plain_name(folder.name) == name), photo.parent)
    raise UserError("no person is left; if all of them are held out, lower HOLDOUT_PERSONS and train stage 1 again")


def split_persons(persons: Sequence[Person], holdout: Collection[str]) -> tuple[list[Person], list[Person]]:
    """The persons to train on, and those named in `holdout`. Raises UserError if one of the latter is missing."""
    holdout = set(map(plain_name, holdout))
    missing = sorted(holdout - {plain_name(person.name) for person in persons})
    if missing:
        raise UserError(
            f"{folder_of(persons)}: {len(missing)} of the {len(holdout)} held-out persons have no readable photo "
            f"there, {missing[0]!r} first; bring their folders back, or train stage 1 again"
        )
    train = [person for person in persons if plain_name(person.name) not in holdout]
    return train, [person for person in persons if plain_name(person.name) in holdout]


def without_kinds(persons: Sequence[Person], kinds: Collection[str]) -> list[Person]:
    """`persons` without their distorted photos of these kinds, and without persons that have no other photo.

    Raises UserError if no person is left, or for `kinds` that are one text.
    """
    kinds = _known_kinds("SKIP_KINDS", kinds, persons)
    kept = [
        replace(p, distorted=tuple(f for f, kind in zip(p.distorted, kinds_of(p), strict=True) if kind not in kinds))
        for p in persons
    ]
    kept = [person for person in kept if person.photos]
    if not kept:
        raise UserError(f"{folder_of(persons)}: SKIP_KINDS leaves no photo to train on")
    return kept


def _known_kinds(constant: str, kinds: Collection[str], persons: Sequence[Person]) -> set[str]:
    """`kinds` as distortion_kind gives them, with a warning of each that no photo is of: it may be misspelt.

    Raises UserError for a text: of ("sunny") Python makes "sunny", whose letters would each be a kind.
    """
    if isinstance(kinds, str):
        raise UserError(f"{constant} = {kinds!r}: the comma is missing that makes it a tuple; write ({kinds!r},)")
    check_list(constant, kinds, str, "kinds")
    if not kinds:
        return set()
    found = {kind for person in persons for kind in kinds_of(person)}
    present = list_names(sorted(found), most=10) or "no distorted photos"
    for kind in kinds:
        if plain_name(kind) not in found:
            warn_once(f"{constant}: no train photo is of kind {kind!r}; there are {present}")
    return set(map(plain_name, kinds))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # whoever loads the file will report it
        return 0


def files_digest(persons: Sequence[Person]) -> str:
    """Identifies a set of files: their number, and 12 hexadecimal digits of the SHA-256 of their persons, names and
    sizes."""
    photos = [(person.name, path) for person in persons for path in person.photos]
    lines = [plain_name(f"{name}/{path.name} {_size(path)}") for name, path in photos]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return f"{len(lines)} files, {digest}"


def warn_shared_persons(train: Sequence[Person], val: Sequence[Person]) -> None:
    """Warn of what makes val figures too high or labels wrong: persons in both splits, and identical image files
    under two persons, within one split or across both."""
    val_names = {plain_name(person.name) for person in val}
    shared = [person.name for person in train if plain_name(person.name) in val_names]
    if shared:
        warn_once(
            f"{len(shared)} of {len(val)} val persons are train persons too: val then does not measure unseen persons "
            f"({list_names(shared)})"
        )
    owners = {path: plain_name(person.name) for person in [*train, *val] for path in person.photos}
    _warn_equal_files(
        [paths for paths in equal_files(list(owners)) if len({owners[path] for path in paths}) > 1],
        "images lie under more than one person; one of the names is wrong",
    )


def warn_duplicate_photos(persons: Sequence[Person]) -> None:
    """Warn of identical clean files of one person: the source photo of a query then has a double in the gallery,
    which no protocol leaves out."""
    _warn_equal_files(
        [paths for person in persons for paths in equal_files(person.clean)],
        "clean photos of one person are one file: its double then passes for another photo of the person; delete one",
    )


def _warn_equal_files(groups: list[list[Path]], what: str) -> None:
    if groups:
        listed = "\n".join("  " + " = ".join(map(str, paths[:4])) for paths in groups[:10])
        more = f"\n  and {len(groups) - 10} more" if len(groups) > 10 else ""
        warn_once(f"{len(groups)} {what}:\n{listed}{more}")


def split_holdout(persons: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` names drawn from `persons` by `seed`, sorted; the same for any order of `persons`.

    Raises UserError for a negative count, or one that leaves fewer than two persons to train on.
    """
    if count and not 0 < count <= len(persons) - 2:
        raise UserError(f"HOLDOUT_PERSONS = {count}: {len(persons)} persons are there, and two must stay in training")
    order = torch.randperm(len(persons), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(sorted(persons)[i] for i in order[:count])


# --- datasets ---------------------------------------------------------------------------------------------------------


def _load(path: Path, transform: Transform) -> Image.Image:
    """The photo at `path`, in no more pixels than `transform` needs of it where that is faster."""
    return load_image(path, transform.least) if isinstance(transform, PhotoTransform) else load_image(path)


class _SeededDataset(Dataset):
    """The random draws of an item depend on (seed, epoch, index) alone, not on the worker or on earlier draws."""

    def __init__(self, transform: Transform, seed: int):
        self.transform, self.seed = transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on between epochs

    def set_epoch(self, epoch: int) -> None:
        """Draw items for `epoch` from now on, in every worker."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple]:
        return (self[index] for index in range(len(self)))  # Python's default stops at an IndexError, and there is none

    def files(self, index: int) -> list[Path]:
        """The files that item `index` is made from in the current epoch."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _seeded(self, index: int) -> Iterator[torch.Generator]:
        """A generator for this item. torch's own, which transforms draw from, is seeded too, then restored."""
        seed = derived_seed(self.seed, int(self._epoch), index)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPU's
            yield torch.Generator().manual_seed(seed ^ 1)


class _LabelledPhotos(_SeededDataset):
    """(image (3, H, W) float32, label int) for each (path, label) of `samples`.

    Index i + n * len(self) is sample i again, with random draws of its own (see ShuffledBatches).
    """

    samples: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index % len(self)]
        with self._seeded(index):
            return self.transform(_load(path, self.transform)), label

    def files(self, index: int) -> list[Path]:
        return [self.samples[index % len(self)][0]]


class FaceClassificationDataset(_LabelledPhotos):
    """Every photo of the training persons, clean and distorted.

    Item: image (3, H, W) float32 from `transform`; label int in 0..len(persons)-1.
    `.persons` (sorted) and `.label2idx` (person -> label) are the labels that a head is trained with.
    Raises what `persons_of` raises.
    """

    def __init__(self, root: Split, transform: Transform, *, seed: int = 0):
        super().__init__(transform, seed)
        scanned = persons_of(root)
        self.persons = [person.name for person in scanned]
        self.label2idx = {name: label for label, name in enumerate(self.persons)}
        self.samples = [(path, label) for label, person in enumerate(scanned) for path in person.photos]
        lacking = [person.name for person in scanned if not person.distorted]
        if lacking:
            folder = folder_of(scanned)
            warn_once(
                f"{folder}: {len(lacking)} of {len(scanned)} persons have no distorted photo to train on "
                f"({list_names(lacking)}); expected {folder}/<person>/{DISTORTION}/*.jpg"
            )


class FaceCleanValDataset(_LabelledPhotos):
    """The clean photos of a validation split, with the labels of a training set.

    Item and root as in FaceClassificationDataset; persons, label2idx: those of the training set.
    Raises what `persons_of` raises; UserError if a person has no label, or if there is no clean photo.
    """

    def __init__(self, root: Split, persons: Sequence[str], label2idx: dict[str, int], transform: Transform):
        super().__init__(transform, seed=0)
        if set(persons) != set(label2idx):
            raise UserError("persons and label2idx hold different persons; pass both from the same training dataset")
        self.persons, self.label2idx = list(persons), dict(label2idx)
        scanned = persons_of(root)
        strangers = [person.name for person in scanned if person.name not in label2idx]
        if strangers:
            raise UserError(
                f"{folder_of(scanned)}: {len(strangers)} of {len(scanned)} persons are not among the {len(persons)} "
                f"trained ones ({list_names(strangers)}), so classification cannot name them; "
                "retrieval (build_gallery and evaluate) is the evaluation for unseen persons"
            )
        self.samples = [(path, label2idx[person.name]) for person in scanned for path in person.clean]
        if not self.samples:
            folder = folder_of(scanned)
            raise UserError(f"{folder}: no clean photo; expected {folder}/<person>/clean/*.jpg or <person>/*.jpg")


class FacePairDataset(_SeededDataset):
    """Positive pairs: each clean photo is an anchor once per epoch, paired with a distorted photo of the same person.

    Item: anchor and positive, (3, H, W) float32 each; the person's label, int in 0..len(persons)-1; the anchor's index
    in `.anchors`. Without `with_anchors` the anchor is an empty tensor, which saves half of the loading where its
    embedding is known. The negative of the triplet (Schroff et al. 2015, arXiv:1503.03832) is mined where all
    embeddings are at hand, see losses.hardest_negatives: photos drawn at random give no gradient.
    The positive is a distorted copy of the anchor (see source_photos), or of another photo of the person if the anchor
    has none. A share `clean` of the positives is the anchor itself, undistorted, and a share `on_the_fly` is
    `degraded(anchor)`: `transform` with, for example, a RandomDegradation in it. Kinds in `often` are drawn twice as
    often as others.
    Anchors without a person follow those with one: each photo of `extra` has a label of its own, len(persons) and up.
    For them, and for persons without distorted photos, all positives but the clean ones are distorted on the fly.
    Each item is mirrored with probability 0.5, both photos alike: `transform` would mirror each on its own.
    Index i + n * len(self) is anchor i again, with random draws of its own (see PersonBatches).
    root as in FaceClassificationDataset; persons without clean or without distorted photos are counted in a warning.
    Raises what `persons_of` raises; UserError if fewer than two persons have pairs, or for a share outside 0..1.
    """

    def __init__(
        self,
        root: Split,
        transform: Transform,
        *,
        with_anchors: bool = True,
        extra: Sequence[Path] = (),
        clean: float = 0.0,
        on_the_fly: float = 0.0,
        degraded: Transform | None = None,
        often: Collection[str] = (),
        seed: int = 0,
    ):
        super().__init__(transform, seed)
        if not (clean >= 0 and on_the_fly >= 0 and clean + on_the_fly <= 1):
            raise UserError(f"CLEAN = {clean}, DISTORT = {on_the_fly}: expected shares in 0..1 whose sum is at most 1")
        if (on_the_fly or extra) and degraded is None:
            raise UserError(f"DISTORT = {on_the_fly}: photos are to be distorted on the fly, but `degraded` is None")
        self.with_anchors = with_anchors
        self.clean, self.on_the_fly, self.degraded = clean, on_the_fly, degraded
        scanned = persons_of(root)
        self.persons = [person.name for person in scanned]
        often = _known_kinds("OFTEN", often, scanned)
        self.anchors: list[tuple[Path, int]] = []  # (path, label)
        self._positives: list[tuple[Path, ...]] = []  # of each anchor
        for label, person in enumerate(scanned):
            if degraded is None and not person.distorted:
                continue
            # What is listed twice is drawn twice as often.
            sources = dict(zip(person.distorted, person.sources, strict=True))
            distorted = person.distorted + tuple(
                path for path in sources if distortion_kind(path, sources[path]) in often
            )
            copies: dict[Path | None, list[Path]] = {}
            for path in distorted:
                copies.setdefault(sources[path], []).append(path)
            for photo in person.clean:
                self.anchors.append((photo, label))
                self._positives.append(tuple(copies.get(photo, distorted)))
        self._check_pairs(scanned)
        for label, photo in enumerate(extra, start=len(scanned)):
            self.anchors.append((photo, label))
            self._positives.append(())

    def _check_pairs(self, scanned: Sequence[Person]) -> None:
        """Raises UserError for fewer than two persons with pairs; warns of those without, or without a file of one."""
        paired = {label for _, label in self.anchors}
        unpaired = [person.name for label, person in enumerate(scanned) if label not in paired]
        on_the_fly = [scanned[label].name for label in sorted(paired) if not scanned[label].distorted]
        needed, lacked = "clean", "clean"
        if self.degraded is None:
            needed, lacked = "both clean and distorted", "clean or distorted"
        if len(paired) < 2:
            raise UserError(
                f"{folder_of(scanned)}: training on pairs needs two persons with {needed} photos, "
                f"found {len(paired)} among {len(scanned)}"
            )
        if unpaired:
            warn_once(
                f"{folder_of(scanned)}: {len(unpaired)} of {len(scanned)} persons lack {lacked} photos "
                f"and give no pair ({list_names(unpaired)})"
            )
        if on_the_fly:
            warn_once(
                f"{folder_of(scanned)}: {len(on_the_fly)} of {len(scanned)} persons have no distorted photo; their "
                f"clean photos are distorted on the fly instead ({list_names(on_the_fly)})"
            )

    def __len__(self) -> int:
        return len(self.anchors)

    def _draw(self, index: int, generator: torch.Generator) -> tuple[Path, Path | None, bool]:
        """The anchor's path; the positive's, or None for the anchor distorted on the fly; whether both are mirrored."""
        anchor, positives = self.anchors[index % len(self)][0], self._positives[index % len(self)]
        place = int(torch.randint(max(1, len(positives)), (), generator=generator))
        positive = positives[place] if positives else None
        which = torch.rand((), generator=generator).item()
        if which < self.clean:
            positive = anchor
        elif which < self.clean + self.on_the_fly:
            positive = None
        return anchor, positive, torch.rand((), generator=generator).item() < 0.5

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int, int]:
        with self._seeded(index) as generator:
            anchor, positive, mirrored = self._draw(index, generator)
            photo = _load(anchor, self.transform) if self.with_anchors or positive is None else None
            clean = self.transform(photo) if self.with_anchors else torch.empty(0)
            image = self.degraded(photo) if positive is None else self.transform(_load(positive, self.transform))
            if mirrored:
                clean, image = clean.flip(-1), image.flip(-1)
        return clean, image, self.anchors[index % len(self)][1], index % len(self)

    def files(self, index: int) -> list[Path]:
        with self._seeded(index) as generator:
            anchor, positive, _ = self._draw(index, generator)
        return [anchor, positive or anchor]


class PhotoList(Dataset):
    """Images (3, H, W) float32 of `paths`, in their order, for embedding."""

    def __init__(self, paths: Sequence[Path], transform: Transform):
        self.paths, self.transform = list(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(_load(self.paths[index], self.transform))
