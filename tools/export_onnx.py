"""The trained network as one ONNX file, for onnxruntime, C++, C#, JavaScript, phones: checked against torch.

    python -m tools.export_onnx

Needs the packages onnx and onnxruntime. Writes OUT, once its embeddings are those of torch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import common
from common import UserError
from fast import INPUT, OUTPUT, QUALITY, OnnxFaceNet, to_onnx
from models import fingerprint

# --- what to export ---
CHECKPOINT = Path("runs/stage2/best.pt")  # knows its image size and crop; None: the PRETRAINED network as it is
OUT = Path("runs/facenet.onnx")  # 90 MB
BATCHES = (1, 2, 5)  # sizes of the random batches that both must agree on, each >= 1
TOLERANCE = 1e-4  # greatest 1 - cosine of the two embeddings of an image, 1e-6..1e-3; usual: 1e-12

# --- only where CHECKPOINT = None ---
PRETRAINED = "vggface2"  # "vggface2", "casia-webface", path of a state dict, or None: random weights
IMAGE_SIZE = 160  # pixels, 76..160
FACE_CROP = 0.52  # centre share of the shorter side that is kept, 0.3..1


def main() -> tuple[float, float]:
    """Export, check, write, tell how to use it; returns the greatest difference by cosine and of a number."""
    model, facts = checkpoints.load_model(CHECKPOINT, PRETRAINED, IMAGE_SIZE, FACE_CROP, torch.device("cpu"))
    told = {name: facts[name] for name in ("stage", "epoch", "pretrained", "image_size", "face_crop") if name in facts}
    size = facts["image_size"]
    content = to_onnx(model, size, told | {"fingerprint": fingerprint(model), "standardization": "(x - 127.5) / 128"})
    exported = OnnxFaceNet(content, size)
    cosine, absolute = differences(model, exported, size)
    if not cosine <= TOLERANCE:  # NaN too
        raise UserError(
            f"{OUT}: not written, its embeddings differ from torch's by {cosine:.1e} (1 - cosine), TOLERANCE = "
            f"{TOLERANCE:.0e}; try other versions of torch, onnx and onnxruntime"
        )
    with checkpoints.atomic_file(OUT) as file:
        file.write(content)
    print(f"{OUT}: {len(content) / 1e6:.0f} MB; of {sum(BATCHES)} images in batches of {', '.join(map(str, BATCHES))}")
    print(f"the greatest difference from torch is {cosine:.1e} (1 - cosine), {absolute:.1e} of a number")
    print(f"""
crop     the centre square of {facts["face_crop"]:g} of the photo's shorter side, resized to {size} x {size}, bilinear
input    "{INPUT}": float32 (batch, 3, {size}, {size}), channels R, G, B, each value (x - 127.5) / 128 of x in 0..255
output   "{OUTPUT}": float32 (batch, {exported.dims}) of norm 1; the similarity of two is the sum of their products
output   "{QUALITY}": float32 (batch,), small where the face shows little that the network knows""")
    return cosine, absolute


@torch.inference_mode()
def differences(model: nn.Module, exported: nn.Module, image_size: int) -> tuple[float, float]:
    """The greatest 1 - cosine of two embeddings of an image, and the greatest difference of two of their numbers.

    Of random images, BATCHES at a time.
    """
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
