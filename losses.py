"""The losses of both stages: the ArcFace head, the contrastive loss and the choice of hard negatives."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError


class ArcMarginProduct(nn.Module):
    """Additive angular margin logits: Deng et al. 2019, arXiv:1801.07698, eq. 3; feed to cross_entropy.

    Row i, column j: s cos(t_ij), and s cos(t_ij + m) in the column of label i. t_ij: angle between embedding i and
    class centre j; m: margin, radians; s: scale, no unit.
    cos(t + m) rises again beyond t = pi - m; there the target is cos(t) - m sin(m), so that it falls all the way.
    With `easy_margin` the margin applies only where cos(t) > 0, and the target is cos(t) elsewhere.
    Shapes: embeddings (B, D) of any norm, labels (B,) int64 in 0..C-1 -> logits (B, C), float32 even under autocast.
    Raises UserError if s <= 0 or m is outside [0, pi/2).
    """

    def __init__(self, in_features: int, out_features: int, s: float, m: float, easy_margin: bool = False):
        super().__init__()
        if not 0 < s < math.inf:
            raise UserError(f"SCALE = {s}: expected a positive number, usually 8..64")
        if not 0 <= m < math.pi / 2:
            raise UserError(f"MARGIN = {m}: expected radians in [0, pi/2); 0.5 is 28.6 degrees")
        self.s, self.m, self.easy_margin = s, m, easy_margin
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # only each row's direction counts
        nn.init.xavier_uniform_(self.weight)

    @torch.no_grad()
    def start_at(self, means: Tensor, labels: Tensor) -> None:
        """Move the centres of the classes `labels` (N,) int64 to `means` (N, D); the others stay."""
        self.weight[labels] = F.normalize(means).to(self.weight)

    def cosine(self, embeddings: Tensor) -> Tensor:
        """cos(t_ij), (B, C), without margin and scale: what a prediction is read from."""
        with torch.autocast(embeddings.device.type, enabled=False):  # half precision does not resolve small angles
            embeddings = embeddings.to(self.weight.dtype)
            return F.linear(F.normalize(embeddings), F.normalize(self.weight))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = self.cosine(embeddings)  # (B, C)
        target = cosine.gather(1, labels[:, None])  # (B, 1)
        # Rounding gives cosines just above 1, and sqrt has infinite slope at 0: NaN without the floor.
        sine = (1 - target.square()).clamp_min(1e-6).sqrt()
        shifted = target * math.cos(self.m) - sine * math.sin(self.m)  # cos(t + m)
        if self.easy_margin:
            shifted = torch.where(target > 0, shifted, target)
        else:
            turned = target <= -math.cos(self.m)  # t >= pi - m
            shifted = torch.where(turned, target - self.m * math.sin(self.m), shifted)
        return self.s * cosine.scatter(1, labels[:, None], shifted)


class ContrastiveLoss(nn.Module):
    """mean_i [ d(a_i, p_i)^2 + max(0, margin - d(p_i, n_i))^2 ]: Hadsell et al. 2006, eq. 4, without its factor 1/2.

    a: anchor, p: positive, n: negative; it is p that goes to a and leaves n, so a may be frozen.
    d: Euclidean distance; on unit embeddings d^2 = 2 - 2 cos, 0..4. `margin` is a distance: 1.0 is an angle of 60
    degrees, and a negative farther away than that gives no gradient.
    Shapes: anchor, positive, negative (B, D), weight (B,) in 0..1 -> scalar, the mean over triplets by weight; 0 if
    all weights are 0. The gradient is finite, and 0, where a pair coincides.
    Raises UserError if the margin is outside (0, 2], the distances that unit embeddings can have.
    """

    def __init__(self, margin: float):
        super().__init__()
        if not 0 < margin <= 2:
            raise UserError(
                f"CONTRASTIVE_MARGIN = {margin}: expected a distance in (0, 2]; unit embeddings are 0..2 apart"
            )
        self.margin = margin

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor, weight: Tensor | None = None) -> Tensor:
        pull = (anchor - positive).square().sum(1)  # (B,)
        push = (self.margin - euclidean(positive, negative)).clamp_min(0).square()  # (B,)
        return weighted_mean(pull + push, weight)


class SourceLoss(nn.Module):
    """mean_i -log( exp(z_i b_s / t) / sum_j exp(z_i b_j / t) ), s the source of i: Wu et al. 2018, arXiv:1805.01978,
    eq. 2 (instance discrimination), with a bank of clean embeddings; InfoNCE where the bank is the batch.

    The cross-entropy of finding, in the bank, the clean photo that a distorted one was made from. j runs over the bank
    without the other photos of the same person, which are not wrong answers. t: temperature, no unit; the lower, the
    more the nearest wrong answers count.
    Shapes: embeddings z (B, D) and bank b (N, D), rows of norm 1; source (B,) int64 in 0..N-1; same_person (B, N) bool,
    the bank's photos that show, or may show, the person of z -> scalar.
    Raises UserError if the temperature is not positive.
    """

    def __init__(self, temperature: float):
        super().__init__()
        if not 0 < temperature < math.inf:
            raise UserError(f"TEMPERATURE = {temperature}: expected a positive number, usually 0.02..0.2")
        self.temperature = temperature

    def forward(self, embeddings: Tensor, bank: Tensor, source: Tensor, same_person: Tensor) -> Tensor:
        logits = embeddings @ bank.T / self.temperature  # (B, N)
        others = same_person.scatter(1, source[:, None], False)
        return F.cross_entropy(logits.masked_fill(others, -torch.inf), source)


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """sum w v / sum w, the plain mean for None, and 0, with a gradient of 0, where all weights are 0."""
    if weight is None:
        return values.mean()
    return (weight * values).sum() / weight.sum().clamp_min(1e-6)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise distance of (B, D) and (B, D) -> (B,), at least 1e-6: sqrt has infinite slope at 0."""
    return (a - b).square().sum(1).clamp_min(1e-12).sqrt()


@torch.no_grad()
def hardest_negatives(embeddings: Tensor, candidates: Tensor, same_person: Tensor) -> Tensor:
    """For each embedding the index of the nearest candidate of another person: "batch hard", Hermans et al. 2017,
    arXiv:1703.07737, sec. 2.

    Two random faces are about 1.41 apart, beyond a margin of 1: only mined negatives push.
    Shapes: (B, D), (N, D), rows of norm 1; same_person (B, N) bool, candidates that show, or may show, the person of
    the embedding -> (B,) int64. A tie goes to the lower index.
    Each embedding needs a candidate of another person. It is not checked here, as the GPU would have to be waited for.
    """
    cosine = embeddings @ candidates.T  # on unit rows the nearest is the one of highest cosine
    return cosine.masked_fill(same_person, -torch.inf).argmax(1)
