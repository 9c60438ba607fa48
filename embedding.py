"""Photos -> embeddings and qualities, in batches and in any number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler
from tqdm import tqdm

from common import UserError, rank_and_world
from datasets import PhotoList
from distributed import gather_objects
from loading import PhotoLoader
from transforms import Transform


def rated_rows(quality: Tensor | None, rows: Tensor | list[int] | slice) -> Tensor | None:
    """The ratings of some photos; None where none is rated."""
    return None if quality is None else quality[rows]


@dataclass(frozen=True)
class Embedded:
    """Photos as a model sees them, on the CPU.

    embeddings: (N, D) float32, rows of norm 1. quality: (N,) float32, see models.FaceNet; None of a model without one.
    wide: whether an embedding is of a face beside its whole frame, in halves (models.Crops).
    """

    embeddings: Tensor
    quality: Tensor | None
    wide: bool = False

    def rows(self, chosen: slice) -> "Embedded":
        return Embedded(self.embeddings[chosen], rated_rows(self.quality, chosen), self.wide)


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
    Raises UserError with the path if a photo cannot be read or its embedding is not finite.
    """
    device = torch.device(device)
    rank, world = rank_and_world()
    photos = PhotoList(paths[rank::world], transform)
    in_order = BatchSampler(SequentialSampler(photos), batch_size, drop_last=False)
    loader = PhotoLoader(photos, in_order, num_workers, device)
    memory_format = getattr(model, "memory_format", torch.channels_last)  # fast.OnnxFaceNet has another
    modes = [(module, module.training) for module in model.modules()]  # a frozen BatchNorm has its own
    model.eval()
    rates = getattr(model, "rates", False)
    batches, qualities = [], []
    try:
        quiet = rank > 0 or len(loader) < 3
        for images in tqdm(loader, desc=description, unit="batch", leave=False, disable=quiet):
            images = images.to(device, non_blocking=True, memory_format=memory_format)
            found, quality = model.rated(images) if rates else (model(images), None)
            batches.append(F.normalize(found.float()).cpu())
            if rates:
                qualities.append(quality.float().cpu())
    finally:
        for module, training in modes:
            module.training = training
    embeddings = torch.cat(batches) if batches else torch.empty(0, 0)
    quality = torch.cat(qualities) if qualities else torch.empty(0)
    if world > 1:
        parts = gather_objects((embeddings, quality))
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
    wide = getattr(model, "crops", None) is not None
    return Embedded(embeddings, quality if rates else None, wide)
