"""Cut the faces out of loose photos, once; then train with FRAMING = "centre" and FACE_CROP = 1.

    python -m tools.align_faces

    IN_DIR/.../<person>/*.jpg  or  IN_DIR/.../<person>/clean/*.jpg  ->  OUT_DIR/.../<person>/clean/*.jpg
    IN_DIR/.../<person>/distortion/*.jpg                            ->  OUT_DIR/.../<person>/distortion/*.jpg

at any depth, so train/, val/ and test/ keep their names. Photos keep theirs too: a distorted photo is matched to its
clean photo by name. A distortion often hides the face from the detector, so a distorted photo is cut at the box found
in its clean photo if both have the same size in pixels; if not, the distorted photo itself is searched.

OUT_DIR also gets align_faces.csv (a row per photo), no_face.txt, align_faces.png (examples) and align_faces.json (the
constants). Nothing in IN_DIR is changed. If a run is stopped, the next one continues where it was.
"""

import contextlib
import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import checkpoints
import common
from common import UserError
from faces import NO_FACE, UNREADABLE, FaceDetector, choose, crop_face
from faces import WHICH as CHOICES
from folders import (
    CLEAN,
    DISTORTION,
    MISNAMED,
    NO_TEXT,
    describe_left_out,
    find_photos,
    is_text,
    photos_of_person,
    shown,
    source_photos,
    visible_files,
    walk,
    why_no_photo,
)
from fonts import font_file
from transforms import load_image

IN_DIR = Path("photos")  # loose photos, a folder per person at any depth
OUT_DIR = Path("Task_B")  # new, or of an earlier run with the same constants; not inside IN_DIR and not around it
# --- which face ---
WHICH = "central"  # the face nearest to the middle of the photo; or "largest", if the person may stand at the side
MIN_PROBABILITY = 0.9  # that it is a face, 0..1; a lower value finds more faces, and more that are none
MIN_FACE = 20  # px, side of the smallest face searched for, >= 12; half of it takes up to four times as long
# --- what is cut ---
MARGIN = 0.06  # share of the box's longer side that is added to it, 0..3; 0.06 frames LFW as FACE_CROP = 0.52 does
SIZE = None  # px, side of each crop, 16..4096; None: as cut, so that training resizes once instead of twice
JPEG_QUALITY = 95  # 1..100, for photos that are JPEGs; others become PNGs, which lose nothing
# --- contact sheet ---
SHEET = 24  # examples on it, >= 0
SHEET_CELL = 160  # px, side of one picture, >= 16
SEED = 0  # of the choice for the sheet: 0, 1, 2, ...

CUT, LEFT_OUT, GONE = "cut", "left out", "photo gone"  # beside NO_FACE and UNREADABLE
BOX = ("left", "top", "right", "bottom")
# `box_of`: the photo in which the box was found. `version`: see below; last, because a line that was cut short then
# has a version that matches no photo.
BORROWED = ("faces", "probability", *BOX, "box_of")  # what a distorted photo takes from its clean photo
COLUMNS = ("path", "done", "target", *BORROWED, "width", "height", "reason", "version")

Row = dict[str, str]  # of align_faces.csv


@dataclass(frozen=True)
class Photo:
    """A photo, its crop, and the clean photo of a distorted one."""

    path: Path  # relative to IN_DIR
    target: Path  # relative to OUT_DIR
    source: Path | None  # relative to IN_DIR


