"""From a folder of persons to tensors: the scanner, the datasets of both stages and the image transforms.

root/<person>/clean/*.jpg          clean photos (or directly in the person folder, as FACECOM is released)
root/<person>/distortion/*.jpg     their distorted copies, <clean stem>_<kind>.jpg
"""

import contextlib
import functools
import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import v2

# Without any set-up, logging prints a warning as the bare sentence on stderr: what a script's user should see.
log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in any case
CLEAN, DISTORTION = "clean", "distortion"
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on bad files

Transform = Callable[[Image.Image], Tensor]


@functools.cache
def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time it comes up in this process."""
    log.warning(message)


def derived_seed(*numbers: int) -> int:
    """A seed in 0..2^63-1 that depends on all of `numbers`, alike in every process: hash() salts strings only."""
    return hash(numbers) % 2**63


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this one is: (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


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


def _names(names: Sequence[str], most: int = 5) -> str:
    """'a, b, c and 7 more'"""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def scan_persons(root: Path | str, *, check_images: bool = True) -> list[Person]:
    """Persons of `root`, sorted by name: every visible sub-folder with at least one photo.

    Clean photos lie in `<person>/clean/` or directly in `<person>/`; where both hold some, `clean/` counts.
    With `check_images`, every file is decoded once and unreadable ones are listed and left out. Folders without a
    photo, and persons without a clean one (they cannot be enrolled or be an anchor), are told once.
    Raises FileNotFoundError if `root` is no folder, ValueError if it holds no person with a readable photo.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; set DATA_DIR to the folder that holds train/ and val/")
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
        warn_once(f"{root}: {len(loose)} persons hold photos beside their clean/ folder, ignored ({_names(loose)})")
    if empty:
        warn_once(f"{root}: {len(empty)} folders without a photo, ignored ({_names(empty)})")
    if check_images:
        persons = _without_unreadable(root, persons)
    if not persons:
        raise ValueError(
            f"{root}: no person with a photo; expected {root}/<person>/clean/*.jpg or {root}/<person>/*.jpg, "
            f"and {root}/<person>/distortion/*.jpg"
        )
    no_clean = [person.name for person in persons if not person.clean]
    if no_clean:
        warn_once(
            f"{root}: {len(no_clean)} persons without a clean photo, never enrolled and never an anchor; "
            f"add one to clean/ or remove the folder ({_names(no_clean)})"
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
    _tell_unknown("SKIP_KINDS", kinds, persons)
    return [
        Person(p.name, p.clean, tuple(path for path in p.distorted if distortion_kind(path) not in kinds))
        for p in persons
    ]


def _tell_unknown(constant: str, kinds: Collection[str], persons: Sequence[Person]) -> None:
    """A warning for each of `kinds` that no photo is of: perhaps misspelt."""
    found = {distortion_kind(path) for person in persons for path in person.distorted}
    there = _names(sorted(found), most=10) or "no distorted ones"
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


def listing(persons: Sequence[Person]) -> str:
    """What tells one set of files from another: their number, and 12 hexadecimal digits of their names and persons."""
    names = [f"{person.name}/{path.name}" for person in persons for path in person.clean + person.distorted]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    return f"{len(names)} files, {digest}"


def warn_shared(train: Sequence[Person], val: Sequence[Person]) -> None:
    """Tell what would make val figures flatter or labels wrong: persons of both splits, and one image file (by content)
    under two persons, within or across the splits."""
    val_names = {person.name for person in val}
    shared = [person.name for person in train if person.name in val_names]
    if shared:
        warn_once(
            f"{len(shared)} of {len(val)} val persons are train persons too: val then does not measure unseen persons "
            f"({_names(shared)})"
        )
    owners: dict[Path, str] = {p: person.name for person in [*train, *val] for p in person.clean + person.distorted}
    _tell_equal(
        [paths for paths in equal_files(list(owners)) if len({owners[path] for path in paths}) > 1],
        "images lie under more than one person; one of the names is wrong",
    )


def warn_twins(persons: Sequence[Person]) -> None:
    """Tell clean photos of one person that are one file: a query's own source then has a twin in the gallery, which
    no protocol leaves out."""
    _tell_equal(
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


def _tell_equal(groups: list[list[Path]], what: str) -> None:
    if groups:
        listed = "\n".join("  " + " = ".join(map(str, paths[:4])) for paths in groups[:10])
        more = f"\n  and {len(groups) - 10} more" if len(groups) > 10 else ""
        warn_once(f"{len(groups)} {what}:\n{listed}{more}")


def split_holdout(persons: Sequence[str], count: int, seed: int) -> list[str]:
    """`count` names drawn from `persons` by `seed`, sorted; the same for any order of `persons`.

    Raises ValueError unless 0 <= count and at least two persons are left to train on.
    """
    if count and not 0 < count <= len(persons) - 2:
        raise ValueError(f"HOLDOUT_PERSONS = {count}: {len(persons)} persons are there, two must stay in training")
    order = torch.randperm(len(persons), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(sorted(persons)[i] for i in order[:count])


# --- photos -> tensors ------------------------------------------------------------------------------------------------


def load_image(path: Path) -> Image.Image:
    """`path` as RGB, turned upright by its EXIF orientation; transparency becomes white.

    Raises OSError with the path if the file cannot be read to its end.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                with contextlib.suppress(Exception):  # a broken EXIF block is no reason to lose the photo
                    image = ImageOps.exif_transpose(image)
                if image.mode == "I;16":  # 16-bit grayscale: convert() would clip at 255
                    image = image.point(lambda value: value / 256).convert("L")
                if image.has_transparency_data:
                    rgba = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
                return image.convert("RGB")
    except READ_ERRORS as error:
        raise OSError(
            f"{path}: cannot be read as an image ({error}); replace or delete it, "
            "or set CHECK_IMAGES = True to leave such files out"
        ) from error


class FaceCrop:
    """Square crop around the centre, resized to `size` x `size`: PIL image -> PIL image.

    fraction: side of the crop as a share (0..1] of the photo's shorter side.
    zoom, shift: random jitter of the side (+-share of it) and of the centre (+-share of the shorter side), 0 = none,
    drawn from torch's generator; beyond the photo's edges its mirror image goes on.
    Raises ValueError if one of them is out of range.
    """

    def __init__(self, size: int, fraction: float, zoom: float = 0.0, shift: float = 0.0):
        if not 0 < fraction <= 1:
            raise ValueError(f"FACE_CROP = {fraction}: expected a share of the shorter side in (0, 1]")
        if size < 76:  # below, InceptionResnetV1's last stride-2 blocks have nothing left to see
            raise ValueError(f"IMAGE_SIZE = {size}: expected at least 76 pixels; the pretrained network knows 160")
        if not 0 <= zoom < 1:
            raise ValueError(f"CROP_ZOOM = {zoom}: expected a share in [0, 1), usually about 0.1")
        if not 0 <= shift <= 0.5:
            raise ValueError(f"CROP_SHIFT = {shift}: expected a share of the shorter side in [0, 0.5]")
        self.size, self.fraction, self.zoom, self.shift = size, fraction, zoom, shift

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        shorter = min(width, height)
        side, x, y = self.fraction * shorter, width / 2, height / 2
        if self.zoom or self.shift:
            zoom, dx, dy = (2 * torch.rand(3) - 1).tolist()
            side = side * (1 + self.zoom * zoom)
            x, y = x + self.shift * shorter * dx, y + self.shift * shorter * dy
            # Kept inside instead, a crop of nearly the whole photo could neither move nor grow.
            beyond = math.ceil(max(0, side / 2 - min(x, y, width - x, height - y)))
            if beyond:
                pixels = np.pad(np.asarray(image), ((beyond, beyond), (beyond, beyond), (0, 0)), mode="symmetric")
                image, x, y = Image.fromarray(pixels), x + beyond, y + beyond
                width, height = image.size
        # Rounding may put a corner a hair outside the photo, which Pillow refuses.
        box = (max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height))
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)


# fixed_image_standardization of facenet: (x - 127.5) / 128 on 0..255, here on 0..1.
_TO_TENSOR = (
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean=[127.5 / 255] * 3, std=[128 / 255] * 3),
)


def eval_transform(image_size: int, face_crop: float) -> Transform:
    """PIL RGB image -> (3, image_size, image_size) float32 in about -1..1: centre crop, resize, standardization."""
    return v2.Compose([FaceCrop(image_size, face_crop), *_TO_TENSOR])


def train_transform(
    image_size: int,
    face_crop: float,
    zoom: float,
    shift: float,
    distort: Callable[[Image.Image], Image.Image] | None = None,
    mirror: bool = True,
) -> Transform:
    """`eval_transform` with the crop jittered (see FaceCrop) and, with `mirror`, every second image mirrored;
    `distort`, such as RandomDistortion, sees the photo before the crop."""
    before, after = [distort] if distort else [], [v2.RandomHorizontalFlip()] if mirror else []
    return v2.Compose([*before, FaceCrop(image_size, face_crop, zoom, shift), *after, *_TO_TENSOR])


class RandomDistortion:
    """With `probability` (0..1), 1..`most` kinds in turn, each of a severity even in 0..1: PIL image -> PIL image.

    kinds: name -> (image, severity, generator) -> image, as in distortions.DISTORTIONS; drawn without repeats, so that
    photos meet mixtures such as fog in the dark that no file on disk shows. Whole frames of more than `side` pixels
    (shorter side) are shrunk to it first: the kinds scale with the frame, and the crop would throw the pixels away.
    Drawn from torch's generator. Raises ValueError if a number is out of range.
    """

    def __init__(self, kinds: dict[str, Callable], probability: float, most: int, side: int):
        if not 0 <= probability <= 1:
            raise ValueError(f"DISTORT = {probability}: expected a probability, 0..1")
        if not 1 <= most <= len(kinds):
            raise ValueError(f"DISTORT_MOST = {most}: expected 1..{len(kinds)} kinds on one photo")
        self.kinds, self.probability, self.most, self.side = dict(kinds), probability, most, side

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()).item() >= self.probability:
            return image
        shrink = self.side / min(image.size)
        if shrink < 1:
            size = tuple(max(1, round(length * shrink)) for length in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        count = generator.integers(1, self.most, endpoint=True)
        for name in generator.permutation(sorted(self.kinds))[:count]:
            image = self.kinds[name](image, float(generator.random()), generator)
        return image


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
        raise ValueError(f"{root}: every person is held out; lower HOLDOUT_PERSONS")
    kept = [person for person in without_kinds(scanned, skip_kinds) if person.clean or person.distorted]
    if not kept:
        raise ValueError(f"{root}: SKIP_KINDS leaves no photo to train on")
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
        raise ValueError("persons and label2idx name different persons; pass both from the same training dataset")
    scanned = scan_persons(root, check_images=check_images)
    strangers = [person.name for person in scanned if person.name not in label2idx]
    if strangers:
        raise ValueError(
            f"{root}: {len(strangers)} of {len(scanned)} persons are not among the {len(persons)} trained ones "
            f"({_names(strangers)}): classification cannot name them; "
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
            raise ValueError(f"{root}: no clean photo; expected {root}/<person>/clean/*.jpg or {root}/<person>/*.jpg")


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
            raise ValueError(
                f"CLEAN = {clean}, DISTORT = {anew}: expected shares of 0..1 that make 1 at most, together"
            )
        if anew and distort is None:
            raise ValueError(f"DISTORT = {anew}: photos are to be distorted anew, but no distortion is given")
        self.negatives, self.clean, self.anew, self.distort, self.mirror = negatives, clean, anew, distort, mirror
        self._scanned = _scan_for_training(root, exclude, skip_kinds, check_images)
        self.persons = [person.name for person in self._scanned]
        self.label2idx = {name: label for label, name in enumerate(self.persons)}
        self.anchors = [
            (path, label) for label, p in enumerate(self._scanned) if p.distorted for path in p.clean
        ]  # (path, label)
        _tell_unknown("OFTEN", often, self._scanned)
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
                f"pair; they serve as negatives only ({_names(unpaired)})"
            )
        if not self.anchors:
            raise ValueError(f"{root}: no person has both clean and distorted photos, so there is no pair to train on")
        if len(self.persons) < 2:
            raise ValueError(f"{root}: a negative needs a second person, found only {self.persons[0]}")

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


class _EpochBatches(Sampler[list[int]]):
    """Batches of an epoch, the same for the same (seed, epoch) however many processes share them.

    Every process yields its own contiguous part of each batch. `len()` is the number of batches of a whole epoch.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch, self.skip = seed, 1, 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Give the epoch to draw, and how many of its batches were had already (a resumed run's)."""
        self.epoch, self.skip = epoch, skip

    def batches(self) -> list[list[int]]:
        """All batches of the epoch, undivided."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_and_world()
        for batch in self.batches()[self.skip :]:
            yield batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))


class ShuffledBatches(_EpochBatches):
    """Items 0..len(labels)-1 in random order, in batches of `batch_size`, or a little less so that all are alike.

    balance 0: each item once per epoch. 1: each person (label) equally often, however many photos it has: an epoch is
    as long, but a photo of a person with n of them comes up in proportion to n^-balance, rounded at random up or down;
    copy k of photo i is index i + k * len(labels), which draws a crop of its own.
    Raises ValueError if the batch is larger than the data, or too small for two items in each process.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, seed: int, balance: float = 0.0):
        super().__init__(seed)
        self.labels, self.balance = torch.tensor(labels), balance
        world = rank_and_world()[1]
        if len(labels) < batch_size:
            raise ValueError(f"BATCH_SIZE = {batch_size}: more than the {len(labels)} items of an epoch; lower it")
        if batch_size < 2 * world:
            raise ValueError(f"BATCH_SIZE = {batch_size}: too few for two photos in each of {world} processes")
        # BatchNorm cannot work with one image, so none may be left for a last batch of its own.
        self._count = min(math.ceil(len(labels) / batch_size), len(labels) // (2 * world))

    def __len__(self) -> int:
        return self._count

    def batches(self) -> list[list[int]]:
        generator = self._generator()
        order = torch.randperm(len(self.labels), generator=generator)
        if self.balance:
            weights = self.labels.bincount().double()[self.labels[order]] ** -self.balance
            ends = weights.cumsum(0) * (len(order) / weights.sum())  # photo i fills an interval of its share
            ticks = torch.arange(len(order)) + torch.rand((), generator=generator, dtype=torch.double)
            place = torch.searchsorted(ends, ticks).clamp_max(len(order) - 1)
            copy = torch.arange(len(place)) - torch.searchsorted(place, place)  # a photo's copies lie side by side
            order = (order[place] + len(order) * copy)[torch.randperm(len(order), generator=generator)]
        return [batch.tolist() for batch in order.tensor_split(self._count)]


class PersonBatches(_EpochBatches):
    """P x K (Hermans et al. 2017, arXiv:1703.07737, sec. 2): `persons` different persons (P) in each batch, each with
    `pairs` pairs of a clean and a distorted photo (K = 2 pairs photos), for FacePairDataset.

    labels: the person of each anchor. An epoch shows each anchor once; a person whose anchors run out fills its last
    group with anchors anew, as indices beyond len(labels), which stand for other positives. A person of very many
    photos cannot fill more than one place of a batch, and persons left over at the end make no batch: those anchors
    miss the epoch, other ones each time.
    Raises ValueError if there are fewer persons, or fewer pairs in a batch than processes.
    """

    def __init__(self, labels: Sequence[int], persons: int, pairs: int, seed: int):
        super().__init__(seed)
        self.persons, self.pairs, self.total = persons, pairs, len(labels)
        self._anchors: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self._anchors.setdefault(label, []).append(index)
        if len(self._anchors) < persons:
            raise ValueError(f"PERSONS_PER_BATCH = {persons}: only {len(self._anchors)} persons have pairs; lower it")
        if persons * pairs < rank_and_world()[1]:
            raise ValueError(f"PERSONS_PER_BATCH = {persons}: too few for {rank_and_world()[1]} processes")
        groups = [math.ceil(len(anchors) / pairs) for anchors in self._anchors.values()]
        # The most batches that can be filled: a person gives at most one group to each.
        self._count = sum(groups) // persons
        while sum(min(group, self._count) for group in groups) < self._count * persons:
            self._count -= 1

    def __len__(self) -> int:
        return self._count

    def batches(self) -> list[list[int]]:
        generator = self._generator()

        def shuffled(items: list) -> list:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        groups = []  # a person's lie side by side, at most one per batch
        for anchors in shuffled(list(self._anchors.values())):
            order = shuffled(anchors)
            missing = -len(order) % self.pairs
            order += [order[i % len(anchors)] + self.total * (1 + i // len(anchors)) for i in range(missing)]
            of_person = [order[i : i + self.pairs] for i in range(0, len(order), self.pairs)]
            groups += shuffled(of_person)[: self._count]
        surplus = set(torch.randperm(len(groups), generator=generator)[self._count * self.persons :].tolist())
        groups = [group for i, group in enumerate(groups) if i not in surplus]
        # Dealt like cards: neighbours go to different batches, so a batch meets no person twice.
        batches = [groups[i :: self._count] for i in range(self._count)]
        return [[index for group in shuffled(batch) for index in group] for batch in shuffled(batches)]
