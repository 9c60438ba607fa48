"""Which files of a folder are photos, which are left out and why, and which clean photo a copy was made from."""

import contextlib
import hashlib
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from common import UserError, list_names, plain_name, warn_once
from transforms import HEIF, suffixes

CLEAN, DISTORTION = "clean", "distortion"
# What users call the two by mistake. Upper case is no mistake: half of all disks ignore it.
MISNAMED = dict.fromkeys(("distorted", "distortions", "distort"), DISTORTION) | {"cleaned": CLEAN, "cleans": CLEAN}
NO_TEXT = "with a name or folder that is not UTF-8, to be renamed"


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's: not hidden, and none that a system or a file server puts beside photos,
    such as @eaDir, #recycle, $RECYCLE.BIN, __MACOSX and Thumbs.db."""
    return name[0] not in ".@#$" and name.casefold() not in ("__macosx", "thumbs.db", "desktop.ini")


def is_text(name: str) -> bool:
    """Whether the name of a file or folder is text. One out of an old zip need not be UTF-8: Python shows its bytes as
    surrogates, which no CSV, report or terminal takes."""
    return not any(unicodedata.category(character) == "Cs" for character in name)


def _visible(folder: Path, is_wanted: Callable[[os.DirEntry], bool]) -> list[Path]:
    """The visible entries of `folder` that are wanted, sorted by name; [] if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if is_visible(entry.name) and _leads_to(entry, is_wanted)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        warn_once(f"{folder}: left out, the folder cannot be opened ({error.strerror})")
        return []
    return [folder / name for name in sorted(names)]  # paths themselves sort by other rules on Windows


def _leads_to(entry: os.DirEntry, is_wanted: Callable[[os.DirEntry], bool]) -> bool:
    try:
        return is_wanted(entry)
    except OSError:  # a link to itself
        return False


def visible_files(folder: Path) -> list[Path]:
    return _visible(folder, os.DirEntry.is_file)


def subfolders(folder: Path) -> list[Path]:
    return _visible(folder, os.DirEntry.is_dir)


def find_photos(folder: Path) -> list[Path]:
    """Sorted image files directly in `folder`, without hidden ones; [] if there is no such folder."""
    return [path for path in visible_files(folder) if path.suffix.lower() in suffixes()]


def photos_of_person(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """The photos directly in a person's folder, those in its clean/ and those in its distortion/, in any case."""
    below = subfolders(folder)

    def inside(name: str) -> list[Path]:
        found = [path for path in below if path.name == name] or [path for path in below if path.name.lower() == name]
        return find_photos(found[0]) if found else []

    return find_photos(folder), inside(CLEAN), inside(DISTORTION)


def walk(root: Path) -> Iterator[Path]:
    """`root` and every visible folder below it, parents first, in the order of their names, each once.

    Links lead on to folders elsewhere. One to a folder in `root` does not, as that is found itself; nor does one to a
    folder around `root`, or to a folder that was visited: such links may form a loop.
    """
    top, visited = root.resolve(), set()

    def visit(folder: Path, real: Path) -> Iterator[Path]:
        if real in visited:
            return
        visited.add(real)
        yield folder
        for below in subfolders(folder):
            target = below.resolve()
            is_link = target != real / below.name
            if not (is_link and (target.is_relative_to(top) or top.is_relative_to(target))):
                yield from visit(below, target)

    return visit(root, top)


def photos_below(root: Path) -> list[Path]:
    """The photos of `root` and of its visible folders at any depth. Other files are counted in a warning."""
    reasons = {path: why_no_photo(path) for folder in walk(root) for path in visible_files(folder)}
    left_out = {path: reason for path, reason in reasons.items() if reason}
    if left_out:
        warn_once(describe_left_out(root, left_out))
    return [path for path, reason in reasons.items() if reason is None]


def collect_photos(constant: str, places: Sequence[Path | str]) -> list[Path]:
    """The photos at `places` in the order given, each once: files of any suffix, and the visible photos of folders.

    constant: of the script, which holds `places`, for messages. Photos of a folder, at any depth, come sorted. Raises
    UserError for a path that does not exist, or if there is no photo.
    """
    found: list[Path] = []
    for place in (Path(place).expanduser() for place in places):
        if not place.exists():
            raise UserError(f"{constant}: {place}: no such photo or folder")
        if place.is_dir():
            found += photos_below(place)
        else:
            found.append(place)
    if places and not found:
        raise UserError(f"{constant}: no photo in {', '.join(map(str, places))}; give photos, or folders with photos")
    once = {path.resolve(): path for path in reversed(found)}  # reversed: the first of equals stays
    photos = [path for path in found if once[path.resolve()] is path]
    if len(photos) < len(found):
        print(f"{constant}: {len(found) - len(photos)} of {len(found)} photos are repeats, skipped")
    return photos


