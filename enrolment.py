"""A gallery that is kept between runs: enroll, remove, calibrate, identify, save and load."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import metrics
import search
from checkpoints import atomic_file
from common import UserError, read_plain, warn_once
from gallery import Gallery, Queries, _rated, score
from scores import TEMPLATES, TIE

FORMAT = 2  # of the gallery files
FIELDS = ("embeddings", "labels", "persons", "paths", "template", "made_by", "threshold", "quality")
STATED = {"cosine": float, "far": float, "template": str, "strangers": int, "persons": int, "source": str}  # threshold
STATED |= {"quality": (float, type(None)), "refuse": (float, int, type(None)), "unusable": int}


def enroll(
    gallery: Gallery | None,
    embeddings: Tensor,
    persons: Sequence[str],
    paths: Sequence[Path],
    quality: Tensor | None = None,
    **new,
) -> Gallery:
    """`gallery` with photos added, of persons in it or new ones; what is there is not embedded again.

    embeddings: (N, D) float32, rows of norm 1; persons, paths and, of a model that rates, quality (N,): of each. A
    photo that is there already, by its path or its embedding, is not added twice (told); one that is there under
    another name is added, and told.
    gallery None: a new one, `new` its template and made_by.
    Raises ValueError for an empty name or embeddings of another length than the gallery's.
    """
    if gallery is None:
        rated = None if quality is None else torch.empty(0)
        nobody = (torch.empty(0, embeddings.shape[1]), torch.empty(0, dtype=torch.int64), [], [])
        gallery = Gallery(*nobody, **new, quality=rated)
    if embeddings.shape[1] != gallery.embeddings.shape[1]:
        raise UserError(
            f"embeddings of {embeddings.shape[1]} numbers cannot join a gallery of {gallery.embeddings.shape[1]}"
        )
    if not len(embeddings) == len(persons) == len(paths):
        raise UserError(
            f"{len(embeddings)} embeddings, {len(persons)} names and {len(paths)} paths: expected as many of each"
        )
    if not all(persons):
        raise UserError("a person needs a name to be enrolled")
    if (gallery.quality is None) != (quality is None):
        raise UserError("of a gallery either all photos are rated or none; enroll them anew")
    ratings = None if quality is None else torch.cat([gallery.quality, quality])
    rows = torch.cat([gallery.embeddings, embeddings])
    names = [gallery.persons[label] for label in gallery.labels.tolist()]
    all_names = [*names, *persons]
    if len(embeddings) and len(rows) > 1:
        near, cosine = search.nearest(embeddings, rows, k=2)  # one of them is the photo itself, or a twin before it
        for path, name, twins, scores in zip(paths, persons, near.tolist(), cosine.tolist(), strict=True):
            others = [all_names[row] for row, score in zip(twins, scores, strict=True) if score > 1 - TIE]
            for other in (other for other in others if other != name):
                warn_once(f"{path}: enrolled as {name}, and the same photo as {other}; one name is wrong")
    kept, all_paths = list(range(len(names))), list(gallery.paths)  # rows, and the photos of all rows
    of_person: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        of_person.setdefault(name, []).append(row)
    for row, (name, path) in enumerate(zip(persons, paths, strict=True), start=len(names)):
        all_paths.append(path)
        there = of_person.setdefault(name, [])
        if any(all_paths[other] == path or (rows[other] @ rows[row]).item() > 1 - TIE for other in there):
            warn_once(f"{path}: {name} is enrolled with this photo already, not added again")
            continue
        there.append(row)
        kept.append(row)
    names, paths = [all_names[row] for row in kept], [all_paths[row] for row in kept]
    return _from_rows(gallery, rows[kept], names, paths, _rated(ratings, kept))


def remove(gallery: Gallery, person: str) -> Gallery:
    """`gallery` without that person. Raises ValueError if it holds no such person, or nobody else."""
    if person not in gallery.persons:
        close = difflib.get_close_matches(person, gallery.persons, n=1)
        raise UserError(f"{person!r} is not in the gallery{f'; did you mean {close[0]!r}?' if close else ''}")
    if len(gallery.persons) == 1:
        raise UserError(f"{person!r} is the last person of the gallery; delete its file instead")
    rows = (gallery.labels != gallery.persons.index(person)).nonzero()[:, 0]
    names = [gallery.persons[label] for label in gallery.labels[rows].tolist()]
    paths = [gallery.paths[row] for row in rows.tolist()]
    return _from_rows(gallery, gallery.embeddings[rows], names, paths, _rated(gallery.quality, rows))


def _from_rows(
    gallery: Gallery, embeddings: Tensor, names: list[str], paths: list[Path], quality: Tensor | None
) -> Gallery:
    """`gallery` holding these photos: persons sorted, the photos of each side by side in the order given."""
    order = sorted(range(len(names)), key=lambda row: names[row])  # stable
    persons = sorted(set(names))
    index = {name: label for label, name in enumerate(persons)}
    labels = torch.tensor([index[names[row]] for row in order])
    quality = _rated(quality, order)
    paths = [paths[row] for row in order]
    return replace(gallery, embeddings=embeddings[order], labels=labels, persons=persons, paths=paths, quality=quality)


def calibrate(gallery: Gallery, queries: Queries, far: float, source: str, refuse: float | None = None) -> dict:
    """The threshold under which an answer is 'unknown': of the queries, asked while their own person is left out of the
    gallery, at most a share `far` is then given a name.

    refuse: share of the gallery's photos, those of lowest quality, that may be called not usable; what the least of the
    others has is the least `quality` of a usable photo, and queries below it do not ask. None, or a model that does not
    rate: all ask. source: where the queries come from, for people. The rate is of this gallery's size: in one of twice
    as many persons a stranger finds a look-alike about twice as often.
    Returns {cosine, far, template, strangers, persons, source, quality, refuse, unusable}, plain types; unusable: how
    many queries did not ask. Raises ValueError if `far` or `refuse` is no share, the gallery holds one person, or fewer
    strangers ask than let one expect metrics.MIN_ERRORS false accepts.
    """
    if not 0 < far < 1:
        raise UserError(f"FALSE_ACCEPT = {far!r}: expected a share of strangers, above 0 and below 1, such as 0.01")
    if len(gallery.persons) < 2:
        raise UserError(f"{source}: one person is too few for a threshold, nobody else is there to be mistaken for")
    if refuse is not None and not 0 <= refuse < 1:
        raise UserError(f"REFUSE = {refuse!r}: expected a share of clean photos, 0 or more and below 1, such as 0.01")
    everybody, least = len(queries.paths), None
    if refuse is not None and gallery.quality is not None and queries.quality is not None:
        least = gallery.quality.sort().values[metrics.rounded_down(refuse, len(gallery.quality))].item()
        queries = queries.subset((queries.quality >= least).nonzero()[:, 0])
        if not queries.paths:
            raise UserError(f"{source}: none of its {everybody} distorted photos is usable (REFUSE = {refuse:g})")
    found = metrics.ranking(score(gallery, queries)[gallery.template])
    asked = len(found.rival)
    if asked * far < metrics.MIN_ERRORS:
        raise UserError(
            f"FALSE_ACCEPT = {far:g}: {source} has {asked} usable queries, to know so low a rate takes "
            f"{math.ceil(metrics.MIN_ERRORS / far)}; at least {metrics.MIN_ERRORS / asked:.2g} is possible here"
        )
    return {
        # Another product rounds otherwise: whoever is refused here must not be named there.
        "cosine": metrics.threshold_for(found.rival, far) + TIE,
        "far": far,
        "template": gallery.template,
        "strangers": asked,
        "persons": len(gallery.persons) - 1,
        "source": source,
        "quality": least,
        "refuse": refuse,
        "unusable": everybody - asked,
    }


def identify(gallery: Gallery, embeddings: Tensor) -> list[tuple[str | None, float, str]]:
    """For each of `embeddings` (N, D), rows of norm 1: the person, or None below the gallery's threshold; the cosine;
    and whom it resembles most, named or not. By the gallery's template; a tie goes to the name that sorts first."""
    if not len(embeddings):
        return []
    rows, labels = gallery.templates(gallery.template)
    index, cosine = search.nearest(embeddings, rows)
    lowest = gallery.threshold["cosine"] if gallery.threshold else -math.inf
    names = [gallery.persons[label] for label in labels[index[:, 0]].tolist()]
    scores = cosine[:, 0].tolist()
    return [(name if score >= lowest else None, score, name) for name, score in zip(names, scores, strict=True)]


