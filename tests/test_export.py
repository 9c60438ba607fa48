"""The exported files give what torch gives, and the model card says what evaluate.py measured."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, tell_apart
from facenet_pytorch import InceptionResnetV1

import checkpoints
import fast
from common import UserError
from models import Crops, FaceNet, fingerprint
from tools import export

SIZE = 80  # pixels; not the least that is allowed, 76, so that a wrong input size shows


@pytest.fixture
def script(monkeypatch, tmp_path):
    """export.py on TinyNet, from random weights."""
    for package in export.NEEDED:
        pytest.importorskip(package)
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    constants = {"CHECKPOINT": None, "FIGURES": None, "PRETRAINED": None, "IMAGE_SIZE": SIZE, "FACE_CROP": 0.8}
    for name, value in (constants | {"OUT_DIR": tmp_path / "out"}).items():
        monkeypatch.setattr(export, name, value)
    return export


def metadata_of(exported: bytes) -> dict[str, str]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map


def made_up_figures(made_by: str) -> dict:
    """What evaluate.py writes, as far as the card reads it: rank-1 with an interval, mAP without, the rest missing."""
    missing = {"value": None, "low": None, "high": None}
    of_all = dict.fromkeys(export.CARD_FIGURES, missing)
    of_all |= {
        "rank-1": {"value": 0.947, "low": 0.916, "high": 0.972},
        "mAP": {"value": 0.5, "low": None, "high": None},
    }
    cross = {"queries": 700, "persons": 100, "figures": {"mean": {"all": of_all}}}
    model = {"made_by": {"fingerprint": made_by}, "selected_on": "holdout"}
    return {"split": "val", "template": "mean", "model": model, "protocols": {"cross": cross}}


def write_checkpoint(path, model) -> None:
    facts = {"stage": 1, "epoch": 3, "image_size": 76, "face_crop": 0.7, "dropout": 0.0, "framing": "detected"}
    facts |= {"selected_on": "holdout", "persons": ["ann", "bob"], "holdout": ["cy"], "pretrained": "casia-webface"}
    checkpoints.save_checkpoint(path, facts, {"model": model})


@pytest.mark.parametrize("crops", [None, Crops(face=0.6, wide_size=76, wide_weight=0.3)])
def test_facenet_pytorch_loads_the_exported_face_and_gives_its_embeddings(crops):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = tell_apart(FaceNet(None, dropout=0.0, crops=crops), 160).eval()
    frames = 2 * torch.rand(3, 3, 160, 160, generator=torch.Generator().manual_seed(1)) - 1
    network = InceptionResnetV1(pretrained=None).eval()
    network.load_state_dict(safetensors.load(export.face_weights(model, {"stage": 2})))
    with torch.inference_mode():
        expected, found = model(frames, part="face"), network(model.face(frames))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # it does tell them apart


def test_the_script_writes_files_that_it_has_compared_with_torch(script, capsys):
    cosine, absolute = script.main()
    assert cosine < 1e-6 and absolute < 1e-5
    assert sorted(path.name for path in script.OUT_DIR.iterdir()) == ["README.md", "face.safetensors", "facenet.onnx"]
    assert "on 8 images in batches of 1, 2, 5" in capsys.readouterr().out
    card = (script.OUT_DIR / "README.md").read_text()
    assert "(x - 127.5) / 128" in card and "Not fine-tuned" in card and "Not measured" in card
    assert "Take the centre square of 0.8 of the shorter side of the photo, resize it to\n80 x 80" in card
    assert metadata_of((script.OUT_DIR / "facenet.onnx").read_bytes())["stage"] == "0"


def test_the_card_of_a_checkpoint_states_its_data_and_the_figures_with_their_intervals(script, tmp_path):
    model = TinyNet()
    script.CHECKPOINT, script.FIGURES = tmp_path / "best.pt", tmp_path / "figures.json"
    write_checkpoint(script.CHECKPOINT, model)
    script.FIGURES.write_text(json.dumps(made_up_figures(fingerprint(model))))
    script.main()
    card = (script.OUT_DIR / "README.md").read_text().splitlines()
    assert "| protocol | queries | persons | rank-1 | mAP | EER | TAR@FAR=0.001 | DIR@FPIR=0.01 |" in card
    assert "|---|---|---|---|---|---|---|---|" in card
    assert "| `cross` | 700 | 100 | 94.7 [91.6, 97.2] | 50.0 | - | - | - |" in card
    text = " ".join(card)
    for stated in (
        "Starting weights: `casia-webface`",
        "photos of 2 persons, clean and degraded; 1 further persons were held out.",
        "Epoch 3, chosen on holdout.",
        "template `mean`. Measured on the split `val`.",
        f"a square {export.FRAME:.2f} times as wide as MTCNN's box",
        *("## Intended use", "## Limits", "## Licence", "license: other"),
    ):
        assert stated in text
    metadata = metadata_of((script.OUT_DIR / "facenet.onnx").read_bytes())
    stated = {name: metadata[name] for name in ("image_size", "face_crop", "stage", "framing", "fingerprint")}
    expected = {"image_size": "76", "face_crop": "0.7", "stage": "1", "framing": "detected"}
    assert stated == expected | {"fingerprint": fingerprint(model)}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"no figures of evaluate\.py \(.*No such file"),
        ("{}", r"no figures of evaluate\.py"),
        (json.dumps(made_up_figures("0123456789abcdef")), "figures of other weights, 0123456789abcdef, and CHECKPOINT"),
    ],
)
def test_figures_that_are_none_or_of_another_network_are_refused(script, tmp_path, content, message):
    script.FIGURES = tmp_path / "figures.json"
    if content is not None:
        script.FIGURES.write_text(content)
    with pytest.raises(UserError, match=rf"^.*figures\.json: {message}.*; set FIGURES to"):
        script.main()
    assert not list(script.OUT_DIR.iterdir())


@pytest.mark.parametrize("offset, difference", [(0.01, r"\d\.\de-0\d"), (float("nan"), "nan")])
def test_the_script_leaves_earlier_files_when_the_embeddings_differ(script, monkeypatch, offset, difference):
    class Other(fast.OnnxFaceNet):
        def forward(self, images):
            return F.normalize(super().forward(images) + offset)

    monkeypatch.setattr(script, "OnnxFaceNet", Other)
    script.OUT_DIR.mkdir()
    (script.OUT_DIR / "facenet.onnx").write_bytes(b"an earlier file")
    with pytest.raises(UserError, match=rf"out: not written, .* differ from torch's by {difference} "):
        script.main()
    (only,) = script.OUT_DIR.iterdir()
    assert only.read_bytes() == b"an earlier file"


def test_the_script_tests_its_folder_and_its_packages_before_the_work(script, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "load_model", None)
    (tmp_path / "file").touch()
    script.OUT_DIR = tmp_path / "file" / "out"
    with pytest.raises(UserError, match=r"^OUT_DIR = .*out: .*out cannot be written to \(.*\); choose a folder"):
        script.main()
    for package in script.NEEDED:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            wanted = rf"package {package} is not installed .*: pip install onnx onnxruntime safetensors$"
            with pytest.raises(UserError, match=wanted):
                script.main()