def main() -> dict[str, int]:
    """Cut every face that has not been cut yet; returns how many photos have each value of the column `done`."""
    common.resolve_constants(globals())
    check_constants()
    photos, left_out = find_all(IN_DIR)
    check_targets(photos)
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=True)
    claim_out_dir()
    earlier = read_rows(OUT_DIR / "align_faces.csv")
    device = common.pick_device()
    torch.backends.cudnn.benchmark = False  # photos differ in shape
    detector = FaceDetector(device, min_face=MIN_FACE, min_probability=MIN_PROBABILITY)

    rows: dict[Path, Row] = {}
    processed = 0
    with journal(OUT_DIR / "align_faces.csv", earlier) as note:
        for photo in tqdm(photos, desc="aligning", unit="photo"):
            row, source = earlier.get(photo.path.as_posix()), rows.get(photo.source)
            if row is None or not is_done(photo, row, source):
                row = align(photo, detector, source)
                note(row)
                processed += 1
            rows[photo.path] = row
    for path, reason in left_out.items():
        relative = Path(shown(path.relative_to(IN_DIR)))
        rows[relative] = blank(relative) | {"done": LEFT_OUT, "reason": reason}
    rows |= gone_rows(earlier, rows)
    return report(list(rows.values()), processed)


def check_constants() -> None:
    """Raise UserError for a constant out of range, or if there is no IN_DIR."""
    if not IN_DIR.is_dir():
        raise UserError(f"{IN_DIR}: no such folder; set IN_DIR to the folder that holds the photos")
    source, target = IN_DIR.resolve(), OUT_DIR.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(
            f"OUT_DIR = {OUT_DIR} and IN_DIR = {IN_DIR}: one is the other or lies inside it, so photos would be "
            "overwritten or cut twice; choose another OUT_DIR"
        )
    if WHICH not in CHOICES:
        raise UserError(f"WHICH = {WHICH!r}: expected one of {', '.join(map(repr, CHOICES))}")
    ranges = {
        "MARGIN": (MARGIN, float, 0, 3),
        "SIZE": (SIZE, int, 16, 4096),
        "MIN_PROBABILITY": (MIN_PROBABILITY, float, 0, 1),
        "MIN_FACE": (MIN_FACE, int, 12, 1000),
        "JPEG_QUALITY": (JPEG_QUALITY, int, 1, 100),
        "SHEET": (SHEET, int, 0, 10_000),
        "SHEET_CELL": (SHEET_CELL, int, 16, 1000),
        "SEED": (SEED, int, 0, 2**32),
    }
    for name, (value, kind, low, high) in ranges.items():
        if name == "SIZE" and value is None:
            continue
        if not common.in_range(value, kind, low, high):
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{name} = {value!r}: expected {what}, {low}..{high}{' or None' * (name == 'SIZE')}")


# --- the tree ---------------------------------------------------------------------------------------------------------


def find_all(root: Path) -> tuple[list[Photo], dict[Path, str]]:
    """Every photo below `root`, clean photos before their distorted ones, and path -> reason of the files left out.

    By the rules of datasets.scan_persons: photos directly in a person's folder are clean photos, unless there are some
    in clean/. Raises UserError if there is no photo.
    """
    photos: list[Photo] = []
    left_out: dict[Path, str] = {}
    for folder in walk(root):
        person = folder.relative_to(root)
        left_out |= {path: why_no_photo(path) for path in visible_files(folder) if why_no_photo(path)}
        misplaced = why_misplaced(person)
        if misplaced is not None:
            left_out |= dict.fromkeys(find_photos(folder) if misplaced else (), misplaced)
            continue
        direct, in_clean, distorted = photos_of_person(folder)
        clean = in_clean or direct
        if in_clean:
            left_out |= dict.fromkeys(direct, "beside clean/, which counts")
        elif direct and not distorted and holds_persons(folder):
            clean = []
            left_out |= dict.fromkeys(direct, "beside the folders of persons")
        photos += [Photo(path.relative_to(root), person / CLEAN / target_name(path), None) for path in clean]
        for path, source in zip(distorted, source_photos(distorted, clean), strict=True):
            target = person / DISTORTION / target_name(path)
            photos.append(Photo(path.relative_to(root), target, source and source.relative_to(root)))
    left_out |= {root / photo.path: NO_TEXT for photo in photos if not is_text(str(photo.path))}
    photos = [photo for photo in photos if root / photo.path not in left_out]
    if not photos:
        found = f"; {describe_left_out(root, left_out)}" if left_out else ""
        raise UserError(f"{root}: no photo, expected {root}/<person>/*.jpg or {root}/<person>/clean/*.jpg{found}")
    return photos, left_out


