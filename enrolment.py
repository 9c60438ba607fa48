"""A gallery that is kept between runs: enroll, remove, identify, save and load."""

import difflib
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import search
from checkpoints import atomic_file
from common import UserError, plain_name, read_plain, warn_once
from embedding import rated_rows
from gallery import Gallery
from scores import TEMPLATES, TIE, person_scores

FORMAT = 2  # of the gallery files
FIELDS = ("embeddings", "labels", "persons", "paths", "template", "made_by", "threshold", "quality")
OPTIONAL = ("digests", "wide")  # which galleries of earlier versions lack
EARLIER_DIM = 512  # numbers of a face in galleries of earlier versions; those with more have the whole frame beside it
# What a threshold states, see calibration.calibrate.
STATED = {"cosine": float, "far": (float, type(None)), "template": str, "strangers": int, "persons": int, "source": str}
STATED |= {"quality": (float, type(None)), "refuse": (float, int, type(None)), "unusable": int}


# --- enroll and remove ------------------------------------------------------------------------------------------------


def empty_gallery(dimensions: int, *, template: str, made_by: dict, rated: bool, wide: bool) -> Gallery:
    """A gallery without photos, for embeddings of `dimensions` numbers. rated: whether photos have a quality; wide: see
    Gallery."""
    return Gallery(
        embeddings=torch.empty(0, dimensions),
        labels=torch.empty(0, dtype=torch.int64),
        persons=[],
        paths=[],
        template=template,
        made_by=made_by,
        quality=torch.empty(0) if rated else None,
        wide=wide,
    )


def absolute(path: Path) -> Path:
    """`path` from the root on; symlinks stay in it, so that a link to the newest version of a folder is one place."""
    return Path(os.path.abspath(path))


def enroll(
    gallery: Gallery,
    embeddings: Tensor,
    persons: Sequence[str],
    paths: Sequence[Path],
    quality: Tensor | None = None,
    digests: Sequence[str] | None = None,
) -> Gallery:
    """`gallery` with N photos added, of persons in it or new ones.

    embeddings: (N, D) float32, rows of norm 1; persons and paths: N each; quality: (N,), if the model rates photos;
    digests: N, see Gallery.
    A photo that its person has already, by its path or its embedding, is not added again; a photo of another person is
    added. Both give a warning.
    Raises UserError for an empty name, for lengths that differ, and for photos without a quality in a gallery with one
    or the other way round.
    """
    if embeddings.shape[1] != gallery.embeddings.shape[1]:
        raise UserError(
            f"embeddings of {embeddings.shape[1]} numbers do not fit a gallery of {gallery.embeddings.shape[1]}"
        )
    if not len(embeddings) == len(persons) == len(paths):
        raise UserError(
            f"{len(embeddings)} embeddings, {len(persons)} names and {len(paths)} paths: expected as many of each"
        )
    if not all(persons):
        raise UserError("a person needs a name to be enrolled")
    if (gallery.quality is None) != (quality is None):
        raise UserError("either all photos of a gallery have a quality or none; enroll all of them again")
    enrolled = len(gallery.paths)
    rows = torch.cat([gallery.embeddings, embeddings])
    names, photos = [*names_of(gallery), *map(plain_name, persons)], [*gallery.paths, *paths]
    _warn_other_names(rows, names, photos, enrolled)
    kept, of_person = [], {name: [] for name in names}
    for row, (name, path) in enumerate(zip(names, photos, strict=True)):
        others = of_person[name] if row >= enrolled else []  # what is enrolled stays
        if any(photos[other] == path or (rows[other] @ rows[row]).item() > 1 - TIE for other in others):
            warn_once(f"{path}: this photo of {name} is enrolled already, not added again")
        else:
            of_person[name].append(row)
            kept.append(row)
    everything = replace(
        gallery,
        embeddings=rows,
        paths=photos,
        quality=None if quality is None else torch.cat([gallery.quality, quality]),
        digests=[*(gallery.digests or [""] * enrolled), *(digests or [""] * len(paths))],
    )
    return select(everything, kept, names)


def _warn_other_names(rows: Tensor, names: Sequence[str], paths: Sequence[Path], enrolled: int) -> None:
    """Warn about each photo after the first `enrolled` that is also there under another name."""
    if enrolled == len(rows) or len(rows) < 2:
        return
    nearest, cosine = search.nearest(rows[enrolled:], rows, k=2)  # one of the two is the photo itself, or an equal one
    for path, name, twins, cosines in zip(
        paths[enrolled:], names[enrolled:], nearest.tolist(), cosine.tolist(), strict=True
    ):
        for twin, value in zip(twins, cosines, strict=True):
            if value > 1 - TIE and names[twin] != name:
                warn_once(f"{path}: enrolled as {name}, but {names[twin]} has the same photo; one name is wrong")


