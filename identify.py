"""Who is on these photos? A name and a cosine, 'unknown', or 'not usable', from a gallery that is kept between runs.

    python identify.py

Chooses on CALIBRATE_ON the quality below which a photo is 'not usable' and the cosine below which an answer is
'unknown', enrolls the photos of ENROLL that GALLERY does not hold yet, keeps all in GALLERY, and prints a table;
JSON_LINES and ANNOTATED write the answers down.
"""

import contextlib
import json
import math
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import checkpoints
import common
import metrics
from common import UserError
from datasets import CLEAN, DISTORTION, Person, find_photos, find_unreadable, scan_persons
from enrolment import calibrate, enroll, identify, load_gallery, remove, save_gallery
from faces import Box, FaceDetector, crop_face
from gallery import Gallery, check_template, embed, embed_split, made_by
from transforms import FaceCrop, eval_transform, load_image

# --- who is asked for ---
PHOTOS = [Path("photos")]  # photos, and folders with photos at any depth; []: only the gallery is kept up
TOP = 1  # most similar persons to show of each face, >= 1

# --- the gallery ---
GALLERY = Path("gallery.pt")  # read if it is there, written if it changes: embeddings and names, no photos
ENROLL = None  # Path of a folder of persons, train/ or val/ for one: clean photos that are not in GALLERY are added
REMOVE = ()  # names of persons to take out of GALLERY and not to enroll
TEMPLATE = "mean"  # of a person's embeddings, or "best" match among them
ENROLL_UNUSABLE = False  # True: yes, enroll photos that are not usable too, though they look like everybody's bad ones

# --- when is an answer 'unknown'? ---
FALSE_ACCEPT = 0.01  # share of strangers' photos that may be given a name, above 0 and below 1
CALIBRATE_ON = Path("Task_B/val")  # a split with >= 10 / FALSE_ACCEPT distorted photos, framed like PHOTOS, once for
# all; None: the thresholds that GALLERY holds, and where it holds none every face is given a name
# Share of CALIBRATE_ON's clean photos, the worst, that sets the quality of a usable one, 0..0.2; None: any is usable.
REFUSE = 0.01

# --- the network ---
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
PRETRAINED = "vggface2"  # only for None: "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # only for None: pixels, 76..160
FACE_CROP = 0.52  # only for None: centre share of the shorter side that is kept, 0.3..1

# --- loose photos ---
FIND_FACES = False  # True: cut out the faces first, of PHOTOS, ENROLL and CALIBRATE_ON; takes the place of FACE_CROP
MARGIN = 0.06  # share of a face's box that is added to it, 0..3: frame faces as in training; 0.06 is FACE_CROP = 0.52
# of LFW-like photos, and what align_faces.py cuts
MIN_PROBABILITY = 0.9  # that it is a face, 0..1; lower finds more faces and more that are none
MIN_FACE = 20  # px, side of the smallest face looked for, >= 12

# --- what is written ---
JSON_LINES = None  # Path of a file: a JSON object per face, see answers()
ANNOTATED = None  # Path of a folder outside PHOTOS: each photo with its faces framed and named
ANNOTATED_SIDE = 1024  # px, longer side of those pictures, 200..4096

# --- speed ---
BATCH_SIZE = 64  # faces embedded at a time, >= 1
NUM_WORKERS = 2  # processes that load images, 0..CPU cores

NAMED, UNKNOWN, NO_FACE, UNREADABLE = "named", "unknown", "no face", "unreadable"
UNUSABLE = "not usable"


