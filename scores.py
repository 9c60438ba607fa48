"""Scores of queries against the persons of a gallery. They are computed once; metrics.py reads every figure from them.

A query's score against a person is its cosine with the person's mean embedding (template "mean") or with the person's
most similar photo ("best"). Where embeddings are of a face beside a whole frame, in halves (`wide`, see models.Crops),
the faces alone are averaged, see `templates`.

Shapes used throughout: queries (Q, D), rows of norm 1; gallery (G, D), likewise, or rows whose norm is the weight of
the photo in its person's mean; labels (G,) int64 in 0..P-1, the person of each gallery row, every person with at least
one; truth (Q,) int64, the query's person, -1 if not enrolled; sources (Q,) int64, the row of the query's own source
photo, which it must not be compared with, -1 for none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import UserError

TEMPLATES = ("mean", "best")  # a person's mean embedding, or the best match over its photos
TIE = 1e-6  # cosines closer than this are equal: float32 rounding
BLOCK_COSINES = 2**24  # cosines with photos held at a time: 64 MiB of float32


def check_template(template: str) -> None:
    """Raises UserError for a template that is not one of TEMPLATES."""
    if template not in TEMPLATES:
        raise UserError(f"TEMPLATE = {template!r}: expected one of {', '.join(map(repr, TEMPLATES))}")


@dataclass(frozen=True)
class Scores:
    """The score of each query against each person, under one template.

    matrix: (Q, P) float32; 10,000 queries and 10,000 persons take 400 MB. -inf where the query's source is the
    person's only photo. truth: (Q,) int64, the query's person, -1 if not enrolled.
    """

    matrix: Tensor
    truth: Tensor

    @property
    def enrolled(self) -> Tensor:
        """(Q,) bool: whether the query's person is in the gallery."""
        return self.truth >= 0

    def subset(self, rows: Tensor) -> "Scores":
        """The scores of some queries: `rows` holds their indices (N,), or says which (Q,) bool."""
        return Scores(self.matrix[rows], self.truth[rows])

    def among(self, persons: Tensor) -> "Scores":
        """The scores in a gallery of these persons only, (P,) bool: who else is enrolled does not change a score."""
        label = torch.where(persons, persons.cumsum(0) - 1, -1)
        return Scores(self.matrix[:, persons], torch.where(self.enrolled, label[self.truth.clamp(min=0)], -1))


def person_scores(
    queries: Tensor, truth: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor, template: str, wide: bool
) -> Scores:
    """Scores of all queries against all persons. A query with a source is scored against its person's other photos.

    Raises ValueError if there is no query or no gallery row, UserError for an unknown template.
    """
    check_template(template)
    if len(queries) == 0 or len(gallery) == 0:
        raise ValueError(f"retrieval needs queries and a gallery, got {len(queries)} and {len(gallery)} rows")
    match_means = _match_mean_faces if wide else _match_means
    match = match_means if template == "mean" else _match_photos
    matrix = match(queries, sources, gallery, labels)
    rows = (sources >= 0).nonzero()[:, 0]
    own = labels[sources[rows]]
    only_photo = torch.bincount(labels)[own] == 1
    matrix[rows[only_photo], own[only_photo]] = -torch.inf
    return Scores(matrix, truth)