def remove(gallery: Gallery, person: str) -> Gallery:
    """`gallery` without that person. Raises UserError if it holds no such person, or no other one."""
    person = plain_name(person)
    if person not in gallery.persons:
        raise UserError(f"cannot remove {person!r}: not in the gallery{did_you_mean(person, gallery.persons)}")
    if len(gallery.persons) == 1:
        raise UserError(f"cannot remove {person!r}, the last person in the gallery; delete the gallery's file instead")
    names = names_of(gallery)
    return select(gallery, [row for row, name in enumerate(names) if name != person], names)


def names_of(gallery: Gallery) -> list[str]:
    """The person of each photo."""
    return [gallery.persons[label] for label in gallery.labels.tolist()]


def state_of(gallery: Gallery) -> tuple:
    """What differs if a gallery has changed: embeddings come and go with their photos."""
    return names_of(gallery), gallery.paths, gallery.digests, gallery.template, gallery.threshold


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of a sentence on an unknown `name`: the known one that is spelt most like it, or nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def select(gallery: Gallery, rows: Sequence[int], names: Sequence[str]) -> Gallery:
    """The photos at `rows` of a gallery, under these `names`, one for each of all its photos: persons sorted, the
    photos of each in the order given. The labels and persons that `gallery` has do not count."""
    rows = sorted(rows, key=lambda row: names[row])  # stable
    persons = sorted({names[row] for row in rows})
    label = {name: index for index, name in enumerate(persons)}
    return replace(
        gallery,
        embeddings=gallery.embeddings[rows],
        labels=torch.tensor([label[names[row]] for row in rows], dtype=torch.int64),
        persons=persons,
        paths=[gallery.paths[row] for row in rows],
        quality=rated_rows(gallery.quality, rows),
        digests=[gallery.digests[row] for row in rows] if gallery.digests else [],
    )


# --- match against the gallery ----------------------------------------------------------------------------------------


def identify(gallery: Gallery, embeddings: Tensor) -> list[tuple[str | None, float, str]]:
    """(name, cosine, most similar person) for each of `embeddings` (N, D), rows of norm 1.

    The name is None where the cosine is below the gallery's threshold. By the gallery's template; a tie goes to the
    name that sorts first.
    """
    if not len(embeddings):
        return []
    rows, labels = gallery.templates(gallery.template)
    index, cosine = search.nearest(embeddings, rows)
    lowest = gallery.threshold["cosine"] if gallery.threshold else -math.inf
    names = [gallery.persons[label] for label in labels[index[:, 0]].tolist()]
    scores = cosine[:, 0].tolist()
    return [(name if score >= lowest else None, score, name) for name, score in zip(names, scores, strict=True)]


def similar_persons(gallery: Gallery, embeddings: Tensor, count: int) -> list[list[tuple[str, float]]]:
    """For each of `embeddings` (N, D), rows of norm 1, the `count` most similar persons with their cosines.

    By the gallery's template; equal cosines in the order of the names.
    """
    found = []
    for block in embeddings.split(1024) if len(embeddings) else ():  # a block's scores are held at a time
        none = torch.full((len(block),), -1)  # no person or photo is left out
        scores = person_scores(
            queries=block,
            truth=none,
            sources=none,
            gallery=gallery.weighted,
            labels=gallery.labels,
            template=gallery.template,
            wide=gallery.wide,
        )
        values, labels = scores.matrix.sort(dim=1, descending=True, stable=True)
        for cosines, persons in zip(values[:, :count].tolist(), labels[:, :count].tolist(), strict=True):
            found.append([(gallery.persons[label], cosine) for label, cosine in zip(persons, cosines, strict=True)])
    return found


# --- the file ---------------------------------------------------------------------------------------------------------


def save_gallery(path: Path, gallery: Gallery) -> None:
    """Write tensors and plain types, atomically; of photos their absolute paths and digests only."""
    content = {"format": FORMAT} | {name: getattr(gallery, name) for name in (*FIELDS, *OPTIONAL)}
    with atomic_file(path) as file:
        torch.save(content | {"paths": [str(absolute(photo)) for photo in gallery.paths]}, file)