def main() -> list[dict]:
    """Keep the gallery up, ask it, print the table, write the files; returns the rows of `answers`."""
    check_constants()
    photos = collect_photos(PHOTOS)
    reader = FaceReader(common.pick_device())
    before = load_gallery(GALLERY, reader.made_by) if GALLERY.is_file() else None
    threshold = find_threshold(before, reader)  # first: it does not depend on who is enrolled, and may fail
    gallery = remove_persons(REMOVE, enroll_new(before, reader, quality_bound(threshold)))
    gallery = replace(gallery, template=TEMPLATE, threshold=threshold)
    changed = before is None or state_of(gallery) != state_of(before)
    if changed and common.is_main():  # of several processes one writes
        save_gallery(GALLERY, gallery)
    print(describe(gallery, changed))

    rows = answers(gallery, photos, reader)
    if rows:
        print(table(rows))
    if common.is_main():
        if JSON_LINES is not None:
            write_json_lines(JSON_LINES, rows)
        if ANNOTATED is not None:
            annotate(ANNOTATED, rows, reader)
    return rows


def check_constants() -> None:
    """Raise before anything slow: UserError for a missing file or folder, or a value out of range."""
    check_template(TEMPLATE)
    ranges = {
        "TOP": (TOP, int, 1, 10**6),
        "MARGIN": (MARGIN, float, 0, 3),
        "ANNOTATED_SIDE": (ANNOTATED_SIDE, int, 200, 4096),
        "BATCH_SIZE": (BATCH_SIZE, int, 1, 10**6),
        "NUM_WORKERS": (NUM_WORKERS, int, 0, 1000),
    }
    for name, (value, kind, low, high) in ranges.items():
        if not common.in_range(value, kind, low, high):
            raise UserError(f"{name} = {value!r}: expected a {'whole ' * (kind is int)}number in {low}..{high}")
    if REFUSE is not None and not common.in_range(REFUSE, float, 0, 0.2):
        raise UserError(f"REFUSE = {REFUSE!r}: expected a share of clean photos, 0..0.2, such as 0.01, or None")
    if not isinstance(FALSE_ACCEPT, float) or not 0 < FALSE_ACCEPT < 1:
        raise UserError(
            f"FALSE_ACCEPT = {FALSE_ACCEPT!r}: expected a share of strangers, above 0 and below 1, such as 0.01"
        )
    for name, value in (("PHOTOS", PHOTOS), ("REMOVE", REMOVE)):
        if isinstance(value, (str, Path)):
            raise UserError(f"{name} = {str(value)!r}: expected a list, [{str(value)!r}]")
    if ENROLL is not None and not ENROLL.is_dir():
        raise UserError(f"ENROLL = {ENROLL}: no such folder; correct it, or set it to None")
    if ENROLL is None and not GALLERY.is_file():
        raise UserError(f"{GALLERY}: no gallery; set ENROLL to a folder of persons to make one, or correct GALLERY")
    if ANNOTATED is not None:
        for folder in PHOTOS:
            if Path(folder).is_dir() and ANNOTATED.resolve().is_relative_to(Path(folder).resolve()):
                raise UserError(
                    f"ANNOTATED = {ANNOTATED}: lies in {folder}, where the next run would ask who is on its pictures; "
                    "choose a folder outside PHOTOS"
                )


def collect_photos(places: Sequence[Path | str]) -> list[Path]:
    """The photos of PHOTOS in the order given, those of a folder sorted, hidden ones passed over, each once (told).

    A file that is named itself is taken whatever its suffix. Raises UserError for a path that is not there, or if no
    photo is.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"PHOTOS: {place}: no such photo or folder")
        if place.is_dir():
            below = sorted(path for path in place.rglob("*") if path.is_dir())
            seen = [path for path in below if not any(p.startswith(".") for p in path.relative_to(place).parts)]
            found += [photo for folder in (place, *seen) for photo in find_photos(folder)]
        else:
            found.append(place)
    if places and not found:
        raise UserError(f"PHOTOS: no photo in {', '.join(map(str, places))}; name photos, or folders that hold some")
    once = {path.resolve(): path for path in reversed(found)}  # reversed: the first of equals stays
    photos = [path for path in found if once[path.resolve()] is path]
    if len(photos) < len(found):
        print(f"PHOTOS: {len(found) - len(photos)} of {len(found)} are there twice, asked once")
    return photos


# --- seeing: photo -> face -> embedding -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What is seen of a photo. file: what the network is shown, None if there is nothing, and `status` says why.

    box: of the face in pixels of the upright photo, where faces are looked for. reason: why it is unreadable.
    """

    photo: Path
    status: str | None = None
    reason: str | None = None
    box: Box | None = None
    file: Path | None = None


