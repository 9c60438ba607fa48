"""Retrieval: a gallery of clean embeddings, every distorted photo a query, cosine similarity, top-1."""

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import metrics
from common import UserError, rank_and_world, warn_once
from datasets import Person, PhotoList, distortion_kind, scan_persons, source_photo
from metrics import TEMPLATES, check_template
from models import fingerprint
from transforms import Transform

PROTOCOLS = ("same", "cross", "clean")  # see select_queries
CHOICE = "mean of same and cross"  # of the best epoch, by `validate`; kept in checkpoints


@dataclass(frozen=True)
class Gallery:
    """Every clean photo's embedding with its person.

    embeddings: (G, D) float32 on the CPU, rows of norm 1; labels: (G,) int64, index into persons; paths: G photos.
    persons: sorted names, each with at least one photo. template: which of TEMPLATES counts in `evaluate`.
    made_by: of the model, its fingerprint, image_size and face_crop: what other embeddings must share.
    threshold: of `calibrate`; None: every query is given a name.
    quality: (G,) float32, of each photo as the model rates it; None where it does not.
    """

    embeddings: Tensor
    labels: Tensor
    persons: list[str]
    paths: list[Path]
    template: str
    made_by: dict = field(default_factory=dict)
    threshold: dict | None = None
    quality: Tensor | None = None

    @property
    def weighted(self) -> Tensor:
        """(G, D): the embeddings times their quality, if they are rated, as `metrics` takes them: in the mean of a
        person's photos a bad one counts for less."""
        return self.embeddings if self.quality is None else self.embeddings * self.quality.clamp(min=1e-6)[:, None]

    def templates(self, template: str) -> tuple[Tensor, Tensor]:
        """(T, D) rows of norm 1 to match against, and (T,) their labels; see metrics.templates."""
        return metrics.templates(self.weighted, self.labels, template)


def _rated(quality: Tensor | None, rows: Tensor | list[int]) -> Tensor | None:
    """The ratings of some photos; None where none is rated."""
    return None if quality is None else quality[rows]


@dataclass(frozen=True)
class Embedded:
    """Photos as a model sees them, on the CPU.

    embeddings: (N, D) float32, rows of norm 1. quality: (N,) float32, see models.FaceNet; None of a model without one.
    """

    embeddings: Tensor
    quality: Tensor | None


@torch.inference_mode()
def embed(
    model: nn.Module,
    paths: Sequence[Path],
    transform: Transform,
    device: torch.device | str,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    description: str = "embedding",
) -> Embedded:
    """Embed the photos at `paths`, in their order; `model` is in eval mode meanwhile.

    Under torchrun each process embeds its share of the photos, and all of them get all embeddings.
    Raises OSError for an unreadable photo, UserError with the path if an embedding is not finite.
    """
    device = torch.device(device)
    rank, world = rank_and_world()
    photos = PhotoList(paths[rank::world], transform)
    loader = DataLoader(photos, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    memory_format = getattr(model, "memory_format", torch.channels_last)  # fast.OnnxFaceNet has another
    modes = [(module, module.training) for module in model.modules()]  # a frozen BatchNorm has its own
    model.eval()
    rates = getattr(model, "rates", False)
    batches, qualities = [], []
    try:
        quiet = rank > 0 or len(loader) < 3
        for images in tqdm(loader, desc=description, unit="batch", leave=False, disable=quiet):
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            found, quality = model(images, "rated") if rates else (model(images), None)
            batches.append(F.normalize(found.float()).cpu())
            if rates:
                qualities.append(quality.float().cpu())
    finally:
        for module, training in modes:
            module.training = training
    embeddings = torch.cat(batches) if batches else torch.empty(0, 0)
    quality = torch.cat(qualities) if qualities else torch.empty(0)
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, (embeddings, quality))
        embeddings = torch.empty(len(paths), max(part.shape[1] for part, _ in parts))
        quality = torch.empty(len(paths) if rates else 0)
        for other, (part, of_part) in enumerate(parts):
            if len(part):
                embeddings[other::world] = part
                quality[other::world] = of_part
    broken = ~((embeddings.norm(dim=1) - 1).abs() < 1e-3)  # NaN, infinity or all zero
    if broken.any():
        first = paths[int(broken.int().argmax())]
        raise UserError(
            f"{first}: its embedding is not finite or zero; the model's weights diverged, go back to an earlier one"
        )
    return Embedded(embeddings, quality if rates else None)