def load_gallery(path: Path, made_by: dict | None = None) -> Gallery:
    """What `save_gallery` wrote. made_by: the model, image size and crop that it must have been made with.

    Raises UserError if the file is missing, damaged, not a gallery, or made with another model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no gallery; enroll photos first, or correct the path")
    way_out = "delete it and enroll the photos again"
    saved = read_plain(path, "damaged, or not a gallery", f"correct GALLERY, or, if it is a gallery, {way_out}")
    if not isinstance(saved, dict) or not {"format", *FIELDS[:3]} <= saved.keys():
        raise UserError(f"{path}: not a gallery of these scripts; correct GALLERY")  # the file may be a checkpoint
    fault = _fault(saved)
    if fault:
        raise UserError(f"{path}: {fault}; {way_out}")
    gallery = Gallery(
        embeddings=saved["embeddings"],
        labels=saved["labels"],
        persons=saved["persons"],
        paths=[absolute(Path(photo)) for photo in saved["paths"]],  # those of earlier versions may be relative
        template=saved["template"],
        made_by=saved["made_by"],
        threshold=saved["threshold"],
        quality=saved["quality"],
        digests=saved.get("digests", []),
        wide=saved.get("wide", saved["embeddings"].shape[1] > EARLIER_DIM),
    )
    gallery = select(gallery, range(len(gallery.paths)), [plain_name(name) for name in names_of(gallery)])
    expected = gallery.made_by if made_by is None else made_by
    pairs = {name: (gallery.made_by.get(name), expected.get(name)) for name in gallery.made_by | expected}
    differences = [f"{name} {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here]
    if differences:
        raise UserError(
            f"{path}: made by another model ({', '.join(differences)}), so its embeddings cannot be compared; use the "
            "checkpoint that made it, or delete it and enroll the photos again"
        )
    return gallery


def _fault(saved: dict) -> str | None:
    """Why what a file holds is not a gallery; None if it is one."""
    if type(saved["format"]) is not int or saved["format"] != FORMAT:
        return f"gallery format {saved['format']!r}, these scripts read {FORMAT}"
    if not set(FIELDS) <= saved.keys():
        return f"its {', '.join(sorted(set(FIELDS) - saved.keys()))} is missing"
    return _fault_of_photos(saved) or _fault_of_facts(saved)


def _fault_of_photos(saved: dict) -> str | None:
    embeddings, labels, persons, paths, quality = (
        saved[name] for name in ("embeddings", "labels", "persons", "paths", "quality")
    )
    if not (isinstance(embeddings, Tensor) and embeddings.dtype == torch.float32 and embeddings.dim() == 2):
        return "its embeddings are not a float32 matrix"
    if not len(embeddings) or ((embeddings.norm(dim=1) - 1).abs() < 1e-3).logical_not().any():
        return "it holds no embedding, or one whose norm is not 1"
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in (persons, paths)):
        return "its persons or paths are not lists of names"
    shape = (len(embeddings),)
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == shape):
        return "its labels are not one whole number per embedding"
    if len(paths) != len(embeddings) or persons != sorted(set(persons)):
        return "its persons or paths do not match its embeddings"
    if labels.unique().tolist() != list(range(len(persons))):
        return "its labels do not match its persons"
    if quality is not None and not (
        isinstance(quality, Tensor) and quality.dtype == torch.float32 and quality.shape == shape
    ):
        return "its quality is not one number per embedding"
    digests = saved.get("digests", [])
    known = isinstance(digests, list) and all(isinstance(digest, str) for digest in digests)
    if not known or len(digests) not in (0, len(embeddings)):
        return "its digests are not one text per embedding"
    wide = saved.get("wide", False)
    if not isinstance(wide, bool) or (wide and embeddings.shape[1] % 2):
        return "its embeddings are not a face beside a whole frame"
    return None


def _fault_of_facts(saved: dict) -> str | None:
    template, made_by, threshold = saved["template"], saved["made_by"], saved["threshold"]
    plain = (str, int, float, type(None))
    known = isinstance(made_by, dict) and all(isinstance(value, plain) for value in made_by.values())
    if not isinstance(template, str) or template not in TEMPLATES or not known:
        return "its template or model is unknown"
    if threshold is None:
        return None
    known = isinstance(threshold, dict) and STATED.keys() <= threshold.keys()
    known = known and all(isinstance(threshold[name], kind) for name, kind in STATED.items())
    if not known or not math.isfinite(threshold["cosine"]):
        return "its threshold is incomplete or not a number"
    return None
