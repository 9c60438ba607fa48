"""The network: one module from images to unit embeddings."""

import copy
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones import BACKBONES, check_backbone, load_pretrained
from common import MAX_SIDE, UserError, in_range

BURNT = (250 - 127.5) / 128  # standardized pixel from which a channel counts as burnt out: 250 of 255
BURNT_SHARE = 0.8  # share of burnt-out pixels (in all channels) above which a face crop shows no face


@dataclass(frozen=True)
class Crops:
    """What FaceNet takes from a photo: its centre, the face, and the frame around it. UserError if out of range."""

    face: float  # side of the centre square that is the face crop, share of the frame's side, 0..1
    wide_size: int  # pixels, side that the whole frame is shrunk to, 76 or more
    wide_weight: float  # weight of the whole frame's embedding, > 0; the face's is 1
    # Side of the centre square that is hidden from the frame's network, share of the frame's side, 0..1. A face and its
    # burnt-out copy then look the same to it. 0 in checkpoints of earlier versions.
    hidden: float = 0.0

    def __post_init__(self):
        if not (in_range(self.face, float, 1e-3, 1) and self.face < 1):
            raise UserError(
                f"WIDE_WEIGHT: a wide crop needs photos with more than the face in them, but stage 1's FACE_CROP is "
                f"{self.face}; set WIDE_WEIGHT = 0, or train stage 1 with FACE_CROP < 1"
            )
        if not in_range(self.wide_size, int, 76, MAX_SIDE):
            raise UserError(
                f"WIDE_SIZE = {self.wide_size}: expected a whole number of pixels, 76..{MAX_SIDE}; the network needs 76"
            )
        if not (in_range(self.wide_weight, float, 0, math.inf) and 0 < self.wide_weight < math.inf):
            raise UserError(f"WIDE_WEIGHT = {self.wide_weight}: expected a positive number, usually 0.01..0.1")
        if not in_range(self.hidden, float, 0, 0.9):
            raise UserError(
                f"WIDE_WEIGHT: of the side of a frame, {self.hidden} are hidden, expected at most 0.9, or nothing is "
                "left around the face; set WIDE_WEIGHT = 0, or train stage 1 with FACE_CROP <= 0.9"
            )


