"""What identify.py finds: its answers as a table, as JSON lines, and drawn on copies of the photos."""

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from checkpoints import atomic_file
from common import safe_text, warn_once
from faces import NO_FACE, UNREADABLE, UNUSABLE, Box, Label, draw_labels
from transforms import load_image

NAMED, UNKNOWN = "named", "unknown"  # beside NO_FACE, UNREADABLE and UNUSABLE of faces.py
MADE_BY = b"drawn by identify.py"  # in the JPEG of each picture: only such files are ever removed
COLOURS = {NAMED: "#1b7f3b", UNKNOWN: "#b3261e", UNUSABLE: "#555555", NO_FACE: "#555555"}  # of annotations


@dataclass(frozen=True)
class Answer:
    """The result for a face, or for a photo that shows none; None where a value does not apply."""

    photo: str  # as given or found
    status: str  # "named", "unknown", "not usable", "no face" or "unreadable"
    person: str | None = None  # the name, if there is one
    score: float | None = None  # cosine with `resembles`
    threshold: float | None = None  # the lowest score that gives a name; None: every face gets one
    resembles: str | None = None  # the most similar person, named or not
    others: list[dict] = field(default_factory=list)  # {person, score} of the TOP - 1 next most similar persons
    box: Box | None = None  # left, top, right, bottom in pixels of the upright photo, where faces are searched for
    reason: str | None = None  # why the photo is unreadable or not usable
    quality: float | None = None  # of the photo, if the model rates it


def table(answers: Sequence[Answer]) -> str:
    """A line per answer, columns aligned, then the counts."""
    lines = [("photo", "person", "cosine", "similar to")]
    for answer in answers:
        if answer.score is None:
            lines.append((answer.photo, f"({answer.status})", "", answer.reason or ""))
            continue
        similar = [] if answer.person else [answer.resembles]
        similar += [f"{other['person']} {other['score']:.3f}" for other in answer.others]
        lines.append((answer.photo, answer.person or UNKNOWN, f"{answer.score:.3f}", ", ".join(similar)))
    counts = Counter(answer.status for answer in answers)
    parts = [f"{counts[NAMED]} named", f"{counts[UNKNOWN]} unknown"]
    rest = {UNUSABLE: "not usable", NO_FACE: "without a face", UNREADABLE: "unreadable"}
    parts += [f"{counts[status]} {what}" for status, what in rest.items() if counts[status]]
    photos = len({answer.photo for answer in answers})
    return "\n".join([*aligned(lines), f"{counted(photos, 'photo')}: {', '.join(parts)}"])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns are as wide as their widest cell."""
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell + " " * (most - width(cell)) for cell, most in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """`text` as stdout shows it, so that columns are as wide as they are counted."""
    return safe_text(text, encoding=getattr(sys.stdout, "encoding", None) or "utf-8")  # None: no console


def width(text: str) -> int:
    """Columns on a terminal: two for a wide character (Chinese, emoji), none for an accent that joins its letter."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def write_json_lines(path: Path, answers: Sequence) -> None:
    """answers: dataclasses, an Answer or a PairAnswer for each line."""
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    with atomic_file(path) as file:
        # Bytes of a file's name that are not UTF-8 become \udcff and the like, which JSON can hold.
        file.write(lines.encode("utf-8", "backslashreplace"))


def annotate(folder: Path, answers: Sequence[Answer], *, side: int, fraction: float) -> int:
    """Write a picture of each readable photo, `<number>_<its name>.jpg`: each face in its box with the answer.

    Those of an earlier run are removed. Returns the number of pictures.
    side: px, longer side of each. fraction: share of a photo's shorter side in the box
    where a photo has no face's box, which is what the crop keeps.
    """
    by_photo: dict[str, list[Answer]] = {}
    for answer in answers:
        by_photo.setdefault(answer.photo, []).append(answer)
    remove_pictures(folder, keep={Path(photo).resolve() for photo in by_photo})
    written = 0
    for number, (photo, faces) in enumerate(by_photo.items(), start=1):
        if faces[0].status == UNREADABLE:
            continue
        image = load_image(Path(photo))
        labels = [label_of(face, image.size, fraction) for face in faces]
        # At most 255 bytes in a file's name.
        with atomic_file(folder / f"{number:04d}_{Path(photo).stem[:50]}.jpg") as file:
            picture = draw_labels(image, labels, side)
            picture.save(file, "JPEG", quality=90, subsampling=0, comment=MADE_BY)  # thin lines keep their colour
        written += 1
    return written


def remove_pictures(folder: Path, keep: Collection[Path]) -> None:
    """Remove what `annotate` wrote to `folder`, which may show other people; what else lies there stays, and `keep`."""
    for path in sorted(folder.glob("*.jpg")):
        try:
            with Image.open(path, formats=["JPEG"]) as image:
                is_ours = image.info.get("comment") == MADE_BY
            if is_ours and path.resolve() not in keep:
                path.unlink()
        except PermissionError as error:
            warn_once(f"{path}: cannot be removed ({error.strerror}), and may be of an earlier run; delete it")
        except (OSError, ValueError, Image.DecompressionBombError):  # no picture, so none of ours
            continue


def label_of(answer: Answer, size: tuple[int, int], fraction: float) -> Label:
    """What the picture of a photo of `size` (width, height) says of a face."""
    (width, height), side = size, fraction * min(size)
    centre = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
    score = "" if answer.score is None else f" {answer.score:.2f}"
    return Label(
        text=f"{answer.person or answer.status}{score}",
        colour=COLOURS[answer.status],
        box=None if answer.status == NO_FACE else answer.box or centre,
    )