def why_misplaced(folder: Path) -> str | None:
    """Why the photos directly in `folder`, relative to IN_DIR, are no person's; "" for clean/ and distortion/, whose
    photos are found with their person, None for a folder that may be a person's."""
    names = [name.lower() for name in folder.parts]
    for depth, name in enumerate(names):
        if name in (CLEAN, DISTORTION):
            return f"deeper than {name}/, where no script reads" if depth < len(names) - 1 else ""
        if name in MISNAMED:
            return f"in {folder.parts[depth]}/, to be named {MISNAMED[name]}/"
    return None


def holds_persons(folder: Path) -> bool:
    """Whether there are photos below `folder`, in folders of persons."""
    below = [path for path in walk(folder) if path != folder]
    return any(why_misplaced(path.relative_to(folder)) is None and any(photos_of_person(path)) for path in below)


def target_name(photo: Path) -> str:
    """The name of the crop of `photo`: the same, with .png in place of a suffix that is neither JPEG nor PNG."""
    return photo.name if photo.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{photo.stem}.png"


def check_targets(photos: Sequence[Photo]) -> None:
    """Raise UserError if the crops of two photos would be one file, also on a disk that ignores case or the way in
    which accents are written."""
    by_target: dict[str, Photo] = {}
    for photo in photos:
        other = by_target.setdefault(common.plain_name(photo.target.as_posix().casefold()), photo)
        if other is not photo:
            raise UserError(
                f"{IN_DIR / other.path} and {IN_DIR / photo.path} would both become {OUT_DIR / photo.target}; "
                "rename one of them, and its distorted photos with it"
            )


# --- the record of what was done --------------------------------------------------------------------------------------


def claim_out_dir() -> None:
    """Write the constants that crops depend on to OUT_DIR/align_faces.json.

    Raises UserError if OUT_DIR holds something else, or crops made with other constants.
    """
    now = {"IN_DIR": str(IN_DIR.resolve()), "WHICH": WHICH, "MIN_PROBABILITY": MIN_PROBABILITY, "MIN_FACE": MIN_FACE}
    now |= {"MARGIN": MARGIN, "SIZE": SIZE, "JPEG_QUALITY": JPEG_QUALITY}
    path = OUT_DIR / "align_faces.json"
    if path.is_file():
        then = read_constants(path)
        for name, value in now.items():
            if then.get(name) != value:
                raise UserError(
                    f"{OUT_DIR}: was cut with {name} = {then.get(name)!r}, now {value!r}; set it back, "
                    "delete the folder, or give OUT_DIR another name"
                )
    elif OUT_DIR.exists() and any(OUT_DIR.iterdir()):
        raise UserError(f"{OUT_DIR}: holds files of something else; give OUT_DIR another name")
    else:
        checkpoints.write_json(path, now)


def read_constants(path: Path) -> dict:
    """What an earlier run wrote to align_faces.json; IN_DIR as the folder itself, however its path was given."""
    try:
        then = json.loads(path.read_text(encoding="utf-8"))
        return then | {"IN_DIR": str(Path(then["IN_DIR"]).resolve())}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: cannot be read, so it is not known with which constants {OUT_DIR} was cut; "
            "delete the folder, or give OUT_DIR another name"
        ) from error


def read_rows(path: Path) -> dict[str, Row]:
    """Path -> its last row in the align_faces.csv of an earlier run; a line that was cut short has no version."""
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if row.keys() == set(COLUMNS) and row["path"]]
    rows = [{name: common.csv_text(cell or "") for name, cell in row.items()} for row in rows]
    return {row["path"]: row for row in rows}