def save_gallery(path: Path, gallery: Gallery) -> None:
    """Write tensors and plain types, atomically; photos are named, not copied."""
    content = {"format": FORMAT} | {name: getattr(gallery, name) for name in FIELDS}
    with atomic_file(path) as file:
        torch.save(content | {"paths": [str(photo) for photo in gallery.paths]}, file)


def load_gallery(path: Path, made_by: dict | None = None) -> Gallery:
    """What `save_gallery` wrote; with `made_by`, only if the same model, image size and crop made it.

    Raises UserError if the file is damaged, no gallery, or another model's.
    """
    if not path.is_file():
        raise UserError(f"{path}: no gallery; enroll photos first, or correct the path")
    saved = read_plain(path, "damaged, or not a gallery", "enroll the photos anew")
    fault = _fault(saved)
    if fault:
        raise UserError(f"{path}: {fault}; enroll the photos anew")
    gallery = Gallery(**{name: saved[name] for name in FIELDS} | {"paths": [Path(photo) for photo in saved["paths"]]})
    expected = gallery.made_by if made_by is None else made_by
    pairs = {name: (gallery.made_by.get(name), expected.get(name)) for name in gallery.made_by | expected}
    told = ", ".join(f"{name} {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here)
    if told:
        raise UserError(
            f"{path}: made by another model ({told}); its embeddings cannot be compared: enroll the photos anew, or "
            "use the checkpoint that made it"
        )
    return gallery


def _fault(saved: object) -> str | None:
    """What keeps the content of a file from being a gallery."""
    if not isinstance(saved, dict) or not {"format", "embeddings", "persons"} <= saved.keys():
        return "not a gallery of these scripts"
    if type(saved["format"]) is not int or saved["format"] != FORMAT:
        return f"gallery format {saved['format']!r}, these scripts read {FORMAT}"
    if not set(FIELDS) <= saved.keys():
        return "not a gallery of these scripts"
    embeddings, labels, persons, paths = (saved[name] for name in FIELDS[:4])
    if not (isinstance(embeddings, Tensor) and embeddings.dtype == torch.float32 and embeddings.dim() == 2):
        return "its embeddings are no float32 matrix"
    if not len(embeddings) or ((embeddings.norm(dim=1) - 1).abs() < 1e-3).logical_not().any():
        return "it holds no embedding, or one that is not of norm 1"
    if not all(isinstance(of, list) and all(isinstance(name, str) for name in of) for of in (persons, paths)):
        return "its persons or photos are no names"
    if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == (len(embeddings),)):
        return "its labels are no whole number for each embedding"
    if len(paths) != len(embeddings) or persons != sorted(set(persons)):
        return "its names do not fit its embeddings"
    if labels.unique().tolist() != list(range(len(persons))):
        return "its labels do not fit its persons"
    template, made_by, threshold, quality = (saved[name] for name in FIELDS[4:])
    if quality is not None and not (
        isinstance(quality, Tensor) and quality.dtype == torch.float32 and quality.shape == (len(embeddings),)
    ):
        return "its quality is no number for each embedding"
    plain = (str, int, float, type(None))
    known = isinstance(made_by, dict) and all(isinstance(value, plain) for value in made_by.values())
    if not isinstance(template, str) or template not in TEMPLATES or not known:
        return "its template or model is unknown"
    if threshold is None:
        return None
    known = isinstance(threshold, dict) and STATED.keys() <= threshold.keys()
    known = known and all(isinstance(threshold[name], kind) for name, kind in STATED.items())
    if not known or not math.isfinite(threshold["cosine"]):
        return "its threshold is no number"
    return None
