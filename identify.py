"""Who is in these photos? A name and a cosine, 'unknown', or 'not usable', from a gallery that is kept between runs.

    python identify.py                        # PHOTOS
    python identify.py photo.jpg folder/      # these instead

Adds the photos of ENROLL that GALLERY does not hold yet. On CALIBRATE_ON it chooses the cosine below which a face is
'unknown' and the quality below which a photo is 'not usable'. Then it identifies PHOTOS, prints a table, and writes
JSON_LINES and ANNOTATED.
"""

import contextlib
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import calibration
import checkpoints
import common
import enrolment
from answers import NAMED, UNKNOWN, Answer, annotate, counted, printable, table, write_json_lines
from changes import Changes, Photo, add_photos, content_of, find_changes
from common import UserError
from datasets import Person, photos_of, scan_persons
from embedding import embed
from faces import UNUSABLE, FaceDetector, Reading, rate, read_faces
from folders import collect_photos
from framing import Frames, check_framing, find_frames
from gallery import Gallery, embed_split, made_by
from pairs import PairAnswer, compare, pair_table, read_pairs
from scores import check_template
from transforms import FaceCrop, Transform, eval_transform, load_image

# --- the photos to identify ---
PHOTOS = [Path("photos")]  # photos, and folders with photos at any depth; []: only update the gallery
# Do two photos show the same person? [first, second], or the path of a CSV file with such a pair in each row; nothing
# else is done then. None: PHOTOS are identified.
PAIRS = None
TOP = 1  # most similar persons to show for each face, >= 1

# --- the gallery ---
GALLERY = Path("gallery.pt")  # read if it exists, written if it changes: embeddings and names, no photos
ENROLL = None  # Path of a folder of persons, such as train/ or val/: clean photos that are not in GALLERY are added
REMOVE = ()  # names of persons to take out of GALLERY and not to enroll
LIST = False  # True: print who is enrolled, with the number of photos
TEMPLATE = "mean"  # of a person's embeddings, or "best" match among them
ENROLL_UNUSABLE = False  # True: also enroll photos that are not usable; other bad photos will resemble them

# --- when is a face 'unknown'? ---
FALSE_ACCEPT = 0.01  # share of strangers' photos that may get a name, above 0 and below 1
# The checkpoint has a calibration of its own, made on the persons that its epoch was chosen on. More exact, for photos
# like yours: a split framed like PHOTOS with at least 10 / FALSE_ACCEPT distorted photos, used once. None: the
# thresholds that GALLERY has from an earlier split, or the checkpoint's calibration.
CALIBRATE_ON = None
THRESHOLD = None  # a cosine by hand, -1..1: a face is named from it on, whatever CALIBRATE_ON is
# Share of the clean photos of CALIBRATE_ON, the worst, that may be called not usable, 0..0.2; without CALIBRATE_ON it
# is the 1 % of the checkpoint's calibration. None: all photos are usable.
REFUSE = 0.01

# --- the network ---
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
PRETRAINED = "vggface2"  # only for None: "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # only for None: pixels, 76..160
FACE_CROP = 0.52  # only for None: side of the face crop, as in train_stage1.py
FRAMING = "detected"  # only for None: of the face, which is found; "centre": it is at the centre, see framing.py

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
NUM_WORKERS = "auto"  # processes that load images, 0..; "auto": one per core, at most 16


