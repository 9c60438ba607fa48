"""The networks inside of models.FaceNet, and the pretrained weights that they start from.

Another one is a function here and a line in BACKBONES.
"""

import http.client
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from facenet_pytorch import InceptionResnetV1
from facenet_pytorch.models.inception_resnet_v1 import get_torch_home
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from common import UserError, first_line, read_plain

RESNET_DIM = 512  # as many as facenet's, so that a resnet50 can have a facenet as its teacher
CONNECT_TIMEOUT = 30  # seconds without a response after which a download is given up


@dataclass(frozen=True)
class Backbone:
    """A network from face crops (B, 3, H, W), standardized as (x - 127.5) / 128, to features (B, dim), which are not
    normalized.

    build: dropout (0..1) before the last linear layer, in training only -> the network, with random weights.
    dim: numbers in the embedding of a face.
    blocks: that FREEZE_UNTIL may name, in the order of the data; what follows them always trains.
    weights: of released ones, name -> URL.
    classifier: how the names of parameters begin that released files have and the network has not, or has otherwise.
    fresh: how those begin that released files lack; they start at random.
    """

    build: Callable[[float], nn.Module]
    dim: int
    blocks: tuple[str, ...]
    weights: dict[str, str]
    classifier: str
    fresh: str = ""


def facenet(dropout: float) -> nn.Module:
    """InceptionResnetV1: Szegedy et al. 2016, arXiv:1602.07261, as in facenet-pytorch."""
    network = InceptionResnetV1(pretrained=None, dropout_prob=dropout)
    network.classify, network.logits = True, nn.Identity()  # else it returns normalized features
    return network


class ResNet50(ResNet):
    """ResNet-50, He et al. 2016, arXiv:1512.03385, of torchvision, which wants ImageNet's standardization; its last
    linear layer gives the features, with a BatchNorm as facenet's."""

    def __init__(self, dropout: float):
        super().__init__(Bottleneck, [3, 4, 6, 3])
        norm = nn.BatchNorm1d(RESNET_DIM, eps=0.001)
        self.fc = nn.Sequential(nn.Dropout(dropout), nn.Linear(2048, RESNET_DIM, bias=False), norm)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(((images * 128 + 127.5) / 255 - self.mean) / self.deviation)


_RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
BACKBONES = {
    "facenet": Backbone(
        build=facenet,
        dim=512,
        blocks=(
            "conv2d_1a",
            "conv2d_2a",
            "conv2d_2b",
            "conv2d_3b",
            "conv2d_4a",
            "conv2d_4b",
            "repeat_1",
            "mixed_6a",
            "repeat_2",
            "mixed_7a",
            "repeat_3",
            "block8",
        ),
        weights={
            "vggface2": _RELEASE + "20180402-114759-vggface2.pt",  # 107 MB
            "casia-webface": _RELEASE + "20180408-102900-casia-webface.pt",  # 111 MB
        },
        classifier="logits.",
    ),
    "resnet50": Backbone(
        build=ResNet50,
        dim=RESNET_DIM,
        blocks=("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"),
        weights={"imagenet": ResNet50_Weights.IMAGENET1K_V2.url},  # 98 MB: objects, no faces
        classifier="fc.",
        fresh="fc.",
    ),
}


def check_backbone(name: object) -> None:
    """Raises UserError for a name that is not in BACKBONES."""
    if not isinstance(name, str) or name not in BACKBONES:
        raise UserError(f"BACKBONE = {name!r}: expected one of {', '.join(map(repr, BACKBONES))}")


# --- pretrained weights -----------------------------------------------------------------------------------------------


