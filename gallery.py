"""Retrieval: a gallery of clean embeddings, every distorted photo a query, cosine similarity, top-1."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import metrics
from common import UserError, list_names, safe_text, warn_once
from datasets import Person, Split, folder_of, kinds_of, persons_of
from embedding import Embedded, embed, rated_rows
from folders import source_photos
from models import fingerprint
from scores import TEMPLATES, Scores, check_template, mean_templates, person_scores, templates
from transforms import Transform

PROTOCOLS = ("same", "cross", "clean")  # see select_queries
MOST_KINDS = 20  # of distortion, with figures of their own; FACECOM has seven
OTHER = "other"  # group of all further kinds
TAKEN = {*TEMPLATES, *PROTOCOLS, OTHER, "all", "without sunny"}  # names of figures and groups, that no kind may have


@dataclass(frozen=True)
class Gallery:
    """Every clean photo's embedding with its person.

    embeddings: (G, D) float32 on the CPU, rows of norm 1; labels: (G,) int64, index into persons; paths: G photos.
    persons: sorted names, each with at least one photo. template: which of TEMPLATES counts in `evaluate`.
    made_by: of the model, its fingerprint, image_size and face_crop: what other embeddings must share.
    threshold: of `calibrate`; None: every query is given a name.
    quality: (G,) float32, of each photo as the model rates it; None where it does not.
    digests: SHA-256 of each photo's bytes when it was enrolled, "" where not known; []: of none.
    wide: whether an embedding is of a face beside its whole frame, in halves (models.Crops).
    """

    embeddings: Tensor
    labels: Tensor
    persons: list[str]
    paths: list[Path]
    template: str
    made_by: dict = field(default_factory=dict)
    threshold: dict | None = None
    quality: Tensor | None = None
    digests: list[str] = field(default_factory=list)
    wide: bool = False

    @property
    def weighted(self) -> Tensor:
        """(G, D): the embeddings times their quality, if they are rated: in the mean of a person's photos a bad one
        counts for less."""
        return self.embeddings if self.quality is None else self.embeddings * self.quality.clamp(min=1e-6)[:, None]

    def templates(self, template: str) -> tuple[Tensor, Tensor]:
        """(T, D) rows of norm 1 to match against, and (T,) their labels; see scores.templates."""
        return templates(self.weighted, self.labels, template, self.wide)


def build_gallery(
    model: nn.Module,
    root: Split,
    transform: Transform,
    device: torch.device | str,
    *,
    template: str = "mean",
    made_by: dict | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Gallery:
    """Embed each clean photo of `root`: a folder of persons, or what `scan_persons` found there.

    made_by: see Gallery; to be kept with a gallery that is saved.
    Raises what `scan_persons` and `embed` raise; UserError if there is no clean photo, or for an unknown template.
    """
    check_template(template)
    enrolled, paths = clean_photos(root)
    found = embed(
        model,
        paths,
        transform,
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        description="gallery",
    )
    return _gallery(enrolled, paths, found, template, made_by)


def clean_photos(root: Split) -> tuple[list[Person], list[Path]]:
    """The persons with clean photos, and these photos, person by person."""
    persons = persons_of(root)
    enrolled = [person for person in persons if person.clean]
    if not enrolled:
        folder = folder_of(persons)
        raise UserError(
            f"{folder}: no clean photo for a gallery; expected {folder}/<person>/clean/*.jpg or {folder}/<person>/*.jpg"
        )
    return enrolled, [path for person in enrolled for path in person.clean]


def unembedded_split(root: Split, *, distorted: bool) -> tuple[Gallery, "Queries | None"]:
    """What `embed_split` gives, with zeros for embeddings, to find out what is wrong before anything is embedded.

    distorted: whether there are queries but the gallery's own photos. Raises what `embed_split` raises, but for files.
    """
    enrolled, paths = clean_photos(root)
    gallery = _gallery(enrolled, paths, Embedded(torch.zeros(len(paths), 1), None), "mean", None)
    if not distorted:
        return gallery, None
    persons, paths = _distorted_photos(root)
    return gallery, _queries(gallery, persons, paths, Embedded(torch.zeros(len(paths), 1), None))


def _gallery(
    enrolled: Sequence[Person], paths: list[Path], found: Embedded, template: str, made_by: dict | None
) -> Gallery:
    labels = [label for label, person in enumerate(enrolled) for _ in person.clean]
    return Gallery(
        embeddings=found.embeddings,
        labels=torch.tensor(labels),
        persons=[person.name for person in enrolled],
        paths=paths,
        template=template,
        made_by=made_by or {},
        quality=found.quality,
        wide=found.wide,
    )


def person_means(
    model: nn.Module,
    persons: Sequence[Person],
    transform: Transform,
    device: torch.device | str,
    *,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """The mean clean embeddings (N, D) of `persons`, and the place (N,) of each in that list; persons without a clean
    photo are left out. Raises what `build_gallery` raises."""
    gallery = build_gallery(model, persons, transform, device, num_workers=num_workers)
    place = {person.name: index for index, person in enumerate(persons)}
    means = mean_templates(gallery.embeddings, gallery.labels)
    return means, torch.tensor([place[name] for name in gallery.persons])


@dataclass(frozen=True)
class Queries:
    """Photos to be matched against a gallery.

    embeddings: (Q, D) float32, rows of norm 1; truth: (Q,) int64, index into the gallery's persons, -1 for a person
    outside it; sources: (Q,) int64, gallery row of the photo that the query must not be compared with, -1 for none.
    paths: Q photos; persons: Q names, those of their folders; kinds: Q kinds of distortion, "clean" for a photo of the
    gallery. quality: (Q,) float32, as the model rates them; None for a model that does not.
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
        indices = chosen.tolist()
        return Queries(
            embeddings=self.embeddings[chosen],
            truth=self.truth[chosen],
            sources=self.sources[chosen],
            paths=[self.paths[i] for i in indices],
            persons=[self.persons[i] for i in indices],
            kinds=[self.kinds[i] for i in indices],
            quality=rated_rows(self.quality, chosen),
        )

    def __add__(self, other: "Queries") -> "Queries":
        """These queries and `other` ones of the same gallery and model."""
        rated = self.quality is not None and other.quality is not None
        return Queries(
            embeddings=torch.cat([self.embeddings, other.embeddings]),
            truth=torch.cat([self.truth, other.truth]),
            sources=torch.cat([self.sources, other.sources]),
            paths=self.paths + other.paths,
            persons=self.persons + other.persons,
            kinds=self.kinds + other.kinds,
            quality=torch.cat([self.quality, other.quality]) if rated else None,
        )

    def groups(self) -> dict[str, Tensor]:
        """Name -> indices: each kind, "without sunny" where there are sunny queries and others, and "all"."""
        kinds = sorted(set(self.kinds))
        of = {kind: torch.tensor([i for i, other in enumerate(self.kinds) if other == kind]) for kind in kinds}
        everything = torch.arange(len(self.kinds))
        if "sunny" in of and len(of) > 1:  # faces that are burnt out white drag the overall figure down
            of["without sunny"] = everything[torch.tensor([kind != "sunny" for kind in self.kinds])]
        return of | {"all": everything}

    def person_index(self) -> Tensor:
        """(Q,) int64: a number for each query's person, enrolled or not, to resample by."""
        index = {name: i for i, name in enumerate(sorted(set(self.persons)))}
        return torch.tensor([index[name] for name in self.persons])