def main() -> list[Answer] | list[PairAnswer]:
    """Update the gallery, identify PHOTOS, write and print the answers; returns them. Or those on PAIRS."""
    common.resolve_constants(globals())
    check_constants()
    if PAIRS is not None:
        pairs = read_pairs(PAIRS)
        check_json_lines([photo for pair in pairs for photo in pair])
        return compare_pairs(pairs)
    photos = collect_photos("PHOTOS", PHOTOS)
    check_json_lines(photos)
    persons = scan_persons(ENROLL, check_images=False) if ENROLL is not None else []
    reader = FaceReader(common.pick_device())
    # One of several processes locks and writes.
    with checkpoints.locked(GALLERY, refusal=None) if common.is_main() else contextlib.nullcontext():
        saved = read_gallery(reader)
        threshold = find_threshold(saved, reader)  # first: it may fail, and hardly depends on who is enrolled
        gallery, lines = enroll_persons(saved, persons, reader, quality_bound(threshold))
        gallery, removals = remove_persons(gallery, persons)
        if threshold is not None and "pairs" in threshold:  # the checkpoint's, by the number of persons
            threshold = reader.threshold(len(gallery.persons), TEMPLATE)
        gallery = replace(gallery, template=TEMPLATE, threshold=threshold)
        changed = saved is None or enrolment.state_of(gallery) != enrolment.state_of(saved)
        if changed and common.is_main():
            checkpoints.check_writable("GALLERY", GALLERY, folder=False)
            enrolment.save_gallery(GALLERY, gallery)
    size = f"{counted(len(gallery.paths), 'photo')} of {counted(len(gallery.persons), 'person')}"
    lines += [*removals, f"{GALLERY}: {size}{', saved' * changed}", calibration.describe(gallery, FALSE_ACCEPT)]
    lines += list_persons(gallery) if LIST else []
    print("\n".join(lines))

    answers = identify_photos(gallery, photos, reader)
    if JSON_LINES is not None and common.is_main():
        write_json_lines(JSON_LINES, answers)
    if ANNOTATED is not None and common.is_main():
        pictures = annotate(ANNOTATED, answers, side=ANNOTATED_SIDE, fraction=reader.crop.fraction)
    if answers:
        print(table(answers))
    if ANNOTATED is not None and common.is_main():
        print(f"{ANNOTATED}: {counted(pictures, 'picture')}")
    return answers


def check_constants() -> None:
    """Raise UserError, before anything slow, for a missing file or folder, or a value out of range."""
    check_template(TEMPLATE)
    check_framing("centre" if FIND_FACES else FRAMING, FACE_CROP)
    calibration.check_false_accept(FALSE_ACCEPT)
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
    if THRESHOLD is not None and not common.in_range(THRESHOLD, float, -1, 1):
        raise UserError(f"THRESHOLD = {THRESHOLD!r}: expected a cosine, -1..1, or None")
    if REFUSE is not None and not common.in_range(REFUSE, float, 0, 0.2):
        raise UserError(f"REFUSE = {REFUSE!r}: expected a share of clean photos, 0..0.2, such as 0.01, or None")
    common.check_list("PHOTOS", PHOTOS, (str, Path), "paths")
    common.check_list("REMOVE", REMOVE, str, "names of persons")
    if ENROLL is not None and not ENROLL.is_dir():
        raise UserError(f"ENROLL = {ENROLL}: no such folder; correct it, or set it to None")
    if ENROLL is None and PAIRS is None and not GALLERY.is_file():
        raise UserError(f"{GALLERY}: no gallery; set ENROLL to a folder of persons to make one, or correct GALLERY")
    if ANNOTATED is not None:
        for folder in PHOTOS:
            if Path(folder).is_dir() and ANNOTATED.resolve().is_relative_to(Path(folder).resolve()):
                raise UserError(
                    f"ANNOTATED = {ANNOTATED}: lies in {folder}, so the next run would identify its pictures too; "
                    "choose a folder outside PHOTOS"
                )
        checkpoints.check_writable("ANNOTATED", ANNOTATED, folder=True)


def check_json_lines(photos: Sequence[Path]) -> None:
    """Raise UserError, before anything slow, for a JSON_LINES that cannot be written, or is a file that is read."""
    if JSON_LINES is None:
        return
    if JSON_LINES.resolve() in {path.resolve() for path in (GALLERY, CHECKPOINT, *photos) if path}:
        raise UserError(f"JSON_LINES = {JSON_LINES}: would overwrite a file that is read; choose another name")
    checkpoints.check_writable("JSON_LINES", JSON_LINES, folder=False)


# --- photo -> face -> embedding ---------------------------------------------------------------------------------------