def build_gallery(
    model: nn.Module,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    *,
    persons: Collection[str] | None = None,
    template: str = "mean",
    made_by: dict | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    check_images: bool = True,
) -> Gallery:
    """Embed each clean photo of `root` (see datasets.scan_persons), of `persons` only if they are given.

    made_by: see Gallery; to be kept with a gallery that is saved.

    Raises what `scan_persons` raises; ValueError if there is no clean photo, or for an unknown template.
    """
    check_template(template)
    scanned = _select(root, persons, check_images)
    enrolled = [person for person in scanned if person.clean]
    if not enrolled:
        raise UserError(
            f"{root}: no clean photo to build a gallery from; expected {root}/<person>/clean/*.jpg or <person>/*.jpg"
        )
    paths = [path for person in enrolled for path in person.clean]
    labels = [label for label, person in enumerate(enrolled) for _ in person.clean]
    found = embed(
        model,
        paths,
        transform,
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        description="gallery",
    )
    names = [person.name for person in enrolled]
    return Gallery(found.embeddings, torch.tensor(labels), names, paths, template, made_by or {}, quality=found.quality)


def person_means(
    model: nn.Module,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    persons: Sequence[str],
    **options,
) -> tuple[Tensor, Tensor]:
    """The mean clean embeddings (N, D) of `persons`, and their places (N,) in that list; who has no clean photo is left
    out. Takes the options of `build_gallery` and raises what it raises."""
    gallery = build_gallery(model, root, transform, device, persons=persons, **options)
    place = {name: index for index, name in enumerate(persons)}
    means = metrics.mean_templates(gallery.embeddings, gallery.labels)
    return means, torch.tensor([place[name] for name in gallery.persons])


def _select(root: Path | str, persons: Collection[str] | None, check_images: bool) -> list[Person]:
    """All persons of `root`, or those named; ValueError for a name that `root` does not hold."""
    scanned = scan_persons(root, check_images=check_images)
    if persons is None:
        return scanned
    asked = set(persons)
    missing = sorted(asked - {person.name for person in scanned})
    if missing:
        raise UserError(
            f"{root}: {len(missing)} of the persons asked for have no readable photo there, {missing[0]!r} first"
        )
    return [person for person in scanned if person.name in asked]


@dataclass(frozen=True)
class Queries:
    """Photos that ask a gallery, in the order of `paths`, by what `metrics` needs.

    embeddings: (Q, D) float32, rows of norm 1; truth: (Q,) int64, index into the gallery's persons, -1 for a person
    outside it; sources: (Q,) int64, gallery row of the photo that must not be compared with, -1 for none.
    persons: Q names, as the folders say; kinds: Q kinds of distortion, "clean" for a photo of the gallery.
    quality: (Q,) float32, as the model rates them; None where it does not.
    """

    embeddings: Tensor
    truth: Tensor
    sources: Tensor
    paths: list[Path]
    persons: list[str]
    kinds: list[str]
    quality: Tensor | None = None

    def subset(self, chosen: Tensor) -> "Queries":
        """Those at the indices `chosen` (N,) int64."""
        lists = ([of[i] for i in chosen.tolist()] for of in (self.paths, self.persons, self.kinds))
        tensors = (self.embeddings[chosen], self.truth[chosen], self.sources[chosen])
        return Queries(*tensors, *lists, _rated(self.quality, chosen))

    def groups(self) -> dict[str, Tensor]:
        """Name -> indices: each kind, "without sunny" where there is a sunny among others, and "all"."""
        kinds = sorted(set(self.kinds))
        of = {kind: torch.tensor([i for i, other in enumerate(self.kinds) if other == kind]) for kind in kinds}
        everything = torch.arange(len(self.kinds))
        if "sunny" in of and len(of) > 1:  # what a tight crop cannot see at all drags the overall figure down
            of["without sunny"] = everything[torch.tensor([kind != "sunny" for kind in self.kinds])]
        return of | {"all": everything}

    def person_index(self) -> Tensor:
        """(Q,) int64: whom each query shows, enrolled or not, to resample by."""
        index = {name: i for i, name in enumerate(sorted(set(self.persons)))}
        return torch.tensor([index[name] for name in self.persons])