def photo_cosines(queries: Tensor, sources: Tensor, gallery: Tensor, held: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries and their cosines (B, G) with every photo, -inf at the query's source.

    held: how many such matrices the caller makes of each; together they hold at most BLOCK_COSINES numbers.
    """
    gallery = _unit(gallery)
    step = max(1, BLOCK_COSINES // (held * len(gallery)))
    for start in range(0, len(queries), step):
        block = slice(start, min(start + step, len(queries)))
        cosines = queries[block] @ gallery.T
        rows = (sources[block] >= 0).nonzero()[:, 0]
        cosines[rows, sources[block][rows]] = -torch.inf
        yield block, cosines


# --- templates --------------------------------------------------------------------------------------------------------


def templates(gallery: Tensor, labels: Tensor, template: str, wide: bool) -> tuple[Tensor, Tensor]:
    """(T, D) rows of norm 1 to match against, and (T,) their labels: a person's score is that of its best row.

    "best": all photos. "mean": one row per person. Embeddings of a face and a whole frame (`wide`) have a row per photo
    under "mean" too: the mean of the person's faces beside the frame of that one photo. A frame's embedding identifies
    a photo rather than a person, and the mean of several frames resembles none of them. A person whose faces are all
    burnt out is matched by its frames alone.
    Raises UserError for an unknown template.
    """
    check_template(template)
    if template == "best":
        return _unit(gallery), labels
    if not wide:
        return mean_templates(gallery, labels), torch.arange(int(labels.max()) + 1)
    faces, frames, share = _faces_and_frames(gallery)
    means = mean_templates(faces, labels)[labels]
    return torch.cat([share * means, _frame_norm(means, share)[:, None] * frames], 1), labels


def mean_templates(gallery: Tensor, labels: Tensor) -> Tensor:
    """(P, D): the sum of each person's embeddings, renormalised."""
    return F.normalize(_sums(gallery, labels))


def _sums(gallery: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(int(labels.max()) + 1, gallery.shape[1]).index_add_(0, labels, gallery)


def _unit(gallery: Tensor) -> Tensor:
    """Rows of norm 1; where they are already, the gallery itself and not a copy."""
    norms = gallery.norm(dim=1, keepdim=True)
    return gallery if ((norms - 1).abs() < 1e-4).all() else F.normalize(gallery)


def _faces_and_frames(gallery: Tensor) -> tuple[Tensor, Tensor, float]:
    """Faces (G, D / 2), of norm `share` times the photo's weight, or 0 where burnt out; frames, of norm 1; and share,
    the norm of a face beside a frame."""
    faces, frames = gallery.chunk(2, dim=1)
    return faces, F.normalize(frames), min(1.0, (faces.norm(dim=1) / gallery.norm(dim=1)).max().item())


def _frame_norm(means: Tensor, share: float) -> Tensor:
    """The norm of the frame beside each mean face (N, D / 2), of norm 1 or 0, so that both together have norm 1."""
    return torch.where(means.any(1), math.sqrt(max(1 - share**2, 1e-12)), 1.0)


# --- one matching per template: (Q, P) scores -------------------------------------------------------------------------


def _match_photos(queries: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """The highest cosine among each person's photos."""
    scores = torch.full((len(queries), int(labels.max()) + 1), -torch.inf)
    for block, cosines in photo_cosines(queries, sources, gallery):
        scores[block].scatter_reduce_(1, labels.expand_as(cosines), cosines, "amax")
    return scores


def _match_means(queries: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """The cosine with the mean of each person's photos."""
    scores = queries @ mean_templates(gallery, labels).T
    rows = (sources >= 0).nonzero()[:, 0]
    rest = _means_without(sources[rows], gallery, labels)
    scores[rows, labels[sources[rows]]] = (queries[rows] * rest).sum(1)
    return scores


def _match_mean_faces(queries: Tensor, sources: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """The cosine with the mean of each person's faces beside its most similar frame, see `templates`."""
    faces, frames, share = _faces_and_frames(gallery)
    frame_norm = _frame_norm(mean_templates(faces, labels), share).repeat(len(queries), 1)  # (Q, P)
    rows = (sources >= 0).nonzero()[:, 0]
    rest = _means_without(sources[rows], faces, labels)
    frame_norm[rows, labels[sources[rows]]] = _frame_norm(rest, share)
    query_faces, query_frames = queries.chunk(2, dim=1)
    of_faces = _match_means(query_faces, sources, faces, labels)
    of_frames = _match_photos(query_frames, sources, frames, labels)
    return share * of_faces + frame_norm * of_frames


def _means_without(photos: Tensor, gallery: Tensor, labels: Tensor) -> Tensor:
    """(N, D): the mean of each photo's person without that photo, photos (N,) being gallery rows. Rounding noise where
    it is the person's only photo."""
    return F.normalize(_sums(gallery, labels)[labels[photos]] - gallery[photos])