class FaceReader:
    """The network on `device`, the crop that it was trained with and, with FIND_FACES, the face detector.

    made_by: what embeddings must share to be compared (gallery.made_by), and how faces are found.
    Raises what load_model raises; UserError for a crop or detector constant out of range.
    """

    def __init__(self, device: torch.device):
        self.model, facts = checkpoints.load_model(
            CHECKPOINT,
            pretrained=PRETRAINED,
            image_size=IMAGE_SIZE,
            face_crop=FACE_CROP,
            device=device,
            framing=FRAMING,
        )
        size, fraction = facts["image_size"], facts["face_crop"]
        self.device, self.detector, self.calibration = device, None, facts.get("calibration")
        if FIND_FACES:
            torch.backends.cudnn.benchmark = False  # the photos that the detector sees differ in shape
            self.detector, fraction = FaceDetector(device, min_face=MIN_FACE, min_probability=MIN_PROBABILITY), 1.0
        # A network with a wide crop takes the face from the middle of what it is given, so it is given more.
        self.margin = MARGIN if self.model.crops is None else (1 + MARGIN) / self.model.crops.face - 1
        # FIND_FACES frames the faces itself.
        self.framing = "centre" if FIND_FACES else facts["framing"]
        self.crop = FaceCrop(size, fraction)
        self.made_by = made_by(self.model, size, fraction, self.framing)
        self.made_by["find_faces"] = self.margin if FIND_FACES else None

    def frames(self, photos: Sequence[Path]) -> Frames | None:
        """How `photos` are framed, as in training."""
        return find_frames(self.framing, photos, self.device)

    def transform(self, frames: Frames | None) -> Transform:
        """From a photo to what the network sees."""
        return eval_transform(self.crop.size, self.crop.fraction, frames)

    def threshold(self, persons: int, template: str) -> dict | None:
        """By THRESHOLD, or by the checkpoint's own calibration for a gallery of so many persons; None: it has none."""
        found = calibration.from_checkpoint(
            self.calibration, FALSE_ACCEPT, persons, template=template, source=str(CHECKPOINT)
        )
        if found is not None and REFUSE is None:
            found |= {"quality": None}
        if THRESHOLD is not None:
            return calibration.by_hand(THRESHOLD, found and found["quality"], template)
        return found

    def read(self, photos: Sequence[Path], folder: Path, most: int | None = None) -> list[Reading]:
        """See faces.read_faces."""
        return read_faces(photos, folder, detector=self.detector, crop=self.crop, margin=self.margin, most=most)

    def embed(
        self, photos: Sequence[Path], description: str, *, bound: float, most: int | None = None
    ) -> tuple[list[Reading], Tensor]:
        """`read`, and the embeddings (N, D) of the N faces to use, in the order of the readings without a status.

        bound: the lowest quality of a usable face, where the model rates faces.
        """
        with tempfile.TemporaryDirectory() as folder:
            readings = self.read(photos, Path(folder), most)
            files = [reading.file for reading in readings if reading.file]
            frames = self.frames(files)
            if frames is not None:  # the photo is its own file
                boxes = {file: frames.face(load_image(file)) for file in files}
                readings = [replace(reading, box=boxes.get(reading.file)) for reading in readings]
            found = embed(
                self.model,
                files,
                self.transform(frames),
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


# --- the gallery ------------------------------------------------------------------------------------------------------


def read_gallery(reader: FaceReader) -> Gallery | None:
    """What GALLERY holds; None if there is no such file. One of several processes reads it, under its lock."""
    gallery = [None]
    if common.is_main() and GALLERY.is_file():
        gallery = [enrolment.load_gallery(GALLERY, reader.made_by)]
    if dist.is_initialized():
        dist.broadcast_object_list(gallery, device=reader.device)
    return gallery[0]


def find_threshold(gallery: Gallery | None, reader: FaceReader) -> dict | None:
    """The gallery's threshold if it was found for FALSE_ACCEPT, TEMPLATE, REFUSE and the photos of CALIBRATE_ON, else a
    new one.

    THRESHOLD comes before all. Where CALIBRATE_ON is None and the gallery has no threshold, it is the checkpoint's, or
    None. Raises what calibration.calibrate raises; UserError if
    CALIBRATE_ON has no distorted photo, or is None while the gallery was calibrated with other settings.
    """
    if THRESHOLD is not None:
        return reader.threshold(1, TEMPLATE)
    held = gallery.threshold if gallery is not None else None
    if held is not None and (held["far"] is None or "pairs" in held):  # not of a CALIBRATE_ON
        held = None
    fits = held is not None and (held["far"], held["template"], held["refuse"]) == (FALSE_ACCEPT, TEMPLATE, REFUSE)
    gone = CALIBRATE_ON is not None and not CALIBRATE_ON.is_dir() and fits and held["source"] == str(CALIBRATE_ON)
    if fits and (CALIBRATE_ON is None or gone):  # it was needed once
        return held
    if CALIBRATE_ON is None:
        if held is not None:
            raise UserError(
                f"{GALLERY}: was calibrated with FALSE_ACCEPT = {held['far']}, TEMPLATE = {held['template']!r}, "
                f"REFUSE = {held['refuse']}, now {FALSE_ACCEPT}, {TEMPLATE!r} and {REFUSE}; set them back, or set "
                "CALIBRATE_ON"
            )
        return reader.threshold(1, TEMPLATE)
    if not CALIBRATE_ON.is_dir():
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no such folder; correct it, or set it to None to keep the threshold of "
            f"{GALLERY}"
        )
    content = content_of(scan_persons(CALIBRATE_ON, check_images=False))
    if fits and held.get("content") == content:  # wherever the folder lies, and whatever it is called
        return held
    persons = scan_persons(CALIBRATE_ON)
    if not any(person.distorted for person in persons):
        raise UserError(
            f"CALIBRATE_ON = {CALIBRATE_ON}: no distorted photo to use as a query; expected "
            f"{CALIBRATE_ON}/<person>/distortion/*.jpg"
        )
    calibration.check_calibration(
        sum(bool(person.clean) for person in persons),
        sum(len(person.distorted) for person in persons),
        far=FALSE_ACCEPT,
        source=str(CALIBRATE_ON),
    )
    checkpoints.check_writable("GALLERY", GALLERY, folder=False)
    with tempfile.TemporaryDirectory() as folder:
        persons = cut_faces(persons, Path(folder), reader) if FIND_FACES else persons
        others, queries = embed_split(
            reader.model,
            persons,
            reader.transform(reader.frames(photos_of(persons))),
            reader.device,
            template=TEMPLATE,
            batch_size=BATCH_SIZE,
            num_workers=NUM_WORKERS,
        )
    found = calibration.calibrate(others, queries, far=FALSE_ACCEPT, source=str(CALIBRATE_ON), refuse=REFUSE)
    return found | {"content": content}


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
    """The lowest quality of a usable photo, by a threshold of calibration.py; without one, any is usable."""
    bound = threshold and threshold["quality"]
    return -math.inf if bound is None else bound