class FaceNet(nn.Module):
    """Images (B, 3, H, W) float -> embeddings (B, D) float32 of norm 1: Schroff et al. 2015, arXiv:1503.03832.

    Images are standardized as (x - 127.5) / 128.
    backbone: of BACKBONES. pretrained: released weights by their name ("vggface2"; downloaded once), the path of a
    state dict, or None for random weights. dropout: before the last linear layer, in training only. freeze_until: the
    last of the backbone's blocks that stay as loaded; None: everything trains.
    Frozen weights take no gradient, so no backward pass runs through them, and frozen BatchNorm keeps its statistics
    in train mode too.

    Without `crops`, images are face crops and D is the backbone's, `dim`. With them images are whole frames, of which
    the first network sees the centre and a second one what is around it, and D = 2 dim:
        z = [g f, w v] / norm
    f: embedding of the face, the frame's centre; v: of the frame around it; w: wide_weight; g: the gate, 0 where
    the face is burnt out, else 1. In the cosine of two such embeddings clothes and background have a share of
    w^2 / (1 + w^2), a ten-thousandth at 0.01, and where a photo shows no face they are all that counts. f recognises
    persons, v photos.
    mirror: in eval mode, f and v are each the mean over an image and its mirror image, normalized again.

    Raises UserError for a dropout or a block out of range, and what load_pretrained raises, under the name that the
    script has for `pretrained`: `constant`.
    """

    rates = True  # has rated()

    def __init__(
        self,
        pretrained: str | Path | None,
        dropout: float,
        freeze_until: str | None = None,
        crops: Crops | None = None,
        mirror: bool = False,
        constant: str = "PRETRAINED",
        backbone: str = "facenet",
    ):
        super().__init__()
        self.mirror = mirror
        check_backbone(backbone)
        self.dim, blocks = BACKBONES[backbone].dim, BACKBONES[backbone].blocks
        if freeze_until is not None and freeze_until not in blocks:
            raise UserError(f"FREEZE_UNTIL = {freeze_until!r}: expected None or one of {', '.join(map(repr, blocks))}")
        if not 0 <= dropout < 1:
            raise UserError(f"DROPOUT = {dropout}: expected a probability in [0, 1)")
        self.backbone = BACKBONES[backbone].build(dropout)
        if pretrained is not None:  # what released weights lack stays as it was drawn
            self.backbone.load_state_dict(load_pretrained(pretrained, constant, backbone), strict=False)
        self.crops, self.wide = None, None
        if crops is not None:
            self.widen(crops)
        frozen = blocks[: blocks.index(freeze_until) + 1] if freeze_until else ()
        self._frozen = [self.backbone.get_submodule(name).requires_grad_(False) for name in frozen]
        self.train()

    def widen(self, crops: Crops) -> None:
        """Take whole frames from now on. The network for them starts as a copy of the face's, nothing frozen."""
        self.crops, self.wide = crops, copy.deepcopy(self.backbone).requires_grad_(True).train(self.training)

    def train(self, mode: bool = True) -> "FaceNet":
        super().train(mode)
        for block in self._frozen:  # statistics that moved would change what the trainable rest was fitted to
            block.eval()
        return self

    def forward(self, images: Tensor, part: str = "both") -> Tensor:
        """The embedding; with crops, `part` "face" or "wide" gives that part alone, (B, dim) of norm 1."""
        if part == "face" or self.crops is None:  # without crops the face is all there is
            return self._embed(self.backbone, self.face(images))[0]
        return self._embed(self.wide, self.whole(images))[0] if part == "wide" else self.rated(images)[0]

    def rated(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding, and the quality (B,): the norm of the face's features before they are normalized.

        The quality is low where the network finds no face that it could know (as in MagFace, Meng et al. 2021,
        arXiv:2103.06627).
        """
        face, quality = self._embed(self.backbone, self.face(images))
        if self.crops is None:
            return face, quality
        wide = self._embed(self.wide, self.whole(images))[0]
        both = torch.cat([self.gate(images)[:, None] * face, self.crops.wide_weight * wide], 1)
        return F.normalize(both), quality

    def _embed(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, dim) of norm 1, and the norm before normalization, (B,)."""
        features = network(images).float()  # half precision under autocast would give a norm of 1 to three digits only
        embedding, norm = F.normalize(features), features.norm(dim=1)
        if self.mirror and not self.training:
            mirrored = network(images.flip(3)).float()
            embedding = F.normalize(embedding + F.normalize(mirrored))
            norm = (norm + mirrored.norm(dim=1)) / 2
        return embedding, norm

    def face(self, frames: Tensor) -> Tensor:
        """The face crop: the centre of whole frames, not resampled; without crops, the images as they are."""
        if self.crops is None:
            return frames
        before, side, _ = self._centre(self.crops.face, frames)
        return frames[..., before : before + side, before : before + side]

    def _centre(self, share: float, frames: Tensor) -> tuple[int, int, int]:
        """Pixels of a line before, in and after the centre square that is this share of the side of `frames`."""
        size = int(frames.shape[-1])  # int: ONNX tracing would make a tensor of it, which has no round()
        side = round(share * size)
        before = (size - side) // 2
        return before, side, size - side - before

    def whole(self, frames: Tensor) -> Tensor:
        """The wide crop: the frames with their hidden centre made grey, shrunk to wide_size."""
        size = self.crops.wide_size
        before, side, after = self._centre(self.crops.hidden, frames)
        frames = frames * F.pad(frames.new_zeros(side, side), (before, after) * 2, value=1.0)
        if frames.shape[-1] >= 2 * size:  # bilinear sampling alone would skip pixels, and ONNX has no antialiasing
            frames = F.avg_pool2d(frames, 2)
        return F.interpolate(frames, size=(size, size), mode="bilinear", align_corners=False)

    def gate(self, frames: Tensor) -> Tensor:
        """(B,) float32: 1 where the face crop shows a face, 0 where over BURNT_SHARE of its pixels are burnt out."""
        return (burnt_share(self.face(frames)) <= BURNT_SHARE).float()


def burnt_share(images: Tensor) -> Tensor:
    """(..., 3, H, W), standardized -> (...) float32: the share of pixels that are burnt out in all three channels."""
    return (images.amin(-3) >= BURNT).float().mean((-2, -1))


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that two models share only if all their weights are equal, on any device."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        numbers = value.detach().cpu().contiguous().flatten()
        digest.update(numbers.view(torch.uint8).numpy().tobytes())  # as bytes: NumPy has no bfloat16
    return digest.hexdigest()[:16]