class FaceReader:
    """The network on `device`, with the framing that it knows and, with FIND_FACES, the detector.

    made_by: what embeddings must share to be compared (gallery.made_by), the way that faces are framed included.
    Raises what load_model raises; ValueError for a crop or detector constant out of range.
    """

    def __init__(self, device: torch.device):
        self.model, facts = checkpoints.load_model(CHECKPOINT, PRETRAINED, IMAGE_SIZE, FACE_CROP, device)
        size, fraction = facts["image_size"], facts["face_crop"]
        self.device, self.detector = device, None
        if FIND_FACES:
            torch.backends.cudnn.benchmark = False  # to the detector no two photos need have the same shape
            self.detector, fraction = FaceDetector(device, MIN_FACE, MIN_PROBABILITY), 1.0
        self.crop, self.transform = FaceCrop(size, fraction), eval_transform(size, fraction)
        self.made_by = made_by(self.model, size, fraction) | {"find_faces": MARGIN if FIND_FACES else None}

    def read(self, photos: Sequence[Path], folder: Path, most: int | None) -> list[Reading]:
        """A Look for each face, largest first, `most` of a photo (None: all), or one without `file` if there is none.

        Faces are written to `folder` as the network will see them. Without FIND_FACES each photo is one face.
        """
        unreadable = find_unreadable(photos)
        readings = []
        quiet = self.detector is None or len(photos) < 3
        for number, photo in enumerate(tqdm(photos, desc="faces", unit="photo", leave=False, disable=quiet)):
            if photo in unreadable:
                readings.append(Reading(photo, UNREADABLE, reason=unreadable[photo]))
            elif self.detector is None:
                readings.append(Reading(photo, file=photo))
            else:
                image = load_image(photo)
                found = self.detector.find(image)[:most]
                for index, face in enumerate(found):
                    file = folder / f"{number}_{index}.png"
                    self.crop(crop_face(image, face.box, MARGIN)).save(file)
                    readings.append(Reading(photo, box=face.box, file=file))
                if not found:
                    readings.append(Reading(photo, NO_FACE))
        return readings

    def embed(
        self, photos: Sequence[Path], description: str, most: int | None = None
    ) -> tuple[list[Reading], Tensor, Tensor | None]:
        """What `look` sees of the photos, and of those N that have a `file`, in their order, the embeddings (N, D) and
        the quality (N,), see models.FaceNet; None of a model that does not rate."""
        with tempfile.TemporaryDirectory() as folder:
            readings = self.read(photos, Path(folder), most)
            files = [reading.file for reading in readings if reading.file]
            found = embed(
                self.model,
                files,
                self.transform,
                self.device,
                batch_size=BATCH_SIZE,
                num_workers=NUM_WORKERS if len(files) > BATCH_SIZE else 0,
                description=description,
            )
            return readings, found.embeddings, found.quality


# --- the gallery ------------------------------------------------------------------------------------------------------


def quality_bound(threshold: dict | None) -> float:
    """Of a usable photo, by the `threshold` of enrolment.calibrate; without one every photo is."""
    least = threshold and threshold["quality"]
    return -math.inf if least is None else least