def why_no_photo(path: Path) -> str | None:
    """What a file is whose suffix is none of an image that is read, such as ".heic (pip install pillow-heif)"."""
    suffix = path.suffix.lower()
    if suffix in suffixes():
        return None
    return f"{suffix} (pip install pillow-heif)" if suffix in HEIF else suffix or "without a suffix"


def find_left_out(root: Path, read: Collection[Path]) -> dict[Path, str]:
    """Every visible file below `root`, a folder of persons, that is not in `read` -> why."""
    files = [path for folder in walk(root) for path in visible_files(folder) if path not in read]
    return {path: _why_left_out(path.relative_to(root)) for path in files}


def _why_left_out(path: Path) -> str:
    if not is_text(str(path)):
        return NO_TEXT
    reason = why_no_photo(path)
    if reason:
        return reason
    if len(path.parts) == 1:
        return "outside the folders of persons"
    if len(path.parts) == 2:
        return "beside clean/, which counts"
    right = MISNAMED.get(path.parts[1].lower())
    if right:
        return f"in {path.parts[1]}/, to be named {right}/"
    return f"too deep, expected in <person>/, <person>/{CLEAN}/ or <person>/{DISTORTION}/"


def describe_left_out(root: Path, left_out: dict[Path, str]) -> str:
    """'train: 4 files left out: 3 .heic (pip install pillow-heif); 1 beside clean/, which counts (ann/1.jpg)'.

    left_out: path -> reason. Examples are given of what is not a matter of the suffix.
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        by_reason.setdefault(reason, []).append(shown(path.relative_to(root)))
    groups = [
        f"{len(paths)} {reason}" + ("" if reason[0] == "." else f" ({list_names(paths, most=2)})")
        for reason, paths in sorted(by_reason.items(), key=lambda group: -len(group[1]))
    ]
    return f"{root}: {len(left_out)} file{'s' * (len(left_out) > 1)} left out: {'; '.join(groups)}"


def shown(path: Path) -> str:
    """`path` with / between folders, and with \\-escapes for bytes that are not UTF-8."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()


def equal_files(paths: Sequence[Path]) -> list[list[Path]]:
    """Groups of two and more files with the same bytes. Whoever loads a file that cannot be read will report it."""
    by_size: dict[int, list[Path]] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            by_size.setdefault(path.stat().st_size, []).append(path)
    by_content: dict[bytes, list[Path]] = {}
    for of_size in by_size.values():
        if len(of_size) > 1:  # only files of one size can be equal: few need to be read
            for path in of_size:
                with contextlib.suppress(OSError):
                    by_content.setdefault(hashlib.sha256(path.read_bytes()).digest(), []).append(path)
    return [equal for equal in by_content.values() if len(equal) > 1]


def source_photos(distorted: Sequence[Path], clean: Sequence[Path]) -> list[Path | None]:
    """The clean photo that each distorted one was made from: the one with the longest stem that begins its name.

    The stem is followed by neither a letter nor a digit: a_10_blurred.jpg and a_10-blurred.jpg come from a_10.jpg,
    never from a_1.jpg. Of a.jpg and a.png, the source is the one with the copy's own suffix. None if there is no such
    photo, or no telling which of two.
    """
    by_stem: dict[str, list[Path]] = {}
    for photo in clean:
        by_stem.setdefault(plain_name(photo.stem), []).append(photo)

    def source(copy: Path) -> Path | None:
        stem = plain_name(copy.stem)
        ends = [len(stem), *(i for i in reversed(range(len(stem))) if not stem[i].isalnum())]
        found = next((by_stem[stem[:end]] for end in ends if stem[:end] in by_stem), [])
        for fits in (
            lambda photo: copy.parent.parent in photo.parents,  # one person may have two folders, see scan_persons
            lambda photo: copy.stem.startswith(photo.stem),  # in the same bytes
            lambda photo: copy.suffix == photo.suffix,
            lambda photo: copy.suffix.lower() == photo.suffix.lower(),
        ):
            found = [photo for photo in found if fits(photo)] if len(found) > 1 and any(map(fits, found)) else found
        return found[0] if len(found) == 1 else None

    return [source(path) for path in distorted]


def distortion_kind(path: Path, source: Path | None = None) -> str:
    """'motion_blur' for a_0001_motion_blur.jpg: what follows the name of its clean photo, `source`.

    Without a source it is what follows the last underscore, and 'unknown' if that is a number. 'unknown', too, if it is
    nothing.
    """
    stem = plain_name(path.stem)
    if source is not None:
        kind = stem[len(plain_name(source.stem)) :].lstrip("_-. ")
    else:
        kind = stem.rpartition("_")[2] if "_" in stem else ""
        kind = "" if kind.isdigit() else kind
    return kind.lower() or "unknown"