def embed_queries(
    model: nn.Module,
    gallery: Gallery,
    root: Split,
    transform: Transform,
    device: torch.device | str,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> Queries:
    """Every distorted photo of `root` (see build_gallery), with its source photo where the gallery holds it.

    Raises what `scan_persons` and `embed` raise; UserError if there is no distorted photo.
    """
    persons, paths = _distorted_photos(root)
    found = embed(
        model,
        paths,
        transform,
        device,
        batch_size=batch_size,
        num_workers=num_workers,
        description="queries",
    )
    return _queries(gallery, persons, paths, found)


def _distorted_photos(root: Split) -> tuple[list[Person], list[Path]]:
    persons = persons_of(root)
    paths = [path for person in persons for path in person.distorted]
    if not paths:
        folder = folder_of(persons)
        raise UserError(
            f"{folder}: no distorted photo to query with; expected {folder}/<person>/distortion/*.jpg "
            "(python -m tools.distort_photos makes such copies of clean photos)"
        )
    return persons, paths


def _queries(gallery: Gallery, persons: Sequence[Person], paths: list[Path], found: Embedded) -> Queries:
    names = [person.name for person in persons for _ in person.distorted]
    label_of = {name: label for label, name in enumerate(gallery.persons)}
    truth = torch.tensor([label_of.get(name, -1) for name in names])
    if not_enrolled := int((truth == -1).sum()):
        warn_once(
            f"{folder_of(persons)}: {not_enrolled} of {len(paths)} queries show persons outside the gallery: "
            "they count as wrong"
        )
    photos: dict[int, dict[Path, int]] = {}
    for row, (path, label) in enumerate(zip(gallery.paths, gallery.labels.tolist(), strict=True)):
        photos.setdefault(label, {})[path] = row
    sources = []
    for person in persons:
        of_person = photos.get(label_of.get(person.name, -1), {})
        held = {photo.name for photo in of_person}  # the gallery may hold these photos out of another folder
        others = [photo for photo in person.clean + person.unreadable if photo.name not in held]
        sources += [of_person.get(photo, -1) for photo in source_photos(person.distorted, [*of_person, *others])]
    return Queries(
        embeddings=found.embeddings,
        truth=truth,
        sources=torch.tensor(sources),
        paths=paths,
        persons=names,
        kinds=kind_groups([kind for person in persons for kind in kinds_of(person)], folder_of(persons)),
        quality=found.quality,
    )


def kind_groups(kinds: Sequence[str], folder: Path) -> list[str]:
    """The name of the group that each photo counts in, of photos of these kinds in `folder`: its kind.

    Beyond MOST_KINDS, only the most frequent kinds stay by themselves, with a warning: so many are file names that were
    not meant to state a kind. A kind called like one of TAKEN is called "kind mean" and so on.
    """
    names = [f"kind {kind}" if kind in TAKEN or kind.startswith("kind ") else kind for kind in map(safe_text, kinds)]
    counts = Counter(names)
    if len(counts) <= MOST_KINDS:
        return names
    by_size = sorted(counts, key=lambda name: (-counts[name], name))
    kept = set(by_size[: MOST_KINDS - 1])
    warn_once(
        f"{folder}: {len(counts)} kinds by the names of the distorted photos, <clean photo's name>_<kind>, such as "
        f"{list_names(by_size[MOST_KINDS - 1 :])}; the {len(kept)} most frequent have figures of their own, the others "
        f"count as {OTHER!r}; rename the photos if these are not kinds"
    )
    return [name if name in kept else OTHER for name in names]


def embed_split(
    model: nn.Module,
    root: Split,
    transform: Transform,
    device: torch.device | str,
    *,
    template: str,
    made_by: dict | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[Gallery, Queries]:
    """`build_gallery` and `embed_queries` of one split in a single pass, whose workers start once.

    Raises what the two raise.
    """
    check_template(template)
    persons = persons_of(root)
    enrolled, clean = clean_photos(persons)
    _, distorted = _distorted_photos(persons)
    found = embed(model, clean + distorted, transform, device, batch_size=batch_size, num_workers=num_workers)
    gallery = _gallery(enrolled, clean, found.rows(slice(None, len(clean))), template, made_by)
    return gallery, _queries(gallery, persons, distorted, found.rows(slice(len(clean), None)))


def select_queries(gallery: Gallery, queries: Queries | None, protocol: str) -> Queries:
    """The queries of one of PROTOCOLS, from those of `embed_queries` (not needed for "clean").

    same: all of them, against all photos. cross: each against all photos but the one that it was made from; queries
    whose person has no other photo are left out, the person stays in the gallery. clean: each photo of the gallery
    whose person has another one, against all photos but itself.
    Raises NoQueries if none is left, UserError for an unknown `protocol`.
    """
    check_protocol(protocol)
    several = torch.bincount(gallery.labels, minlength=len(gallery.persons)) > 1
    if protocol == "same":
        return replace(queries, sources=torch.full_like(queries.sources, -1))
    if protocol == "cross":
        chosen = (queries.sources < 0) | several[queries.truth.clamp(min=0)]
        found = queries.subset(chosen.nonzero()[:, 0])
    else:
        photos = own_queries(gallery, Embedded(gallery.embeddings, gallery.quality), kind="clean")
        found = photos.subset(several[gallery.labels].nonzero()[:, 0])
    if not len(found.paths):
        who = "no person with a distorted photo" if protocol == "cross" else "no person"
        raise NoQueries(f"protocol {protocol!r}: no query, as {who} has a second clean photo")
    return found


def own_queries(gallery: Gallery, found: Embedded, kind: str) -> Queries:
    """The gallery's photos as queries of a kind, by other embeddings than in the gallery."""
    return Queries(
        embeddings=found.embeddings,
        truth=gallery.labels,
        sources=torch.arange(len(gallery.labels)),
        paths=gallery.paths,
        persons=[gallery.persons[label] for label in gallery.labels.tolist()],
        kinds=[kind] * len(gallery.labels),
        quality=found.quality,
    )


class NoQueries(UserError):
    """The data holds no query of a protocol."""


def check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r}: expected one of {', '.join(map(repr, PROTOCOLS))}")


def score(gallery: Gallery, queries: Queries, templates: Sequence[str] = TEMPLATES) -> dict[str, Scores]:
    """Template -> scores of the queries of `select_queries`, which `retrieve` and `measure` read. Memory: see Scores.

    Raises ValueError if there is no query.
    """
    return {
        template: person_scores(
            queries=queries.embeddings,
            truth=queries.truth,
            sources=queries.sources,
            gallery=gallery.weighted,
            labels=gallery.labels,
            template=template,
            wide=gallery.wide,
        )
        for template in templates
    }


def retrieve(gallery: Gallery, queries: Queries, scores: dict[str, Scores]) -> dict:
    """The gallery's answers to the queries of `select_queries`, by their `score`.

        template, top1 {"mean", "best"}      the template that counts; share of right answers by template scored
        persons, photos, queries             sizes of the gallery and number of queries
        not_enrolled                         queries whose person has no clean photo: counted as wrong
        persons_without_query                persons of the gallery who are in no query
        per_kind {kind: {queries, top1}}     by the suffix of the file's name
        per_person {name: {queries, top1}}
        per_query [{path, kind, person, quality, mean: {predicted, score, rank}, best: {...}}]   score: cosine; quality:
                                             see models.FaceNet, None for a model that gives none
        embeddings                           (Q, D) Tensor in the order of per_query

    A tie goes to the person that sorts first, right or wrong.
    """
    quality = [None] * len(queries.paths) if queries.quality is None else queries.quality.tolist()
    per_query = [
        {"path": str(path), "kind": kind, "person": name, "quality": rating}
        for path, kind, name, rating in zip(queries.paths, queries.kinds, queries.persons, quality, strict=True)
    ]
    right = {}
    for template, of_template in scores.items():
        found = metrics.ranking(of_template)
        right[template] = found.rank == 1
        answers = zip(found.predicted.tolist(), found.score.tolist(), found.rank.tolist(), strict=True)
        for query, (label, cosine, rank) in zip(per_query, answers, strict=True):
            query[template] = {"predicted": gallery.persons[label], "score": cosine, "rank": rank}

    def share(of: Sequence[int] | slice) -> dict[str, float]:
        return {template: hits[of].double().mean().item() for template, hits in right.items()}

    def by(names: list[str]) -> dict[str, dict]:
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(name, []).append(i)
        return {name: {"queries": len(rows[name]), "top1": share(rows[name])} for name in sorted(rows)}

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


def measure(
    gallery: Gallery, queries: Queries, scores: dict[str, Scores], seed: int
) -> dict[str, dict[str, metrics.Measured]]:
    """template -> group of `Queries.groups` -> its figures, by the queries' `score`."""
    groups, persons = queries.groups(), queries.person_index()
    precision = metrics.average_precision(
        queries=queries.embeddings,
        truth=queries.truth,
        sources=queries.sources,
        gallery=gallery.weighted,
        labels=gallery.labels,
    )
    measured: dict[str, dict[str, metrics.Measured]] = {}
    for template, of_template in scores.items():
        opened = metrics.open_rates(of_template, seed)
        measured[template] = {
            group: metrics.measure(
                scores=of_template.subset(rows),
                precision=precision[rows],
                persons=persons[rows],
                opened=opened.subset(rows),
                seed=seed,
            )
            for group, rows in groups.items()
        }
    return measured


def discard_curves(queries: Queries, measured: dict[str, metrics.Measured]) -> dict[str, Tensor]:
    """Group -> metrics.wrong_left of its queries, those of lowest quality refused first; {} where none is rated.

    measured: group -> figures, of one template of `measure`.
    """
    if queries.quality is None:
        return {}
    return {
        group: metrics.wrong_left(queries.quality[rows], measured[group].values["rank-1"] == 0)
        for group, rows in queries.groups().items()
    }


def evaluate(
    model: nn.Module,
    gallery: Gallery,
    root: Split,
    transform: Transform,
    device: torch.device | str,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[float, dict]:
    """Match every distorted photo of `root` (see build_gallery) against the gallery, by the protocol "same".

    Returns (top1_accuracy, details): the share (0..1) of queries answered right by `gallery.template`, and what
    `retrieve` found. Raises what `embed_queries` raises.
    """
    queries = embed_queries(model, gallery, root, transform, device, batch_size=batch_size, num_workers=num_workers)
    queries = select_queries(gallery, queries, "same")
    details = retrieve(gallery, queries, score(gallery, queries))
    return details["top1"][gallery.template], details


def made_by(model: nn.Module, image_size: int, face_crop: float, framing: str = "centre") -> dict:
    """What embeddings must share to be compared, for Gallery.made_by. framing: stated where it is not "centre", so that
    galleries of earlier versions can still be read."""
    facts = {"fingerprint": fingerprint(model), "image_size": image_size, "face_crop": face_crop}
    return facts if framing == "centre" else facts | {"framing": framing}
