"""Export the trained network for other programs: ONNX, a state dict for facenet-pytorch, and a model card.

    python -m tools.export

Needs the packages onnx, onnxruntime and safetensors. Writes into OUT_DIR, once ONNX agrees with torch: <backbone>.onnx
(the whole network), README.md (the model card) and, of a facenet, face.safetensors (the network of the face alone).
What an earlier export of another network left there is removed, as the folder is to be uploaded whole.
"""

import json
from pathlib import Path, PureWindowsPath

import torch
import torch.nn.functional as F
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor, nn

import checkpoints
import common
from backbones import BACKBONES
from common import UserError
from fast import INPUT, OUTPUT, QUALITY, OnnxFaceNet, to_onnx
from framing import FRAME, LARGEST_CROP
from models import FaceNet, fingerprint

# --- what to export ---
CHECKPOINT = Path("runs/stage2/best.pt")  # states its image size and crop; None: the PRETRAINED network
FIGURES = Path("results/val_stage2/figures.json")  # of evaluate.py, for the model card; None: a card without figures
OUT_DIR = Path("runs/export")  # 190 MB, with a wide crop 280
BATCHES = (1, 2, 5)  # sizes of the random batches that are compared, each >= 1
TOLERANCE = 1e-4  # greatest 1 - cosine between the two embeddings of an image, 1e-6..1e-3; usually 1e-12

# --- only where CHECKPOINT = None ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1

CARD_FIGURES = ("rank-1", "mAP", "EER", "TAR@FAR=0.001", "DIR@FPIR=0.01")  # columns of the card's table
FACE_FILE = "face.safetensors"
NEEDED = ("onnx", "onnxruntime", "safetensors")


def main() -> tuple[float, float]:
    """Export, check, write, print how to use it; returns what `differences` returns."""
    common.resolve_constants(globals())
    for package in NEEDED:
        common.optional_package(package, NEEDED)
    checkpoints.check_writable("OUT_DIR", OUT_DIR, folder=True)
    model, facts = checkpoints.load_model(
        checkpoint=CHECKPOINT,
        pretrained=PRETRAINED,
        image_size=IMAGE_SIZE,
        face_crop=FACE_CROP,
        device="cpu",
    )
    made_by = fingerprint(model)
    figures = None if FIGURES is None else read_figures(FIGURES, made_by)
    size, stated = facts["image_size"], ("stage", "epoch", "pretrained", "image_size", "face_crop", "framing")
    metadata = {name: facts[name] for name in stated if name in facts}
    metadata |= {"pretrained": origin(facts["pretrained"]), "backbone": backbone_of(facts), "fingerprint": made_by}
    metadata["standardization"] = "(x - 127.5) / 128"
    written = to_onnx(model, size, metadata)
    cosine, absolute = differences(model, OnnxFaceNet(written), size)
    if not cosine <= TOLERANCE:  # NaN too
        raise UserError(
            f"{OUT_DIR}: not written, the ONNX embeddings differ from torch's by {cosine:.1e} (1 - cosine), TOLERANCE "
            f"= {TOLERANCE:.0e}; try other versions of torch, onnx and onnxruntime"
        )
    files = {onnx_file(backbone_of(facts)): written, "README.md": model_card(model, facts, figures).encode()}
    if backbone_of(facts) == "facenet":  # the only one that facenet-pytorch has
        files[FACE_FILE] = face_weights(model, metadata)
    for name, content in files.items():
        with checkpoints.atomic_file(OUT_DIR / name) as file:
            file.write(content)
        print(f"{OUT_DIR / name}: {len(content) / 1e6:.1f} MB")
    for name in {FACE_FILE, *map(onnx_file, BACKBONES)} - files.keys():  # of an earlier export
        (OUT_DIR / name).unlink(missing_ok=True)
    print(f"on {sum(BATCHES)} images in batches of {', '.join(map(str, BATCHES))} the greatest difference of ONNX from")
    print(f"torch is {cosine:.1e} (1 - cosine), {absolute:.1e} in one number; README.md says how to use the files")
    return cosine, absolute


