"""Validation during training: the figure that the best epoch is chosen by."""

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from common import UserError, list_names, warn_once
from datasets import Person, folder_of, kinds_of
from degradations import VALIDATION_COPIES
from embedding import embed
from gallery import (
    Gallery,
    NoQueries,
    Queries,
    build_gallery,
    clean_photos,
    embed_queries,
    own_queries,
    retrieve,
    score,
    select_queries,
)
from scores import TEMPLATES
from transforms import Transform

# Of the best epoch, by `validate`; kept in checkpoints.
CHOICE = f"mean of same and cross, on the distorted photos and on {VALIDATION_COPIES} degraded copies of each clean one"
DEGRADED = "degraded"  # kind of the clean photos that are degraded on the fly
QUICK_STRIDE = 3  # quick validation takes a third of the distorted photos


@dataclass(frozen=True)
class ValidationSet:
    """The persons that epochs are compared on, none of them trained on, and how their photos are seen.

    degraded: `transform` with a FixedDegradation in it, several of them. template: by which persons are matched. quick:
    only every QUICK_STRIDE-th distorted photo, and in `validate` no mirror images.
    """

    persons: Sequence[Person]
    transform: Transform
    degraded: Sequence[Transform]
    device: torch.device
    template: str
    quick: bool
    num_workers: int = 0

    def embed(self, model: nn.Module) -> tuple[Gallery, Queries]:
        """The clean photos as a gallery; as queries the distorted ones and the clean ones, degraded in each way.

        Raises what `gallery.build_gallery` raises.
        """
        persons, device, workers = self.persons, self.device, self.num_workers
        gallery = build_gallery(model, persons, self.transform, device, template=self.template, num_workers=workers)
        queries = []
        if any(person.distorted for person in persons):
            asked = thinned(persons, QUICK_STRIDE) if self.quick else persons
            queries.append(embed_queries(model, gallery, asked, self.transform, device, num_workers=workers))
        for transform in self.degraded:
            found = embed(model, gallery.paths, transform, device, num_workers=workers, description="degraded")
            queries.append(own_queries(gallery, found, kind=DEGRADED))
        return gallery, functools.reduce(operator.add, queries)


def validate(model: nn.Module, on: ValidationSet) -> tuple[float, dict[str, float]]:
    """The figure that the best epoch is chosen by, and a row for the log.

    The figure: the mean of top-1 under the protocols "same" and "cross". "same" alone rewards finding the photo again,
    a stranger's as well as a friend's; "cross" alone leaves out the persons with one photo. Where no query is left
    under "cross", it is top-1 under "same", with a warning. Distorted photos are soon all answered, or are hopeless; by
    the degraded ones epochs differ.
    The row: `summary` of "same"; top1_cross and top1_clean where those protocols have queries; cosine_<kind>, see
    `copy_cosines`. Quick figures compare epochs; those to report are `gallery.evaluate`'s.
    """
    with _without_mirror(model) if on.quick else contextlib.nullcontext():
        gallery, queries = on.embed(model)
    details = _answers(gallery, queries, "same", TEMPLATES)
    same, row = details["top1"][on.template], summary(details)
    for protocol in ("cross", "clean"):
        with contextlib.suppress(NoQueries):
            row[f"top1_{protocol}"] = _answers(gallery, queries, protocol, [on.template])["top1"][on.template]
    row |= copy_cosines(gallery, queries)
    if "top1_cross" in row:
        return (same + row["top1_cross"]) / 2, row
    warn_once(
        f"{folder_of(on.persons)}: no distorted photo shows a person with a second clean photo, so the best epoch is "
        "chosen by how well photos are found again, which says little about recognising people"
    )
    return same, row


def check_data(train: Sequence[str], val_persons: Sequence[Person], *, max_clean_drop: float) -> None:
    """Check the persons that are trained on (names) and validated on, before anything is embedded.

    Raises UserError for fewer than two train persons, and what `validate` raises for its data. Warns where
    `max_clean_drop` (points of top-1 on clean photos) can have no effect.
    """
    if len(train) < 2:
        raise UserError(
            f"train: {len(train)} person to train on ({list_names(train)}), expected two or more to tell apart; add "
            "persons to train/, or lower HOLDOUT_PERSONS"
        )
    clean_photos(val_persons)
    if not any(person.distorted for person in val_persons):
        warn_once(
            f"{folder_of(val_persons)}: no distorted photo, so the best epoch is chosen on copies of the clean photos "
            "that are degraded on the fly"
        )
    if max_clean_drop < 100 and not any(len(person.clean) > 1 for person in val_persons):
        warn_once(
            f"{folder_of(val_persons)}: MAX_CLEAN_DROP = {max_clean_drop} has no effect, as no person has two clean "
            "photos to measure the forgetting on"
        )


def _answers(gallery: Gallery, queries: Queries, protocol: str, templates: Sequence[str]) -> dict:
    """`retrieve`'s details under one protocol and these templates."""
    chosen = select_queries(gallery, queries, protocol)
    return retrieve(gallery, chosen, score(gallery, chosen, templates))


def thinned(persons: Sequence[Person], stride: int) -> list[Person]:
    """`persons` with every `stride`-th distorted photo of each kind, counted across all persons.

    The kinds start at different photos, so that together they show more source photos and persons than each alone.
    Every kind of at least `stride` photos stays, however many kinds there are.
    """
    counts: dict[str, int] = {}  # kind -> its photos so far, plus its start
    taken = []
    for person in persons:
        distorted = []
        for path, kind in zip(person.distorted, kinds_of(person), strict=True):
            count = counts.setdefault(kind, len(counts))
            counts[kind] += 1
            if count % stride == 0:
                distorted.append(path)
        taken.append(replace(person, distorted=tuple(distorted)))
    return taken


@contextlib.contextmanager
def _without_mirror(model: nn.Module) -> Iterator[None]:
    """Meanwhile, `model` embeds a photo alone, not together with its mirror image."""
    mirror, model.mirror = getattr(model, "mirror", False), False
    try:
        yield
    finally:
        model.mirror = mirror


def copy_cosines(gallery: Gallery, queries: Queries) -> dict[str, float]:
    """cosine_<kind> -> mean cosine of the queries of that kind to their source photos, where these are known."""
    known = queries.sources >= 0
    cosines = (queries.embeddings * gallery.embeddings[queries.sources.clamp(min=0)]).sum(1)
    of_kind: dict[str, list[float]] = {}
    for kind, cosine, is_known in zip(queries.kinds, cosines.tolist(), known.tolist(), strict=True):
        if is_known:
            of_kind.setdefault(kind, []).append(cosine)
    return {f"cosine_{kind}": sum(values) / len(values) for kind, values in sorted(of_kind.items())}


def summary(details: dict) -> dict[str, float]:
    """One flat row of `retrieve`'s details: top1_mean, top1_best, and top1_<kind> under the gallery's template."""
    chosen = details["template"]
    overall = {f"top1_{template}": value for template, value in details["top1"].items()}
    kinds = {f"top1_{kind}": figures["top1"][chosen] for kind, figures in details["per_kind"].items()}
    return overall | kinds