@contextlib.contextmanager
def journal(path: Path, earlier: dict[str, Row]) -> Iterator:
    """Yield a function that appends a row to the csv at `path` at once: a killed run loses only its current photo."""
    checkpoints.write_csv(path, earlier.values() or [dict.fromkeys(COLUMNS, "")])  # for the header
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")

        def note(row: Row) -> None:
            writer.writerow({name: common.csv_cell(value) for name, value in row.items()})
            file.flush()

        try:
            yield note
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; run it again to continue, {OUT_DIR} keeps what is cut") from None


def is_done(photo: Photo, row: Row, source: Row | None) -> bool:
    """Whether the `row` of an earlier run is still true: the photo is unchanged, the crop exists, and its box is still
    that of its clean photo (whose row is `source`), if it was taken from there."""
    try:
        same = row["version"] == version(IN_DIR / photo.path)
    except OSError:
        return False
    if takes_box(row, source):
        same = same and all(row[name] == source[name] for name in BORROWED)
    else:
        same = same and row["box_of"] in ("", row["path"])
    return same and (row["done"] == NO_FACE or (row["done"] == CUT and (OUT_DIR / photo.target).is_file()))


def version(path: Path) -> str:
    """Size in bytes and time of the last change: if it differs, so does the photo."""
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def takes_box(row: Row, source: Row | None) -> bool:
    """Whether the distorted photo of `row` is cut at its clean photo's box: that shows a face and has the same size."""
    return source is not None and source["done"] == CUT and all(row[n] == source[n] for n in ("width", "height"))


def blank(path: Path) -> Row:
    return dict.fromkeys(COLUMNS, "") | {"path": path.as_posix()}


def gone_rows(earlier: dict[str, Row], rows: dict[Path, Row]) -> dict[Path, Row]:
    """Rows of crops that are still in OUT_DIR although their photo is no longer in IN_DIR, or is now left out."""
    still_cut = {row["target"] for row in rows.values() if row["done"] == CUT}
    gone = {}
    for name, row in earlier.items():
        path, target = Path(name), row["target"]
        counts = path in rows and rows[path]["done"] != LEFT_OUT
        if not counts and target and target not in still_cut and (OUT_DIR / target).is_file():
            gone[path] = row | {"done": GONE, "reason": f"delete {OUT_DIR / target}"}
    return gone


# --- one photo --------------------------------------------------------------------------------------------------------


def align(photo: Photo, detector: FaceDetector, source: Row | None) -> Row:
    """Find the face in `photo`, write its crop to OUT_DIR and return its row; `source`: the row of its clean photo."""
    path, target = IN_DIR / photo.path, OUT_DIR / photo.target
    row = blank(photo.path)
    try:
        row["version"] = version(path)
        image = load_image(path)
    except (OSError, UserError) as error:
        target.unlink(missing_ok=True)  # a crop of the photo as it was before
        return row | {"done": UNREADABLE, "reason": str(error.__cause__ or error)}
    row |= {"width": str(image.width), "height": str(image.height)}
    if takes_box(row, source):
        row |= {name: source[name] for name in BORROWED}
    else:
        faces = detector.find(image)
        face = choose(faces, image.size, which=WHICH)
        row["faces"] = str(len(faces))
        if face is None:
            target.unlink(missing_ok=True)
            return row | {"done": NO_FACE}
        row |= {"probability": f"{face.probability:.4f}", "box_of": photo.path.as_posix()}
        row |= {name: f"{value:.2f}" for name, value in zip(BOX, face.box, strict=True)}
    crop = crop_face(image, box_of(row), margin=MARGIN, size=SIZE)
    with checkpoints.atomic_file(target) as file:
        if target.suffix.lower() == ".png":
            crop.save(file, "PNG")
        else:
            crop.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # colour at full resolution
    return row | {"done": CUT, "target": photo.target.as_posix()}


def box_of(row: Row) -> tuple[float, float, float, float]:
    """The box as rounded in the csv, so that a resumed run cuts the same pixels."""
    left, top, right, bottom = (float(row[name]) for name in BOX)
    return left, top, right, bottom