def backbone_of(facts: dict) -> str:
    return facts.get("backbone", "facenet")  # CHECKPOINT = None is a facenet


def onnx_file(backbone: str) -> str:
    return f"{backbone}.onnx"


def origin(weights: str) -> str:
    """The released name of weights or the name of their file, without its folder; "random"."""
    return "random" if weights == "None" else PureWindowsPath(weights).name  # knows / and \


def read_figures(path: Path, made_by: str) -> dict:
    """What evaluate.py wrote there. Raises UserError where it cannot be read or is of other weights than `made_by`."""
    way_out = "set FIGURES to the figures.json of this network, or to None for a card without figures"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        measured = figures["model"]["made_by"]["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: no figures of evaluate.py ({common.first_line(error)}); {way_out}") from error
    if measured != made_by:
        raise UserError(f"{path}: figures of other weights, {measured}, and CHECKPOINT has {made_by}; {way_out}")
    return figures


@torch.inference_mode()
def differences(model: nn.Module, exported: nn.Module, image_size: int) -> tuple[float, float]:
    """The greatest 1 - cosine between both embeddings of an image, and the greatest difference in one number, over
    random images in BATCHES."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    cosine, absolute = [], []
    for batch in BATCHES:
        images = 2 * torch.rand(batch, 3, image_size, image_size, generator=generator) - 1
        ours, theirs = model(images).double(), exported(images).double()
        cosine.append(1 - F.cosine_similarity(ours, theirs).min())
        absolute.append((ours - theirs).abs().max())
    return torch.stack(cosine).max().item(), torch.stack(absolute).max().item()


def face_weights(model: FaceNet, metadata: dict) -> bytes:
    """The network of the face as the bytes of a .safetensors file, under the names of facenet-pytorch's
    InceptionResnetV1(pretrained=None). `metadata` is kept as strings."""
    common.optional_package("safetensors", NEEDED)
    from safetensors.torch import save

    state: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in model.backbone.state_dict().items()
    }
    return save(state, {name: str(value) for name, value in metadata.items()})


def model_card(model: FaceNet, facts: dict, figures: dict | None) -> str:
    """The Markdown text of model_card.md.jinja. figures: of evaluate.py, None where nothing was measured."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    size, crops, backbone = facts["image_size"], model.crops, backbone_of(facts)
    side = size if crops is None else round(crops.face * size)
    teacher = facts.get("teacher", "None")
    return environment.get_template("model_card.md.jinja").render(
        facts=facts,
        backbone=backbone,
        network=type(model.backbone).__name__,
        origin=origin,
        teacher="the same network after the first stage" if teacher == "None" else origin(teacher),
        onnx_file=onnx_file(backbone),
        face_file=FACE_FILE if backbone == "facenet" else None,
        frame=FRAME,
        inset=LARGEST_CROP,
        size=size,
        crops=crops,
        side=side,
        start=(size - side) // 2,
        mirror=model.mirror,
        dims=model.dim if crops is None else 2 * model.dim,
        names={"input": INPUT, "output": OUTPUT, "quality": QUALITY},
        figures=figures,
        columns=CARD_FIGURES,
        cell=card_cell,
    )


def card_cell(figure: dict) -> str:
    """'98.1 [97.0, 99.0]', in %; '-' where it was not measured, no brackets where it has no interval."""
    if figure["value"] is None:
        return "-"
    low, high = figure["low"], figure["high"]
    # No-break space: in a narrow table the interval comes below its figure, in one piece.
    return f"{100 * figure['value']:.1f}" + ("" if low is None else f" [{100 * low:.1f},\u00a0{100 * high:.1f}]")


if __name__ == "__main__":
    common.run_script(main)