def embed_queries(
    model: nn.Module,
    gallery: Gallery,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    *,
    persons: Collection[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    check_images: bool = True,
) -> Queries:
    """Every distorted photo of `root` (of `persons` only if given), with its source photo where the gallery holds it.

    Raises what `scan_persons` raises; ValueError if there is no distorted photo.
    """
    scanned = _select(root, persons, check_images)
    paths = [path for person in scanned for path in person.distorted]
    names = [person.name for person in scanned for _ in person.distorted]
    if not paths:
        raise UserError(f"{root}: no distorted photo to ask the gallery; expected {root}/<person>/distortion/*.jpg")
    found = embed(
        model,
        paths,
        transform,
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        description="queries",
    )
    label_of = {name: label for label, name in enumerate(gallery.persons)}
    truth = torch.tensor([label_of.get(name, -1) for name in names])
    if not_enrolled := int((truth == -1).sum()):
        warn_once(
            f"{root}: {not_enrolled} of {len(paths)} queries are of persons outside the gallery: counted as wrong"
        )
    photos: dict[int, dict[Path, int]] = {}
    for row, (path, label) in enumerate(zip(gallery.paths, gallery.labels.tolist(), strict=True)):
        photos.setdefault(label, {})[path] = row
    sources = []
    for path, label in zip(paths, truth.tolist(), strict=True):
        of_person = photos.get(label, {})
        sources.append(of_person.get(source_photo(path, list(of_person)), -1))
    kinds = [distortion_kind(path) for path in paths]
    return Queries(found.embeddings, truth, torch.tensor(sources), paths, names, kinds, found.quality)


def select_queries(gallery: Gallery, queries: Queries | None, protocol: str) -> Queries:
    """Who asks what: the queries of one of PROTOCOLS, from those of `embed_queries` (not needed for "clean").

    same: all of them, against all photos. cross: none is compared with the photo that it was made from; those whose
    person has no other photo do not ask, and their person stays in the gallery. clean: each photo of the gallery
    whose person has another one asks, itself left out.
    Raises NobodyAsks, or ValueError for another `protocol`.
    """
    check_protocol(protocol)
    several = torch.bincount(gallery.labels, minlength=len(gallery.persons)) > 1
    if protocol == "clean":
        rows = several[gallery.labels].nonzero()[:, 0]
        names = [gallery.persons[label] for label in gallery.labels[rows].tolist()]
        paths = [gallery.paths[row] for row in rows.tolist()]
        tensors = (gallery.embeddings[rows], gallery.labels[rows], rows)
        found = Queries(*tensors, paths, names, ["clean"] * len(rows), _rated(gallery.quality, rows))
    elif protocol == "cross":
        asks = (queries.sources < 0) | several[queries.truth.clamp(min=0)]
        found = queries.subset(asks.nonzero()[:, 0])
    else:
        return replace(queries, sources=torch.full_like(queries.sources, -1))
    if not len(found.paths):
        raise NoQueries(f"PROTOCOL {protocol!r}: no query, for nobody who has a second clean photo asks")
    return found


class NoQueries(ValueError):
    """A protocol has no query in this data."""


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"PROTOCOL {protocol!r}: expected one of {', '.join(map(repr, PROTOCOLS))}")