# --- the report -------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row], processed: int) -> dict[str, int]:
    """Write align_faces.csv in the order of the tree, no_face.txt and align_faces.png, and print the counts."""
    of = {done: [row for row in rows if row["done"] == done] for done in (CUT, NO_FACE, UNREADABLE, LEFT_OUT, GONE)}
    checkpoints.write_csv(OUT_DIR / "align_faces.csv", [dict.fromkeys(COLUMNS, "") | row for row in rows])
    with checkpoints.atomic_file(OUT_DIR / "no_face.txt") as file:
        file.write("".join(f"{row['path']}\n" for row in of[NO_FACE]).encode())
    sheet = bool(SHEET and of[CUT])
    if sheet:
        shown = random.Random(SEED).sample(of[CUT], min(SHEET, len(of[CUT])))
        with checkpoints.atomic_file(OUT_DIR / "align_faces.png") as file:
            contact_sheet(shown, SHEET_CELL).save(file, "PNG")

    photos = len(rows) - len(of[GONE]) - len(of[LEFT_OUT])
    print(f"{OUT_DIR}: {len(of[CUT])} of {photos} photos cut; {processed} processed in this run")
    several = [row for row in of[CUT] if row["box_of"] == row["path"] and int(row["faces"]) > 1]
    borrowed = [row for row in of[CUT] if row["box_of"] != row["path"]]
    print_rows(several, f"with several faces, of which the {WHICH} one was cut")
    print_rows(borrowed, "cut at the face of their clean photo")
    print_rows(of[NO_FACE], f"without a face, all listed in {OUT_DIR / 'no_face.txt'}")
    print_rows(of[UNREADABLE], "unreadable")
    if of[LEFT_OUT]:
        print("  " + describe_left_out(IN_DIR, {IN_DIR / row["path"]: row["reason"] for row in of[LEFT_OUT]}))
    print_rows(of[GONE], f"no longer in {IN_DIR}, with crops still in {OUT_DIR}")
    examples = f"; examples: {OUT_DIR / 'align_faces.png'}" if sheet else ""
    print(f"a row per photo: {OUT_DIR / 'align_faces.csv'}{examples}")
    return {done: len(found) for done, found in of.items()}


def print_rows(rows: Sequence[Row], what: str, most: int = 5) -> None:
    """Print how many `rows` there are, with the first few and their reasons; nothing if there are none."""
    if rows:
        names = [row["path"] + (f" ({row['reason']})" if row["reason"] else "") for row in rows[:most]]
        more = f" and {len(rows) - most} more" if len(rows) > most else ""
        print(f"  {len(rows)} {what}: {', '.join(names)}{more}")


def contact_sheet(rows: Sequence[Row], cell: int) -> Image.Image:
    """Each photo with its box, beside its crop: three such pairs per line, each picture within `cell` px."""
    pairs, caption = 3, 14
    lines = -(-len(rows) // pairs)
    sheet = Image.new("RGB", (2 * pairs * cell, lines * (cell + caption)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, row in enumerate(rows):
        x, y = index % pairs * 2 * cell, index // pairs * (cell + caption)
        photo, crop = load_image(IN_DIR / row["path"]), load_image(OUT_DIR / row["target"])
        scale = cell / max(photo.size)
        photo = photo.resize([max(1, round(side * scale)) for side in photo.size])
        ImageDraw.Draw(photo).rectangle([value * scale for value in box_of(row)], outline="red", width=2)
        sheet.paste(photo, (x, y))
        sheet.paste(crop.resize((cell, cell)), (x + cell, y))
        name = common.safe_text(Path(row["path"]).name)[: 2 * cell // 7]
        draw.text((x + 2, y + cell), name, "black", ImageFont.truetype(font_file(name), 10))
    return sheet


if __name__ == "__main__":
    common.run_script(main)
