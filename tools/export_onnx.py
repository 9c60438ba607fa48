"""Export the trained network as one ONNX file, for onnxruntime, C++, C#, JavaScript or phones, checked against torch.

    python -m tools.export_onnx

Needs the packages onnx and onnxruntime. Writes OUT only if its embeddings equal those of torch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import common
from backbones import EMBEDDING_DIM
from common import UserError
from fast import INPUT, OUTPUT, QUALITY, OnnxFaceNet, to_onnx
from framing import FRAME
from models import fingerprint

# --- what to export ---
CHECKPOINT = Path("runs/stage2/best.pt")  # states its image size and crop; None: the PRETRAINED network
OUT = Path("runs/facenet.onnx")  # 90 MB
BATCHES = (1, 2, 5)  # sizes of the random batches that are compared, each >= 1
TOLERANCE = 1e-4  # greatest 1 - cosine between the two embeddings of an image, 1e-6..1e-3; usually 1e-12

# --- only where CHECKPOINT = None ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1


def main() -> tuple[float, float]:
    """Export, check, write, print how to use it; returns what `differences` returns."""
    common.resolve_constants(globals())
    checkpoints.check_writable("OUT", OUT, folder=False)
    model, facts = checkpoints.load_model(
        checkpoint=CHECKPOINT,
        pretrained=PRETRAINED,
        image_size=IMAGE_SIZE,
        face_crop=FACE_CROP,
        device="cpu",
    )
    size, stated = facts["image_size"], ("stage", "epoch", "pretrained", "image_size", "face_crop", "framing")
    metadata = {name: facts[name] for name in stated if name in facts}
    metadata |= {"fingerprint": fingerprint(model), "standardization": "(x - 127.5) / 128"}
    written = to_onnx(model, size, metadata)
    exported = OnnxFaceNet(written)
    cosine, absolute = differences(model, exported, size)
    if not cosine <= TOLERANCE:  # NaN too
        raise UserError(
            f"{OUT}: not written, its embeddings differ from torch's by {cosine:.1e} (1 - cosine), TOLERANCE = "
            f"{TOLERANCE:.0e}; try other versions of torch, onnx and onnxruntime"
        )
    with checkpoints.atomic_file(OUT) as file:
        file.write(written)
    print(f"{OUT}: {len(written) / 1e6:.0f} MB; on {sum(BATCHES)} images in batches of {', '.join(map(str, BATCHES))}")
    print(f"the greatest difference from torch is {cosine:.1e} (1 - cosine), {absolute:.1e} in one number")
    of = "the photo"
    if facts["framing"] == "detected":
        of = f"the square around the face, {FRAME:.2f} times as wide as MTCNN's box"
    dims = EMBEDDING_DIM if model.crops is None else 2 * EMBEDDING_DIM
    print(f"""
crop     the centre square of {facts["face_crop"]:g} of the shorter side of {of}, resized to {size} x {size}, bilinear
input    "{INPUT}": float32 (batch, 3, {size}, {size}), channels R, G, B, each value (x - 127.5) / 128 of x in 0..255
output   "{OUTPUT}": float32 (batch, {dims}) of norm 1; the similarity of two is the sum of their products
output   "{QUALITY}": float32 (batch,), low where the network finds no face that it could know""")
    return cosine, absolute


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


if __name__ == "__main__":
    common.run_script(main)
