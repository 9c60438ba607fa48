"""Two photos, one answer: do they show the same person?"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from answers import aligned
from calibration import reached
from common import UserError
from faces import Reading

SAME, DIFFERENT = "same", "different"


@dataclass(frozen=True)
class PairAnswer:
    """first, second: the photos; status: "same", "different" or, where one photo is not used, why; None where a value
    does not apply. far: the lowest false accept rate that was measured and allows for this cosine."""

    first: str
    second: str
    status: str
    cosine: float | None = None
    threshold: float | None = None  # the lowest cosine that is "same"; None: it is not known
    far: float | None = None
    reason: str | None = None


def read_pairs(pairs: object) -> list[tuple[Path, Path]]:
    """PAIRS of identify.py as paths: two photos, or a CSV file whose first two columns hold a pair in each row.

    Paths in a file count from its folder; a first row that names no photo is a header. Raises UserError for what is
    neither, and for a photo that is not there.
    """
    if isinstance(pairs, (str, Path)):
        path = Path(pairs).expanduser()
        if not path.is_file():
            raise UserError(f"PAIRS = {path}: no such file; give two photos, or a CSV file with a pair in each row")
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins its files with a mark
            rows = [row for row in csv.reader(file) if any(row)]
        short = next((number for number, row in enumerate(rows, start=1) if len(row) < 2), None)
        if short:
            raise UserError(f"PAIRS = {path}: row {short} has one column, expected two paths")
        found = [(path.parent / row[0], path.parent / row[1]) for row in rows]
        if found and not any(photo.is_file() for photo in found[0]):
            found = found[1:]
    elif isinstance(pairs, (tuple, list)) and len(pairs) == 2 and all(isinstance(p, (str, Path)) for p in pairs):
        found = [tuple(Path(photo).expanduser() for photo in pairs)]
    else:
        raise UserError(f"PAIRS = {pairs!r}: expected two photos, [first, second], or the path of a CSV file of pairs")
    missing = next((photo for pair in found for photo in pair if not photo.is_file()), None)
    if missing is not None:
        raise UserError(f"PAIRS: {missing}: no such photo")
    if not found:
        raise UserError(f"PAIRS = {pairs}: no pair in it; expected two paths in each row")
    return found


def compare(
    pairs: Sequence[tuple[Path, Path]],
    readings: Sequence[Reading],
    embeddings: Tensor,
    *,
    threshold: float | None,
    cosines: dict[float, float],
) -> list[PairAnswer]:
    """An answer for each pair.

    readings: a face, or why there is none, of each photo, the largest face first; embeddings: (N, D), rows of norm 1,
    of the readings without a status. threshold: the lowest cosine of the same person; None: the answer is a cosine
    alone. cosines: false accept rate -> cosine, of calibration.measure.
    """
    rows = iter(embeddings)
    faces: dict[Path, tuple[Reading, Tensor | None]] = {}
    for reading in readings:
        row = next(rows) if reading.status is None else None
        faces.setdefault(reading.photo, (reading, row))
    answers = []
    for first, second in pairs:
        (of_first, a), (of_second, b) = faces[first], faces[second]
        if a is None or b is None:
            unused = of_first if a is None else of_second
            reason = f"{unused.photo}{': ' + unused.reason if unused.reason else ''}"
            answers.append(PairAnswer(str(first), str(second), status=unused.status, reason=reason))
            continue
        cosine = float(a @ b)
        status = "" if threshold is None else SAME if cosine >= threshold else DIFFERENT
        far = reached(cosines, cosine)
        answers.append(PairAnswer(str(first), str(second), status, cosine=cosine, threshold=threshold, far=far))
    return answers


def pair_table(answers: Sequence[PairAnswer]) -> str:
    """A line per pair, columns aligned, and what the answers rest on."""
    lines = [("first", "second", "answer", "cosine", "false accepts")]
    for answer in answers:
        if answer.cosine is None:
            lines.append((answer.first, answer.second, f"({answer.status})", "", answer.reason or ""))
            continue
        share = "" if answer.far is None else f"at most {100 * answer.far:g} % of pairs of different persons reach it"
        lines.append((answer.first, answer.second, answer.status, f"{answer.cosine:.3f}", share))
    threshold = next((answer.threshold for answer in answers if answer.threshold is not None), None)
    how = "no answers: set THRESHOLD, or take a checkpoint that has a calibration"
    return "\n".join([*aligned(lines), how if threshold is None else f"same: cosine >= {threshold:.3f}"])
