"""Who is in these photos? A name and a cosine, 'unknown', or 'not usable', from a gallery that is kept between runs.

    python identify.py

Adds the photos of ENROLL that GALLERY does not hold yet. On CALIBRATE_ON it chooses the cosine below which a face is
'unknown' and the quality below which a photo is 'not usable'. Then it identifies PHOTOS, prints a table, and writes
JSON_LINES and ANNOTATED.
"""

import json
import math
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

import checkpoints
import common
import enrolment
from common import UserError
from datasets import Person, scan_persons
from faces import NO_FACE, UNREADABLE, Box, FaceDetector, Label, Reading, draw_labels, read_faces
from folders import photos_below
from gallery import Gallery, embed, embed_split, made_by
from scores import check_template
from transforms import FaceCrop, eval_transform, load_image

# --- the photos to identify ---
PHOTOS = [Path("photos")]  # photos, and folders with photos at any depth; []: only update the gallery
TOP = 1  # most similar persons to show for each face, >= 1

# --- the gallery ---
GALLERY = Path("gallery.pt")  # read if it exists, written if it changes: embeddings and names, no photos
ENROLL = None  # Path of a folder of persons, such as train/ or val/: clean photos that are not in GALLERY are added
REMOVE = ()  # names of persons to take out of GALLERY and not to enroll
TEMPLATE = "mean"  # of a person's embeddings, or "best" match among them
ENROLL_UNUSABLE = False  # True: also enroll photos that are not usable; other bad photos will resemble them

# --- when is a face 'unknown'? ---
FALSE_ACCEPT = 0.01  # share of strangers' photos that may get a name, above 0 and below 1
CALIBRATE_ON = Path("Task_B/val")  # a split framed like PHOTOS with >= 10 / FALSE_ACCEPT distorted photos, used once;
# None: keep the thresholds of GALLERY; if it has none, every face gets a name
# Share of CALIBRATE_ON's clean photos, the worst, that may be called not usable, 0..0.2; None: every photo is usable.
REFUSE = 0.01

# --- the network ---
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
PRETRAINED = "vggface2"  # only for None: "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # only for None: pixels, 76..160
FACE_CROP = 0.52  # only for None: centre share of the shorter side that is kept, 0.3..1

# --- loose photos ---
FIND_FACES = False  # True: cut out the faces of PHOTOS, ENROLL and CALIBRATE_ON first, instead of FACE_CROP
MARGIN = 0.06  # share of the face's box that is added to it, 0..3: frame faces as in training; 0.06 is FACE_CROP = 0.52
# for LFW-like photos, and the MARGIN of tools/align_faces.py
MIN_PROBABILITY = 0.9  # that it is a face, 0..1; a lower value finds more faces, and more that are none
MIN_FACE = 20  # px, side of the smallest face searched for, >= 12

# --- output ---
JSON_LINES = None  # Path of a file: a JSON object per face, see Answer
ANNOTATED = None  # Path of a folder outside PHOTOS: each photo with its faces in labelled boxes
ANNOTATED_SIDE = 1024  # px, longer side of those pictures, 200..4096

# --- speed ---
BATCH_SIZE = 64  # faces embedded at a time, >= 1
NUM_WORKERS = 2  # processes that load images, 0..CPU cores

NAMED, UNKNOWN, UNUSABLE = "named", "unknown", "not usable"  # beside faces.NO_FACE and UNREADABLE
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
    box: Box | None = None  # left, top, right, bottom in pixels of the upright photo, with FIND_FACES
    reason: str | None = None  # why the photo is unreadable or not usable
    quality: float | None = None  # of the photo, if the model rates it


def main() -> list[Answer]:
    """Update the gallery, identify PHOTOS, print and write the answers; returns them."""
    check_constants()
    photos = collect_photos(PHOTOS)
    reader = FaceReader(common.pick_device())
    saved = enrolment.load_gallery(GALLERY, reader.made_by) if GALLERY.is_file() else None
    threshold = find_threshold(saved, reader)  # first: it may fail, and does not depend on who is enrolled
    gallery = remove_persons(enroll_new(saved, reader, quality_bound(threshold)))
    gallery = replace(gallery, template=TEMPLATE, threshold=threshold)
    changed = saved is None or state_of(gallery) != state_of(saved)
    if changed and common.is_main():  # one of several processes writes
        enrolment.save_gallery(GALLERY, gallery)
    size = f"{counted(len(gallery.paths), 'photo')} of {counted(len(gallery.persons), 'person')}"
    print(f"{GALLERY}: {size}{', saved' * changed}")
    print(enrolment.describe_threshold(gallery))

    answers = identify_photos(gallery, photos, reader)
    if answers:
        print(table(answers))
    if common.is_main():
        if JSON_LINES is not None:
            write_json_lines(JSON_LINES, answers)
        if ANNOTATED is not None:
            annotate(ANNOTATED, answers, reader.crop.fraction)
    return answers