def enroll_new(gallery: Gallery | None, reader: FaceReader, least: float) -> Gallery:
    """`gallery` (None: a new one) with the clean photos of ENROLL that it does not hold, those of REMOVE left out, and
    without ENROLL_UNUSABLE those of a quality under `least`.

    Of several faces in a photo the largest counts; photos without one, unreadable and unusable ones are told.
    Raises what scan_persons raises; ValueError if there is neither a gallery nor a photo to make one of, or for a name
    in REMOVE that is in neither place.
    """
    persons = scan_persons(ENROLL, check_images=False) if ENROLL is not None else []
    here = {person.name for person in persons}
    for name in REMOVE:
        if name not in here and gallery is not None:
            with error_prefix("REMOVE: "):
                remove(gallery, name) if name not in gallery.persons else None
        elif name not in here:
            raise UserError(f"REMOVE: {name!r} is not in {ENROLL}, and there is no gallery yet")
    there = set()
    if gallery is not None:
        names = (gallery.persons[label] for label in gallery.labels.tolist())
        there = {(name, path.resolve()) for name, path in zip(names, gallery.paths, strict=True)}
    new = {
        photo: person.name
        for person in persons
        for photo in person.clean
        if person.name not in REMOVE and (person.name, photo.resolve()) not in there
    }
    if not new and gallery is None:
        raise UserError(f"ENROLL = {ENROLL}: no clean photo to enroll; expected {ENROLL}/<person>/*.jpg")
    if not new:
        return gallery
    readings, embeddings, quality = reader.embed(list(new), "enrolling", most=1)
    for reading in readings:
        if reading.file is None:
            reason = f" ({reading.reason})" if reading.reason else ""
            print(printable(f"{reading.photo}: {reading.status}{reason}, not enrolled"))
    photos = [reading.photo for reading in readings if reading.file]
    if quality is not None and not ENROLL_UNUSABLE:
        usable = quality >= least
        for photo, rating, kept in zip(photos, quality.tolist(), usable.tolist(), strict=True):
            if not kept:
                told = f"{UNUSABLE} (quality {rating:.2f} of {least:.2f}), not enrolled; ENROLL_UNUSABLE = True does"
                print(printable(f"{photo}: {told}"))
        photos = [photo for photo, kept in zip(photos, usable.tolist(), strict=True) if kept]
        embeddings, quality = embeddings[usable], quality[usable]
    if not photos and gallery is None:
        raise UserError(f"ENROLL = {ENROLL}: none of its {len(new)} clean photos shows a usable face; add others")
    if not photos:
        return gallery
    facts = {"template": TEMPLATE, "made_by": reader.made_by}
    enrolled = enroll(gallery, embeddings, [new[photo] for photo in photos], photos, quality, **facts)
    before = len(gallery.paths) if gallery is not None else 0
    print(f"{ENROLL}: {len(enrolled.paths) - before} photos enrolled")
    return enrolled