def enroll_persons(
    gallery: Gallery | None, persons: Sequence[Person], reader: FaceReader, bound: float
) -> tuple[Gallery, list[str]]:
    """`gallery` (None: a new one) with the clean photos of `persons` as they are now, except of those in REMOVE, and
    lines on what has changed.

    The largest face of a photo counts. Photos without one, unreadable ones and, unless ENROLL_UNUSABLE, those of a
    quality below `bound` are not enrolled; where they are in the place of another photo, that one stays. So do photos
    that are no longer anywhere. Raises UserError if there is neither a gallery nor a photo for one.
    """
    if ENROLL is None:
        return gallery, []
    removed = {common.plain_name(name) for name in REMOVE}
    everybody = persons
    persons = [person for person in everybody if common.plain_name(person.name) not in removed]
    if gallery is None and everybody and not persons:
        raise UserError(f"REMOVE: names every person of {ENROLL}, so nobody is left for a gallery; leave some")
    changes = find_changes(gallery, persons)
    photos = changes.new + changes.changed
    if gallery is None and not photos:
        raise UserError(f"ENROLL = {ENROLL}: no clean photo to enroll; expected {ENROLL}/<person>/*.jpg")
    lines, used = [], []
    if photos:
        checkpoints.check_writable("GALLERY", GALLERY, folder=False)
        bound = -math.inf if ENROLL_UNUSABLE else bound
        readings, embeddings = reader.embed([photo.given for photo in photos], "enrolling", bound=bound, most=1)
        lines += [not_enrolled(reading, changes) for reading in readings if reading.status is not None]
        used = [(photo, reading) for photo, reading in zip(photos, readings, strict=True) if reading.status is None]
    if gallery is None and not used:
        print("\n".join(lines))
        raise UserError(f"ENROLL = {ENROLL}: none of its clean photos shows a usable face; add others")
    gallery = changes.gallery
    if used:
        rated = used[0][1].quality is not None
        if gallery is None:
            gallery = enrolment.empty_gallery(
                embeddings.shape[1],
                template=TEMPLATE,
                made_by=reader.made_by,
                rated=rated,
                wide=reader.model.crops is not None,
            )
        quality = torch.tensor([reading.quality for _, reading in used]) if rated else None
        gallery = add_photos(gallery, [photo for photo, _ in used], embeddings, quality)
    summary = summary_of(changes, [photo for photo, _ in used], gallery, removed)
    return gallery, [*lines, f"{ENROLL}: {summary}"]