def retrieve(gallery: Gallery, queries: Queries) -> dict:
    """The gallery's answers to the queries of `select_queries`.

        template, top1 {"mean", "best"}      which template counts; the share of right answers under each
        persons, photos, queries             sizes of the gallery and number of queries
        not_enrolled                         queries whose person has no clean photo: counted as wrong
        persons_without_query                persons of the gallery that can only be wrong answers
        per_kind {kind: {queries, top1}}     by the suffix of the file's name
        per_person {name: {queries, top1}}
        per_query [{path, kind, person, quality, mean: {predicted, score, rank}, best: {...}}]   score: cosine; quality:
                                             see models.FaceNet, None where the model does not tell it
        embeddings                           (Q, D) Tensor in the order of per_query

    A tie goes to the person that sorts first, be it the right one or not.
    """
    quality = [None] * len(queries.paths) if queries.quality is None else queries.quality.tolist()
    per_query = [
        {"path": str(path), "kind": kind, "person": name, "quality": rating}
        for path, kind, name, rating in zip(queries.paths, queries.kinds, queries.persons, quality, strict=True)
    ]
    right = {}
    for template in TEMPLATES:
        found = metrics.ranking(
            queries.embeddings, queries.truth, queries.sources, gallery.weighted, gallery.labels, template
        )
        right[template] = found.rank == 1
        answers = zip(found.predicted.tolist(), found.score.tolist(), found.rank.tolist(), strict=True)
        for query, (label, score, rank) in zip(per_query, answers, strict=True):
            query[template] = {"predicted": gallery.persons[label], "score": score, "rank": rank}

    def by(names: list[str]) -> dict[str, dict]:
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(name, []).append(i)
        return {name: {"queries": len(rows[name]), "top1": share(rows[name])} for name in sorted(rows)}

    def share(of: Sequence[int] | slice) -> dict[str, float]:
        return {template: hits[of].double().mean().item() for template, hits in right.items()}

    return {
        "template": gallery.template,
        "top1": share(slice(None)),
        "persons": len(gallery.persons),
        "photos": len(gallery.paths),
        "queries": len(per_query),
        "not_enrolled": int((queries.truth == -1).sum()),
        "persons_without_query": len(set(gallery.persons) - set(queries.persons)),
        "per_kind": by(queries.kinds),
        "per_person": by(queries.persons),
        "per_query": per_query,
        "embeddings": queries.embeddings,
    }


def measure(gallery: Gallery, queries: Queries, seed: int) -> dict[str, dict[str, metrics.Measured]]:
    """template -> group of `Queries.groups` -> its figures."""
    groups, persons = queries.groups(), queries.person_index()
    measured: dict[str, dict[str, metrics.Measured]] = {}
    for template in TEMPLATES:
        measured[template] = {}
        enrolled = (gallery.weighted, gallery.labels, template)
        opened = metrics.open_rates(queries.embeddings, queries.truth, queries.sources, *enrolled, seed)
        for name, rows in groups.items():
            inputs = (queries.embeddings[rows], queries.truth[rows], queries.sources[rows])
            measured[template][name] = metrics.measure(*inputs, *enrolled, persons[rows], seed, opened=opened.of(rows))
    return measured


def discard_curves(queries: Queries, measured: dict[str, metrics.Measured]) -> dict[str, Tensor]:
    """Group -> metrics.wrong_left of its queries, those of lowest quality refused first; {} where none is rated.

    measured: of one template, of `measure`."""
    if queries.quality is None:
        return {}
    return {
        group: metrics.wrong_left(queries.quality[rows], measured[group].values["rank-1"] == 0)
        for group, rows in queries.groups().items()
    }