@contextlib.contextmanager
def error_prefix(constant: str):
    """Put the constant in front of a ValueError's sentence."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{constant}{error}") from error


def remove_persons(names: Collection[str], gallery: Gallery) -> Gallery:
    """`gallery` less the persons of these names that it holds. Raises ValueError if nobody else is left."""
    for name in names:
        if name in gallery.persons:
            with error_prefix("REMOVE: "):
                gallery = remove(gallery, name)
    return gallery


def state_of(gallery: Gallery) -> tuple:
    """What may differ between a gallery and the one that it came from: embeddings go with their paths and persons."""
    names = [gallery.persons[label] for label in gallery.labels.tolist()]
    return names, gallery.paths, gallery.template, gallery.threshold


def find_threshold(gallery: Gallery | None, reader: FaceReader) -> dict | None:
    """The gallery's threshold if it stands for FALSE_ACCEPT, TEMPLATE and CALIBRATE_ON, else a new one; None for none.

    Raises what enrolment.calibrate raises; UserError if there is no folder CALIBRATE_ON or no distorted photo in it, or
    if it is None and the gallery was calibrated for something else.
    """
    held = gallery.threshold if gallery is not None else None
    fits = held is not None and (held["far"], held["template"], held["refuse"]) == (FALSE_ACCEPT, TEMPLATE, REFUSE)
    if fits and (CALIBRATE_ON is None or held["source"] == str(CALIBRATE_ON)):
        return held
    if CALIBRATE_ON is None:
        if held is not None:
            raise UserError(
                f"{GALLERY}: was calibrated for FALSE_ACCEPT = {held['far']}, TEMPLATE = {held['template']!r}, "
                f"REFUSE = {held['refuse']}, here {FALSE_ACCEPT}, {TEMPLATE!r} and {REFUSE}; set them back, or set "
                "CALIBRATE_ON"
            )
        return None
    if not CALIBRATE_ON.is_dir():
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no such folder; correct it, or None goes by the threshold of {GALLERY}"
        )
    persons = scan_persons(CALIBRATE_ON)
    if not any(person.distorted for person in persons):
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no distorted photo that could ask; expected "
            f"{CALIBRATE_ON}/<person>/distortion/*.jpg"
        )
    with tempfile.TemporaryDirectory() as folder:
        others, queries = embed_split(
            reader.model,
            cut_faces(persons, Path(folder), reader) if FIND_FACES else persons,
            reader.transform,
            reader.device,
            template=TEMPLATE,
            batch_size=BATCH_SIZE,
            num_workers=NUM_WORKERS,
        )
    with error_prefix("CALIBRATE_ON: "):
        return calibrate(others, queries, FALSE_ACCEPT, str(CALIBRATE_ON), REFUSE)


def cut_faces(persons: Sequence[Person], root: Path, reader: FaceReader) -> Path:
    """Put the largest face of each photo of `persons` into a tree at `root`, and return that; photos without one, which
    cannot ask, are counted aloud. Raises ValueError if no clean photo, or no distorted one, shows a face."""
    parts = {photo: (person.name, CLEAN) for person in persons for photo in person.clean}
    parts |= {photo: (person.name, DISTORTION) for person in persons for photo in person.distorted}
    found = Counter()
    for reading in reader.read(list(parts), root, most=1):
        if reading.file is not None:
            name, part = parts[reading.photo]
            (root / name / part).mkdir(parents=True, exist_ok=True)
            reading.file.rename(root / name / part / reading.file.name)
            found[part] += 1
    print(f"{CALIBRATE_ON}: a face found in {found.total()} of {len(parts)} photos, the others do not ask")
    for part, what in ((CLEAN, "clean"), (DISTORTION, "distorted")):
        if not found[part]:
            raise UserError(f"CALIBRATE_ON = {CALIBRATE_ON}: no face found in any of its {what} photos")
    return root


def describe(gallery: Gallery, changed: bool) -> str:
    """Who is in it, and what the threshold means."""
    saved = ", saved" if changed else ""
    lines = [f"{GALLERY}: {len(gallery.paths)} photos of {len(gallery.persons)} persons{saved}"]
    threshold = gallery.threshold
    if threshold is None:
        return "\n".join([*lines, "no threshold (CALIBRATE_ON = None): every face is given a name, a stranger's too"])
    lines.append(
        f"named from cosine {threshold['cosine']:.3f} on: at most {100 * threshold['far']:g} % of the "
        f"{threshold['strangers']} strangers' photos in {threshold['source']} are, among {threshold['persons']} persons"
    )
    if threshold["quality"] is not None:
        share, asked = 100 * threshold["refuse"], threshold["unusable"] + threshold["strangers"]
        lines.append(
            f"usable from quality {threshold['quality']:.2f} on, as all but {share:g} % of the clean photos there are, "
            f"and {threshold['strangers']} of the {asked} distorted ones"
        )
    times = len(gallery.persons) / threshold["persons"]
    if times >= 2:
        lines.append(
            f"  the gallery has {times:.1f} times as many persons, among whom a stranger finds a look-alike about that "
            "many times as often; calibrate on more persons, or lower FALSE_ACCEPT"
        )
    return "\n".join(lines)


# --- answers ----------------------------------------------------------------------------------------------------------


def answers(gallery: Gallery, photos: Sequence[Path], reader: FaceReader) -> list[dict]:
    """A row for each face, in the order of the photos, the largest face first; one for a photo that shows none:

        photo                   as given or found
        status                  "named", "unknown", "not usable", "no face" or "unreadable"
        person                  name, None unless named
        score, threshold        cosine with `resembles`, and what it has to reach; None: every face is named
        quality                 of the photo, None of a model that does not rate; too low and it is not usable: whom it
                                resembles says nothing then, and is left out
        resembles               the most similar person, named or not
        others                  [{person, score}], the TOP - 1 next ones
        box                     [left, top, right, bottom] in pixels of the upright photo; None without FIND_FACES
        reason                  why it is unreadable

    Where a value does not apply it is None.
    """
    readings, embeddings, quality = reader.embed(photos, "photos")
    threshold = gallery.threshold["cosine"] if gallery.threshold else None
    least, ratings = quality_bound(gallery.threshold), iter([] if quality is None else quality.tolist())
    next_best = ranked(gallery, embeddings) if TOP > 1 else [[]] * len(embeddings)
    found = zip(identify(gallery, embeddings), next_best, strict=True)
    rows = []
    for reading in readings:
        row = {
            "photo": str(reading.photo),
            "status": reading.status,
            "person": None,
            "score": None,
            "threshold": threshold,
        }
        row |= {"resembles": None, "others": [], "box": reading.box and list(reading.box), "reason": reading.reason}
        row |= {"quality": None}
        if reading.file is not None:
            (person, score, resembles), persons = next(found)
            row["quality"] = next(ratings, None)
            if row["quality"] is not None and row["quality"] < least:
                row |= {"status": UNUSABLE, "reason": f"quality {row['quality']:.2f} of {least:.2f}"}
                rows.append(row)
                continue
            row |= {"status": UNKNOWN if person is None else NAMED, "person": person, "score": score}
            others = [{"person": name, "score": cosine} for name, cosine in persons if name != resembles]
            row |= {"resembles": resembles, "others": others[: TOP - 1]}
        rows.append(row)
    return rows


def ranked(gallery: Gallery, embeddings: Tensor) -> list[list[tuple[str, float]]]:
    """For each embedding the TOP most similar persons with their cosines; equals in the order of their names."""
    nobody = torch.full((len(embeddings),), -1)
    inputs = (embeddings, nobody, nobody, gallery.weighted, gallery.labels, gallery.template)
    found = []
    for _, scores in metrics.person_scores(*inputs):
        values, labels = scores.sort(dim=1, descending=True, stable=True)
        for cosines, persons in zip(values[:, :TOP].tolist(), labels[:, :TOP].tolist(), strict=True):
            found.append([(gallery.persons[label], cosine) for label, cosine in zip(persons, cosines, strict=True)])
    return found


def table(rows: Sequence[dict]) -> str:
    """A line per row, columns aligned: photo, person, cosine, whom it resembles (besides); then the counts."""
    lines = [("photo", "person", "cosine", "resembles")]
    for row in rows:
        if row["score"] is None:
            lines.append((row["photo"], f"({row['status']})", "", row["reason"] or ""))
            continue
        like = [] if row["person"] else [row["resembles"]]
        like += [f"{other['person']} {other['score']:.3f}" for other in row["others"]]
        lines.append((row["photo"], row["person"] or "unknown", f"{row['score']:.3f}", ", ".join(like)))
    lines = [[printable(cell) for cell in line] for line in lines]
    wide = [max(map(width, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell + " " * (most - width(cell)) for cell, most in zip(line, wide, strict=True)).rstrip()
        for line in lines
    ]
    counts = Counter(row["status"] for row in rows)
    told = [f"{counts[UNKNOWN]} unknown", f"{counts[UNUSABLE]} not usable"]
    told += [f"{counts[NO_FACE]} without a face", f"{counts[UNREADABLE]} unreadable"]
    told = [f"{counts[NAMED]} named", told[0], *(text for text in told[1:] if text[0] != "0")]
    asked = len({row["photo"] for row in rows})
    return "\n".join([*text, f"{asked} photos: {', '.join(told)}"])


def printable(text: str) -> str:
    """`text` with \\-escapes for what the terminal cannot show or would obey, such as a newline in a file's name."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def width(text: str) -> int:
    """Columns on a terminal: two for a wide character (Chinese, emoji), none for an accent that joins its letter."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def write_json_lines(path: Path, rows: Sequence[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with checkpoints.atomic_file(path) as file:
        file.write(
            lines.encode("utf-8", "backslashreplace")
        )  # bytes of a file's name that are no UTF-8: \udcff is JSON


# --- annotated pictures -----------------------------------------------------------------------------------------------

COLOURS = {NAMED: "#1b7f3b", UNKNOWN: "#b3261e", UNUSABLE: "#555555", NO_FACE: "#555555"}


def annotate(folder: Path, rows: Sequence[dict], reader: FaceReader) -> None:
    """A picture of each readable photo, `<place among the photos>_<its name>.jpg`: no two get the same name."""
    by_photo: dict[str, list[dict]] = {}
    for row in rows:
        by_photo.setdefault(row["photo"], []).append(row)
    written = 0
    for number, (photo, faces) in enumerate(by_photo.items(), start=1):
        if faces[0]["status"] == UNREADABLE:
            continue
        picture = draw(load_image(Path(photo)), faces, reader)
        with checkpoints.atomic_file(folder / f"{number:04d}_{Path(photo).stem[:50]}.jpg") as file:  # 255 bytes at most
            picture.save(file, "JPEG", quality=90, subsampling=0)  # thin lines keep their colour
        written += 1
    print(f"{written} pictures: {folder}")


def draw(photo: Image.Image, faces: Sequence[dict], reader: FaceReader) -> Image.Image:
    """`photo`, ANNOTATED_SIDE px on its longer side, each face, or what the crop keeps, in a box with the answer."""
    scale = ANNOTATED_SIDE / max(photo.size)
    picture = photo.resize([max(1, round(side * scale)) for side in photo.size], Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    side = reader.crop.fraction * min(photo.size)
    middle = [(length - sign * side) / 2 for sign in (1, -1) for length in photo.size]  # left, top, right, bottom
    # Pillow's own font knows Latin letters only.
    font_file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    labels: list[tuple[float, float, float, float]] = []
    for face in faces:
        name, colour = face["person"] or face["status"], COLOURS[face["status"]]
        text = name.replace("\n", " ").encode("utf-8", "replace").decode()
        left, top, bottom = 0.0, 0.0, 0.0
        text += "" if face["score"] is None else f" {face['score']:.2f}"
        if face["status"] != NO_FACE:
            left, top, right, bottom = (value * scale for value in face["box"] or middle)
            pen.rectangle((left, top, right, bottom), outline=colour, width=max(2, ANNOTATED_SIDE // 300))
        size = max(10, ANNOTATED_SIDE // 36)
        font = ImageFont.truetype(str(font_file), size)
        size = max(10, min(size, int(size * picture.width / (font.getlength(text) + size))))  # a long name: smaller
        font = font.font_variant(size=size)
        wide, high = font.getlength(text) + size / 2, 1.4 * size
        x = max(0.0, min(left, picture.width - wide))
        for y in (max(0.0, top - high), max(0.0, min(bottom, picture.height - high))):  # above, or below a neighbour's
            label = (x, y, x + wide, y + high)
            if not any(a[0] < label[2] and label[0] < a[2] and a[1] < label[3] and label[1] < a[3] for a in labels):
                break
        labels.append(label)
        pen.rectangle(label, fill=colour)
        pen.text((x + size / 4, y + high / 2), text, "white", font, anchor="lm")
    return picture


if __name__ == "__main__":
    common.run_script(main)