def not_enrolled(reading: Reading, changes: Changes) -> str:
    """Why a photo of ENROLL was not enrolled."""
    reason = f" ({reading.reason})" if reading.reason else ""
    hint = "; ENROLL_UNUSABLE = True enrolls it" if reading.status == UNUSABLE else ""
    stays = "; the photo enrolled from there before stays" * any(
        photo.given == reading.photo for photo in changes.changed
    )
    return printable(f"{reading.photo}: {reading.status}{reason}, not enrolled{hint}{stays}")


def summary_of(changes: Changes, used: Sequence[Photo], gallery: Gallery, removed: Collection[str]) -> str:
    """What was new, changed, moved or missing among the photos of ENROLL. used: those whose embeddings `gallery` was
    given; one of them that shows what another does, in other bytes, it did not take."""
    held = set(zip(enrolment.names_of(gallery), gallery.paths, strict=True))
    enrolled = [photo for photo in used if (photo.person, photo.path) in held]
    copies = changes.copies + len(used) - len(enrolled)
    changed = sum(photo in changes.changed for photo in enrolled)
    missing = [name for name in changes.missing if name not in removed]
    text = f"{counted(len(enrolled) - changed, 'photo')} new, {changed} changed, {changes.moved} moved, "
    text += f"{len(missing)} missing"
    if copies:
        text += f"; {counted(copies, 'copy')} of others left out".replace("copys", "copies")
    if missing:
        names = common.list_names(sorted(set(missing)))
        text += f"; the missing ones stay enrolled ({names}), REMOVE takes persons out"
    return printable(text)


def remove_persons(gallery: Gallery, persons: Sequence[Person]) -> tuple[Gallery, list[str]]:
    """`gallery` without the persons in REMOVE, and a line on each of these names. `persons`: those of ENROLL.

    Raises UserError if no person would be left.
    """
    lines = []
    known = {common.plain_name(person.name) for person in persons} | set(gallery.persons)
    for name in map(common.plain_name, REMOVE):
        if name in gallery.persons:
            photos = enrolment.names_of(gallery).count(name)
            gallery = enrolment.remove(gallery, name)
            lines.append(f"REMOVE: {name} was removed, {counted(photos, 'photo')}")
        elif name not in known:
            lines.append(f"REMOVE: {name} is not enrolled{enrolment.did_you_mean(name, known)}")
    return gallery, [printable(line) for line in lines]


def list_persons(gallery: Gallery) -> list[str]:
    """A line for each person who is enrolled."""
    photos = Counter(enrolment.names_of(gallery))
    return [printable(f"  {name}: {counted(photos[name], 'photo')}") for name in gallery.persons]


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


def compare_pairs(pairs: Sequence[tuple[Path, Path]]) -> list[PairAnswer]:
    """Compare the photos of each pair, by THRESHOLD or by FALSE_ACCEPT of the checkpoint's calibration."""
    reader = FaceReader(common.pick_device())
    threshold = reader.threshold(1, "best")  # photo against photo
    photos = list(dict.fromkeys(photo for pair in pairs for photo in pair))
    readings, embeddings = reader.embed(photos, "photos", bound=quality_bound(threshold), most=1)
    cosines = calibration.measured_cosines(reader.calibration, "best", source=str(CHECKPOINT))
    answers = compare(pairs, readings, embeddings, threshold=threshold and threshold["cosine"], cosines=cosines)
    if JSON_LINES is not None and common.is_main():
        write_json_lines(JSON_LINES, answers)
    print(pair_table(answers))
    return answers


if __name__ == "__main__":
    PHOTOS = sys.argv[1:] or PHOTOS
    common.run_script(main)