def evaluate(
    model: nn.Module,
    gallery: Gallery,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    *,
    persons: Collection[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    check_images: bool = True,
) -> tuple[float, dict]:
    """Every distorted photo of `root` (of `persons` only if given) asks the gallery for its person: protocol "same".

    Returns (top1_accuracy, details): the share (0..1) of queries answered right by `gallery.template`, and what
    `retrieve` found. Raises what `embed_queries` raises.
    """
    options = {"batch_size": batch_size, "num_workers": num_workers, "check_images": check_images}
    queries = embed_queries(model, gallery, root, transform, device, persons=persons, **options)
    details = retrieve(gallery, select_queries(gallery, queries, "same"))
    return details["top1"][gallery.template], details


def summary(details: dict) -> dict[str, float]:
    """The figures of `evaluate`'s details as one flat row: top1_mean, top1_best, top1_<kind> by the chosen template."""
    chosen = details["template"]
    overall = {f"top1_{template}": value for template, value in details["top1"].items()}
    kinds = {f"top1_{kind}": figures["top1"][chosen] for kind, figures in details["per_kind"].items()}
    return overall | kinds | overall  # a kind called "mean" does not take the place of the mean


def validate(
    model: nn.Module,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    *,
    template: str,
    persons: Collection[str] | None = None,
    num_workers: int = 0,
    check_images: bool = True,
) -> tuple[float, dict[str, float]]:
    """What an epoch is chosen by, and its row for the log, on persons of `root` that training does not know.

    The choice: the mean of top-1 under the protocols "same" and "cross", by `template`. "same" alone is won by finding
    the photo again, a stranger's as well as a friend's; "cross" alone says nothing of the persons with one photo.
    Where nobody can ask so, having one photo, there is "same" only, and a warning once.
    The row: `summary` of "same"; top1_cross and top1_clean where somebody can ask so; cosine_<kind>, the mean cosine of
    the distorted photos to the ones that they were made of, where their names tell.
    Raises what `build_gallery` and `embed_queries` raise.
    """
    options = {"persons": persons, "num_workers": num_workers, "check_images": check_images}
    gallery = build_gallery(model, root, transform, device, template=template, **options)
    queries = embed_queries(model, gallery, root, transform, device, **options)
    details = retrieve(gallery, select_queries(gallery, queries, "same"))
    same, row = details["top1"][template], summary(details)
    for protocol in ("cross", "clean"):
        with contextlib.suppress(NoQueries):
            row[f"top1_{protocol}"] = retrieve(gallery, select_queries(gallery, queries, protocol))["top1"][template]
    row |= copy_cosines(gallery, queries)
    if "top1_cross" in row:
        return (same + row["top1_cross"]) / 2, row
    warn_once(
        f"{root}: nobody that epochs are chosen on has a second clean photo; the choice rests on finding photos again, "
        "which says little of knowing people"
    )
    return same, row


def copy_cosines(gallery: Gallery, queries: Queries) -> dict[str, float]:
    """cosine_<kind> -> mean cosine of that kind's queries to the photos that they were made of; of known ones only."""
    known = queries.sources >= 0
    cosines = (queries.embeddings * gallery.embeddings[queries.sources.clamp(min=0)]).sum(1)
    of_kind: dict[str, list[float]] = {}
    for kind, cosine, is_known in zip(queries.kinds, cosines.tolist(), known.tolist(), strict=True):
        if is_known:
            of_kind.setdefault(kind, []).append(cosine)
    return {f"cosine_{kind}": sum(values) / len(values) for kind, values in sorted(of_kind.items())}


# --- a gallery that is kept -------------------------------------------------------------------------------------------


def made_by(model: nn.Module, image_size: int, face_crop: float) -> dict:
    """What embeddings must share to be compared, for Gallery.made_by."""
    return {"fingerprint": fingerprint(model), "image_size": image_size, "face_crop": face_crop}