def load_pretrained(source: str | Path, constant: str = "PRETRAINED", backbone: str = "facenet") -> dict[str, Tensor]:
    """State dict of a backbone, checked for names and shapes, without the classifier of released files.

    source: see models.FaceNet; a state dict may lie under "state_dict" or "model", and its names have a prefix
    ("module."). What follows the backbone's blocks may be missing where released weights lack it (Backbone.fresh).
    Raises UserError if it cannot be downloaded, is no file, or is not such a state dict; the message calls the source
    by the script's `constant`.
    """
    chosen = BACKBONES[backbone]
    path = _downloaded(chosen, str(source), constant) if str(source) in chosen.weights else Path(source).expanduser()
    if not path.is_file():
        raise UserError(
            f"{constant} = {str(source)!r}: no such file; give the path of a state dict, "
            f"{' or '.join(map(repr, chosen.weights))}, or None"
        )
    way_out = "delete it and download it again, or save the state_dict() of its network alone"
    saved = read_plain(path, "not a state dict that torch can read", way_out)
    with torch.device("meta"):  # names, shapes and types only: no memory, no random numbers drawn
        network = chosen.build(0.0)
    wanted = network.state_dict()
    state = _without_prefix(path, _unwrapped(path, saved), list(wanted))
    # Released weights are of a classifier, which is none of ours.
    state = {name: value for name, value in state.items() if name in wanted or not name.startswith(chosen.classifier)}
    fresh = [name for name in wanted if chosen.fresh and name.startswith(chosen.fresh) and name not in state]
    wanted = {name: value for name, value in wanted.items() if name not in fresh}
    if faults := _faults(state, wanted):
        raise UserError(f"{path}: not a state dict of {type(network).__name__}: {faults}")
    return state


def _unwrapped(path: Path, saved: object) -> dict[str, Tensor]:
    """The state dict that a file holds, bare or beside other things. Raises UserError if there is none."""
    expected = f"{path}: expected a state dict (parameter name -> tensor)"
    if isinstance(saved, dict) and {"stage", "model"} <= saved.keys():
        raise UserError(
            f"{expected}; this is a checkpoint, which evaluate.py and identify.py take as CHECKPOINT, and "
            "train_stage2.py as STAGE1_CHECKPOINT"
        )
    if isinstance(saved, dict):
        saved = next((saved[name] for name in ("state_dict", "model") if isinstance(saved.get(name), dict)), saved)
    if not isinstance(saved, dict) or not all(isinstance(n, str) and isinstance(v, Tensor) for n, v in saved.items()):
        raise UserError(expected)
    return saved


def _without_prefix(path: Path, state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """`state` under the `names` of the network, without what wrappers such as DataParallel put before them."""
    prefixes = [name.removesuffix(names[0]) for name in state if name.endswith("." + names[0])]
    if names[0] in state or not prefixes:
        return state
    if len(prefixes) > 1:
        raise UserError(
            f"{path}: holds several networks, {', '.join(map(repr, prefixes[:3]))}; save the state_dict() of one alone"
        )
    return {name.removeprefix(prefixes[0]): value for name, value in state.items()}


def _faults(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Up to three parameters each that are missing, unknown, of another shape or type than in `wanted`; "": none."""
    common = [name for name in wanted if name in state]
    shapes = [name for name in common if state[name].shape != wanted[name].shape]
    # An int8 weight would be taken for the number that it stands for.
    types = [n for n in common if wanted[n].is_floating_point() and not state[n].is_floating_point()]
    faults = {
        "missing": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in wanted],
        "of another shape": [f"{n} {tuple(state[n].shape)}, expected {tuple(wanted[n].shape)}" for n in shapes],
        "of another type": [f"{n} {state[n].dtype}, expected {wanted[n].dtype}" for n in types],
    }
    return "; ".join(
        f"{len(names)} {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for fault, names in faults.items()
        if names
    )


def _downloaded(backbone: Backbone, name: str, constant: str) -> Path:
    """The cached file of a named pretrained network, downloaded first if it is not there (whole or not at all)."""
    url = backbone.weights[name]
    folder = Path(get_torch_home()) / "checkpoints"  # facenet-pytorch's own cache, so nothing is downloaded twice
    path = folder / os.path.basename(url)
    if path.is_file():
        return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise UserError(
            f"{constant} = {name!r}: the weights could not be downloaded ({first_line(error)}); fetch {url} "
            f"where there is internet and put the file into {folder}, or set {constant} to its path"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path
