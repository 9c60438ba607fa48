"""Retrieval: a gallery of clean embeddings, every distorted photo a query, cosine similarity, top-1."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import Person, PhotoList, Transform, distortion_kind, rank_and_world, scan_persons, warn_once

TEMPLATES = ("mean", "best")  # a person's mean embedding, or the best match over its photos
TIE = 1e-6  # cosines closer than this are equal: float32 rounding
BLOCK_SCORES = 2**24  # cosines held at a time: 64 MiB of float32


@dataclass(frozen=True)
class Gallery:
    """Every clean photo's embedding with its person.

    embeddings: (G, D) float32 on the CPU, rows of norm 1; labels: (G,) int64, index into persons; paths: G photos.
    persons: sorted names, each with at least one photo. template: which of TEMPLATES counts in `evaluate`.
    """

    embeddings: Tensor
    labels: Tensor
    persons: list[str]
    paths: list[Path]
    template: str

    def templates(self, template: str) -> tuple[Tensor, Tensor]:
        """(T, D) rows of norm 1 to match against, and (T,) their labels: all photos for "best", one row per person
        for "mean" (sum of the photos' embeddings, renormalised).

        Raises ValueError for another `template`.
        """
        check_template(template)
        if template == "best":
            return self.embeddings, self.labels
        sums = torch.zeros(len(self.persons), self.embeddings.shape[1]).index_add_(0, self.labels, self.embeddings)
        return F.normalize(sums), torch.arange(len(self.persons))


def check_template(template: str) -> None:
    if template not in TEMPLATES:
        raise ValueError(f"TEMPLATE = {template!r}: expected one of {', '.join(map(repr, TEMPLATES))}")


def nearest(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """For each query the row of highest cosine in the gallery, and that cosine.

    Shapes: (Q, D), (G, D), rows of norm 1 -> (Q,) int64, (Q,) float32. A tie (cosines within TIE) goes to the lower
    gallery index.
    At most BLOCK_SCORES cosines are held at a time.
    Raises ValueError if there is no query or no gallery row.
    """
    if len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"retrieval needs queries and a gallery, got {len(queries)} and {len(gallery)} rows")
    rows = max(1, BLOCK_SCORES // len(gallery))
    index = []
    for block in queries.split(rows):
        cosine = block @ gallery.T  # (B, G)
        # Equal rows differ by rounding, with their place in the product: argmax() of the cosines would pick by chance.
        tied = cosine >= cosine.amax(1, keepdim=True) - TIE
        index.append(tied.to(torch.uint8).argmax(1))  # argmax() gives the first of equals
    index = torch.cat(index)
    return index, (queries * gallery[index]).sum(1)


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
) -> Tensor:
    """Embeddings (N, D) float32, rows of norm 1, on the CPU, of the photos at `paths`; `model` in eval mode meanwhile.

    Under torchrun each process embeds its share of the photos, and all of them get all embeddings.
    Raises OSError for an unreadable photo, ValueError with the path if an embedding is not finite.
    """
    device = torch.device(device)
    rank, world = rank_and_world()
    photos = PhotoList(paths[rank::world], transform)
    loader = DataLoader(photos, batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    modes = [(module, module.training) for module in model.modules()]  # a frozen BatchNorm has its own
    model.eval()
    batches = []
    try:
        quiet = rank > 0 or len(loader) < 3
        for images in tqdm(loader, desc=description, unit="batch", leave=False, disable=quiet):
            images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
            batches.append(F.normalize(model(images).float()).cpu())
    finally:
        for module, training in modes:
            module.training = training
    embeddings = torch.cat(batches) if batches else torch.empty(0, 0)
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, embeddings)
        embeddings = torch.empty(len(paths), max(part.shape[1] for part in parts))
        for other, part in enumerate(parts):
            if len(part):
                embeddings[other::world] = part
    broken = ~((embeddings.norm(dim=1) - 1).abs() < 1e-3)  # NaN, infinity or all zero
    if broken.any():
        first = paths[int(broken.int().argmax())]
        raise ValueError(
            f"{first}: its embedding is not finite or zero; the model's weights diverged, go back to an earlier one"
        )
    return embeddings


def build_gallery(
    model: nn.Module,
    root: Path | str,
    transform: Transform,
    device: torch.device | str,
    *,
    persons: Collection[str] | None = None,
    template: str = "mean",
    batch_size: int = 64,
    num_workers: int = 0,
    check_images: bool = True,
) -> Gallery:
    """Embed each clean photo of `root` (see datasets.scan_persons), of `persons` only if they are given.

    Raises what `scan_persons` raises; ValueError if there is no clean photo, or for an unknown template.
    """
    check_template(template)
    scanned = _select(root, persons, check_images)
    enrolled = [person for person in scanned if person.clean]
    if not enrolled:
        raise ValueError(
            f"{root}: no clean photo to build a gallery from; expected {root}/<person>/clean/*.jpg or <person>/*.jpg"
        )
    paths = [path for person in enrolled for path in person.clean]
    labels = [label for label, person in enumerate(enrolled) for _ in person.clean]
    embeddings = embed(
        model, paths, transform, device, batch_size=batch_size, num_workers=num_workers, description="gallery"
    )
    return Gallery(embeddings, torch.tensor(labels), [person.name for person in enrolled], paths, template)


def _select(root: Path | str, persons: Collection[str] | None, check_images: bool) -> list[Person]:
    """All persons of `root`, or those named; ValueError for a name that `root` does not hold."""
    scanned = scan_persons(root, check_images=check_images)
    if persons is None:
        return scanned
    asked = set(persons)
    missing = sorted(asked - {person.name for person in scanned})
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} of the persons asked for have no readable photo there, {missing[0]!r} first"
        )
    return [person for person in scanned if person.name in asked]


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
    """Every distorted photo of `root` (of `persons` only if given) asks the gallery for its person.

    Returns (top1_accuracy, details): the share (0..1) of queries answered right by `gallery.template`, and

        template, top1 {"mean", "best"}      which template counts; the share under each
        persons, photos, queries             sizes of the gallery and number of queries
        not_enrolled                         queries whose person has no clean photo: counted as wrong, and told
        per_kind {kind: {queries, top1}}     by the suffix of the file's name
        per_query [{path, kind, person, mean: {predicted, score}, best: {predicted, score}}]   score: cosine
        embeddings                           (Q, D) Tensor in the order of per_query

    A tie goes to the person that sorts first. Raises what `scan_persons` raises; ValueError if there is no query.
    """
    scanned = _select(root, persons, check_images)
    paths = [path for person in scanned for path in person.distorted]
    names = [person.name for person in scanned for _ in person.distorted]
    if not paths:
        raise ValueError(f"{root}: no distorted photo to ask the gallery; expected {root}/<person>/distortion/*.jpg")
    kinds = [distortion_kind(path) for path in paths]
    embeddings = embed(
        model, paths, transform, device, batch_size=batch_size, num_workers=num_workers, description="queries"
    )
    label_of = {name: label for label, name in enumerate(gallery.persons)}
    truth = torch.tensor([label_of.get(name, -1) for name in names])  # -1: no gallery label equals it
    not_enrolled = int((truth == -1).sum())
    if not_enrolled:
        warn_once(
            f"{root}: {not_enrolled} of {len(paths)} queries are of persons outside the gallery: counted as wrong"
        )

    per_query = [
        {"path": str(path), "kind": kind, "person": name} for path, kind, name in zip(paths, kinds, names, strict=True)
    ]
    correct = {}
    for template in TEMPLATES:
        rows, row_labels = gallery.templates(template)
        index, score = nearest(embeddings, rows)
        predicted = row_labels[index]
        correct[template] = predicted == truth
        for query, label, cosine in zip(per_query, predicted.tolist(), score.tolist(), strict=True):
            query[template] = {"predicted": gallery.persons[label], "score": cosine}

    def share(of: Sequence[int] | slice) -> dict[str, float]:
        return {template: hits[of].double().mean().item() for template, hits in correct.items()}

    per_kind = {}
    for kind in sorted(set(kinds)):
        of_kind = [i for i, other in enumerate(kinds) if other == kind]
        per_kind[kind] = {"queries": len(of_kind), "top1": share(of_kind)}
    details = {
        "template": gallery.template,
        "top1": share(slice(None)),
        "persons": len(gallery.persons),
        "photos": len(gallery.paths),
        "queries": len(paths),
        "not_enrolled": not_enrolled,
        "per_kind": per_kind,
        "per_query": per_query,
        "embeddings": embeddings,
    }
    return details["top1"][gallery.template], details


def summary(details: dict) -> dict[str, float]:
    """The figures of `evaluate`'s details as one flat row: top1_mean, top1_best, top1_<kind> by the chosen template."""
    row = {f"top1_{template}": value for template, value in details["top1"].items()}
    chosen = details["template"]
    return row | {f"top1_{kind}": figures["top1"][chosen] for kind, figures in details["per_kind"].items()}


def top1_table(evaluations: dict[str, dict]) -> str:
    """Text table of top-1 in %, a row per kind with its number of queries, columns mean and best per evaluation.

    `evaluations`: title -> details of `evaluate`, all of the same queries.
    """
    first = next(iter(evaluations.values()))
    kinds = first["per_kind"]
    # What a crop cannot see at all drags the overall figure down: FACECOM's sunny has its own row and its own rest.
    others = [kind for kind in kinds if kind != "sunny"]

    def without_sunny(details: dict, template: str) -> float:
        per_kind = [details["per_kind"][kind] for kind in others]
        queries = sum(kind["queries"] for kind in per_kind)
        return sum(kind["top1"][template] * kind["queries"] for kind in per_kind) / queries if queries else math.nan

    rows = [
        (kind, kinds[kind]["queries"], [d["per_kind"][kind]["top1"] for d in evaluations.values()]) for kind in kinds
    ]
    if 0 < len(others) < len(kinds):
        rest = [{t: without_sunny(d, t) for t in TEMPLATES} for d in evaluations.values()]
        rows.append(("without sunny", sum(kinds[kind]["queries"] for kind in others), rest))
    rows.append(("all", first["queries"], [details["top1"] for details in evaluations.values()]))

    first_width = max(15, *(len(kind) + 2 for kind in kinds))
    width = max(15, *(len(title) + 2 for title in evaluations))
    lines = [
        f"{'top-1, %':<{first_width}}{'queries':>8}" + "".join(f"{title:>{width}}" for title in evaluations),
        f"{'template':<{first_width}}{'':>8}" + f"{'mean   best':>{width}}" * len(evaluations),
    ]
    for name, queries, values in rows:
        cells = (f"{100 * value['mean']:.1f}  {100 * value['best']:>5.1f}" for value in values)
        lines.append(f"{name:<{first_width}}{queries:>8}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)