def check_constants() -> None:
    """Raise UserError, before anything slow, for a missing file or folder, or a value out of range."""
    check_template(TEMPLATE)
    enrolment.check_false_accept(FALSE_ACCEPT)
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
                    f"ANNOTATED = {ANNOTATED}: lies in {folder}, so the next run would identify its pictures too; "
                    "choose a folder outside PHOTOS"
                )


def collect_photos(places: Sequence[Path | str]) -> list[Path]:
    """The photos at `places` in the order given, each once: files of any suffix, and the visible photos of folders.

    Photos of a folder, at any depth, come sorted. Raises UserError for a path that does not exist, or if there is no
    photo.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"PHOTOS: {place}: no such photo or folder")
        if place.is_dir():
            found += photos_below(place)
        else:
            found.append(place)
    if places and not found:
        raise UserError(f"PHOTOS: no photo in {', '.join(map(str, places))}; give photos, or folders with photos")
    once = {path.resolve(): path for path in reversed(found)}  # reversed: the first of equals stays
    photos = [path for path in found if once[path.resolve()] is path]
    if len(photos) < len(found):
        print(f"PHOTOS: {len(found) - len(photos)} of {len(found)} photos are repeats, skipped")
    return photos


# --- photo -> face -> embedding ---------------------------------------------------------------------------------------


class FaceReader:
    """The network on `device`, the crop that it was trained with and, with FIND_FACES, the face detector.

    made_by: what embeddings must share to be compared (gallery.made_by), and how faces are found.
    Raises what load_model raises; UserError for a crop or detector constant out of range.
    """

    def __init__(self, device: torch.device):
        self.model, facts = checkpoints.load_model(
            CHECKPOINT, pretrained=PRETRAINED, image_size=IMAGE_SIZE, face_crop=FACE_CROP, device=device
        )
        size, fraction = facts["image_size"], facts["face_crop"]
        self.device, self.detector = device, None
        if FIND_FACES:
            torch.backends.cudnn.benchmark = False  # the photos that the detector sees differ in shape
            self.detector, fraction = FaceDetector(device, min_face=MIN_FACE, min_probability=MIN_PROBABILITY), 1.0
        self.crop, self.transform = FaceCrop(size, fraction), eval_transform(size, fraction)
        self.made_by = made_by(self.model, size, fraction) | {"find_faces": MARGIN if FIND_FACES else None}

    def read(self, photos: Sequence[Path], folder: Path, most: int | None = None) -> list[Reading]:
        """See faces.read_faces."""
        return read_faces(photos, folder, detector=self.detector, crop=self.crop, margin=MARGIN, most=most)

    def embed(
        self, photos: Sequence[Path], description: str, *, bound: float, most: int | None = None
    ) -> tuple[list[Reading], Tensor]:
        """`read`, and the embeddings (N, D) of the N faces to use, in the order of the readings without a status.

        bound: the lowest quality of a usable face, where the model rates faces.
        """
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
        if found.quality is None:
            return readings, found.embeddings
        ratings = iter(found.quality.tolist())
        readings = [rate(reading, next(ratings), bound) if reading.file else reading for reading in readings]
        usable = [reading.status is None for reading in readings if reading.file]
        return readings, found.embeddings[torch.tensor(usable, dtype=torch.bool)]


def rate(reading: Reading, quality: float, bound: float) -> Reading:
    """`reading` with its quality; not usable below `bound`."""
    if quality >= bound:
        return replace(reading, quality=quality)
    return replace(reading, quality=quality, status=UNUSABLE, reason=f"quality {quality:.2f}, below {bound:.2f}")


# --- the gallery ------------------------------------------------------------------------------------------------------


def find_threshold(gallery: Gallery | None, reader: FaceReader) -> dict | None:
    """The gallery's threshold if it was found for FALSE_ACCEPT, TEMPLATE, REFUSE and CALIBRATE_ON, else a new one.

    None if CALIBRATE_ON is None and the gallery has no threshold. Raises what enrolment.calibrate raises; UserError if
    CALIBRATE_ON has no distorted photo, or is None while the gallery was calibrated with other settings.
    """
    held = gallery.threshold if gallery is not None else None
    fits = held is not None and (held["far"], held["template"], held["refuse"]) == (FALSE_ACCEPT, TEMPLATE, REFUSE)
    if fits and (CALIBRATE_ON is None or held["source"] == str(CALIBRATE_ON)):
        return held
    if CALIBRATE_ON is None:
        if held is not None:
            raise UserError(
                f"{GALLERY}: was calibrated with FALSE_ACCEPT = {held['far']}, TEMPLATE = {held['template']!r}, "
                f"REFUSE = {held['refuse']}, now {FALSE_ACCEPT}, {TEMPLATE!r} and {REFUSE}; set them back, or set "
                "CALIBRATE_ON"
            )
        return None
    if not CALIBRATE_ON.is_dir():
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no such folder; correct it, or set it to None to keep the threshold of "
            f"{GALLERY}"
        )
    persons = scan_persons(CALIBRATE_ON)
    if not any(person.distorted for person in persons):
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no distorted photo to use as a query; expected "
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
    return enrolment.calibrate(others, queries, far=FALSE_ACCEPT, source=str(CALIBRATE_ON), refuse=REFUSE)


def cut_faces(persons: Sequence[Person], folder: Path, reader: FaceReader) -> list[Person]:
    """`persons` with the largest face of each photo, cut out into `folder`, in place of the photo.

    Photos without a face are left out and counted. Raises UserError if no clean photo, or no distorted one, shows one.
    """
    photos = [photo for person in persons for photo in person.clean + person.distorted]
    cut = {reading.photo: reading.file for reading in reader.read(photos, folder, most=1) if reading.file}
    print(f"{CALIBRATE_ON}: a face found in {len(cut)} of {len(photos)} photos, the others left out")

    def of(photos: Sequence[Path]) -> tuple[Path, ...]:
        return tuple(cut[photo] for photo in photos if photo in cut)

    found = [Person(person.name, clean=of(person.clean), distorted=of(person.distorted)) for person in persons]
    for part in ("clean", "distorted"):
        if not any(getattr(person, part) for person in found):
            raise UserError(f"CALIBRATE_ON = {CALIBRATE_ON}: no face found in any of its {part} photos")
    return found


def quality_bound(threshold: dict | None) -> float:
    """The lowest quality of a usable photo, by a threshold of enrolment.calibrate; without one, any is usable."""
    bound = threshold and threshold["quality"]
    return -math.inf if bound is None else bound


def enroll_new(gallery: Gallery | None, reader: FaceReader, bound: float) -> Gallery:
    """`gallery` (None: a new one) with the clean photos of ENROLL that it does not hold, except of persons in REMOVE.

    The largest face of a photo counts. Photos without one, unreadable ones and, unless ENROLL_UNUSABLE, those of a
    quality below `bound` are reported. Raises what scan_persons raises; UserError for a name in REMOVE that is nowhere,
    or if there is neither a gallery nor a photo for one.
    """
    persons = scan_persons(ENROLL, check_images=False) if ENROLL is not None else []
    check_removals(persons, gallery)
    new = enrolment.new_photos(gallery, [person for person in persons if person.name not in REMOVE])
    if not new:
        if gallery is None:
            raise UserError(f"ENROLL = {ENROLL}: no clean photo to enroll; expected {ENROLL}/<person>/*.jpg")
        return gallery
    bound = -math.inf if ENROLL_UNUSABLE else bound
    readings, embeddings = reader.embed(list(new), "enrolling", bound=bound, most=1)
    for reading in readings:
        if reading.status is not None:
            reason = f" ({reading.reason})" if reading.reason else ""
            hint = "; ENROLL_UNUSABLE = True enrolls it" if reading.status == UNUSABLE else ""
            print(printable(f"{reading.photo}: {reading.status}{reason}, not enrolled{hint}"))
    used = [reading for reading in readings if reading.status is None]
    if not used:
        if gallery is None:
            raise UserError(f"ENROLL = {ENROLL}: none of its clean photos shows a usable face; add others")
        return gallery
    rated = used[0].quality is not None
    if gallery is None:
        gallery = enrolment.empty_gallery(embeddings.shape[1], template=TEMPLATE, made_by=reader.made_by, rated=rated)
    enrolled = enrolment.enroll(
        gallery,
        embeddings,
        persons=[new[reading.photo] for reading in used],
        paths=[reading.photo for reading in used],
        quality=torch.tensor([reading.quality for reading in used]) if rated else None,
    )
    print(f"{ENROLL}: {counted(len(enrolled.paths) - len(gallery.paths), 'photo')} enrolled")
    return enrolled


def check_removals(persons: Sequence[Person], gallery: Gallery | None) -> None:
    """Raise UserError for a name in REMOVE that is neither in ENROLL nor in the gallery."""
    known = {person.name for person in persons} | set(gallery.persons if gallery is not None else ())
    for name in REMOVE:
        if name not in known:
            places = [str(ENROLL)] * (ENROLL is not None) + [str(GALLERY)] * (gallery is not None)
            raise UserError(f"REMOVE: {name!r} is not in {' or '.join(places)}{enrolment.did_you_mean(name, known)}")


def remove_persons(gallery: Gallery) -> Gallery:
    """`gallery` without the persons in REMOVE. Raises UserError if no person would be left."""
    for name in REMOVE:
        if name in gallery.persons:
            gallery = enrolment.remove(gallery, name)
    return gallery


def state_of(gallery: Gallery) -> tuple:
    """What differs if a gallery has changed: embeddings come and go with their photos."""
    return enrolment.names_of(gallery), gallery.paths, gallery.template, gallery.threshold


# --- answers ----------------------------------------------------------------------------------------------------------


def identify_photos(gallery: Gallery, photos: Sequence[Path], reader: FaceReader) -> list[Answer]:
    """An answer for each face, in the order of the photos, the largest face first; one for a photo that shows none."""
    readings, embeddings = reader.embed(photos, "photos", bound=quality_bound(gallery.threshold))
    threshold = gallery.threshold["cosine"] if gallery.threshold else None
    similar = enrolment.similar_persons(gallery, embeddings, TOP) if TOP > 1 else [[]] * len(embeddings)
    found = zip(enrolment.identify(gallery, embeddings), similar, strict=True)
    answers = []
    for reading in readings:
        answer = Answer(
            photo=str(reading.photo),
            status=reading.status or UNKNOWN,
            threshold=threshold,
            box=reading.box,
            reason=reading.reason,
            quality=reading.quality,
        )
        if reading.status is None:
            (person, score, resembles), persons = next(found)
            others = [{"person": name, "score": cosine} for name, cosine in persons if name != resembles]
            answer = replace(answer, score=score, resembles=resembles, others=others[: TOP - 1])
            if person is not None:
                answer = replace(answer, status=NAMED, person=person)
        answers.append(answer)
    return answers


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
    lines = [[printable(cell) for cell in line] for line in lines]
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell + " " * (most - width(cell)) for cell, most in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    counts = Counter(answer.status for answer in answers)
    parts = [f"{counts[NAMED]} named", f"{counts[UNKNOWN]} unknown"]
    rest = {UNUSABLE: "not usable", NO_FACE: "without a face", UNREADABLE: "unreadable"}
    parts += [f"{counts[status]} {what}" for status, what in rest.items() if counts[status]]
    photos = len({answer.photo for answer in answers})
    return "\n".join([*text, f"{counted(photos, 'photo')}: {', '.join(parts)}"])


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def printable(text: str) -> str:
    """`text` with \\-escapes for what a terminal cannot show or would obey, such as a newline in a file's name."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def width(text: str) -> int:
    """Columns on a terminal: two for a wide character (Chinese, emoji), none for an accent that joins its letter."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def write_json_lines(path: Path, answers: Sequence[Answer]) -> None:
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    with checkpoints.atomic_file(path) as file:
        # Bytes of a file's name that are not UTF-8 become \udcff and the like, which JSON can hold.
        file.write(lines.encode("utf-8", "backslashreplace"))


def annotate(folder: Path, answers: Sequence[Answer], fraction: float) -> None:
    """Write a picture of each readable photo, `<number>_<its name>.jpg`: each face in its box with the answer.

    fraction: share of the shorter side in the box of a photo without a face's box, which is what the crop keeps.
    """
    by_photo: dict[str, list[Answer]] = {}
    for answer in answers:
        by_photo.setdefault(answer.photo, []).append(answer)
    written = 0
    for number, (photo, faces) in enumerate(by_photo.items(), start=1):
        if faces[0].status == UNREADABLE:
            continue
        image = load_image(Path(photo))
        labels = [label_of(face, image.size, fraction) for face in faces]
        # At most 255 bytes in a file's name.
        with checkpoints.atomic_file(folder / f"{number:04d}_{Path(photo).stem[:50]}.jpg") as file:
            picture = draw_labels(image, labels, ANNOTATED_SIDE)
            picture.save(file, "JPEG", quality=90, subsampling=0)  # thin lines keep their colour
        written += 1
    print(f"{folder}: {counted(written, 'picture')}")


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


if __name__ == "__main__":
    common.run_script(main)
