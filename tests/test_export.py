"""The exported files give what torch gives, and the model card says what evaluate.py measured."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import tell_apart, write_photo
from facenet_pytorch import InceptionResnetV1
from tiny_net import TinyNet

import checkpoints
import fast
from common import UserError
from models import Crops, FaceNet, fingerprint
from tools import export
from transforms import eval_transform, load_image

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


def write_checkpoint(path, model, **others) -> None:
    facts = {"stage": 1, "epoch": 3, "image_size": 76, "face_crop": 0.7, "dropout": 0.0, "framing": "detected"}
    facts |= {"selected_on": "1 persons held out of train", "persons": ["ann", "bob"], "holdout": ["cy"]}
    facts |= {"pretrained": "casia-webface"}
    checkpoints.save_checkpoint(path, facts | others, {"model": model})


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
    assert "Starting weights: random." in card and "Not fine-tuned" in card and "Not measured" in card
    assert "Of a photo it sees the square in the centre, 0.8 of the shorter side:" in card
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
    assert "| `cross` | 700 | 100 | 94.7 [91.6,\u00a097.2] | 50.0 | - | - | - |" in card
    text = " ".join(card)
    for stated in (
        "Starting weights: casia-webface.",
        "Fine-tuned with an ArcFace head on photos of 2 persons, clean and degraded.",
        "Epoch 3, chosen on   1 persons held out of train.",
        "the mean of a person's embeddings (template `mean`). Measured on the split `val`.",
        "take a square around it, 2.04 times as wide as the longer side of its box. Such squares are the photos here:",
        *("## Intended use", "## Limits", "## Licence", "license: other"),
    ):
        assert stated in text
    metadata = metadata_of((script.OUT_DIR / "facenet.onnx").read_bytes())
    stated = {name: metadata[name] for name in ("image_size", "face_crop", "stage", "framing", "fingerprint")}
    expected = {"image_size": "76", "face_crop": "0.7", "stage": "1", "framing": "detected"}
    assert stated == expected | {"fingerprint": fingerprint(model)}


def test_the_card_of_a_network_of_the_frame_says_how_a_photo_is_prepared(script, tmp_path):
    script.CHECKPOINT, crops = tmp_path / "best.pt", {"face": 0.6, "wide_size": 76, "wide_weight": 0.3, "hidden": 0.75}
    model = TinyNet(crops=Crops(0.6, 76, 0.3, hidden=0.75))
    write_checkpoint(script.CHECKPOINT, model, face_crop=1.0, framing="inset", crops=crops)
    script.main()
    text = " ".join((script.OUT_DIR / "README.md").read_text().split())
    assert "as long as the square, and paste the middle of the square, 0.65 of its side, onto the middle of the" in text
    assert "Such squares" not in text and "are photos so prepared: ```python" in text


@pytest.mark.parametrize("face_crop", [0.7, 1.0])
def test_the_code_on_the_card_gives_the_embeddings_of_the_network(script, tmp_path, monkeypatch, face_crop):
    model = TinyNet(crops=Crops(0.6, 76, 0.3), mirror=True).eval()
    script.CHECKPOINT = tmp_path / "best.pt"
    crops = {"face": 0.6, "wide_size": 76, "wide_weight": 0.3}
    write_checkpoint(script.CHECKPOINT, model, face_crop=face_crop, framing="centre", crops=crops, mirror=True)
    script.main()
    monkeypatch.chdir(script.OUT_DIR)
    paths = [tmp_path / "out" / name for name in ("a.jpg", "b.jpg")]
    for number, path in enumerate(paths):
        write_photo(path, (200 - 90 * number, 60, 90 * number), seed=number, side=121)
    code = re.search(r"```python\n(import numpy.*?)```", (script.OUT_DIR / "README.md").read_text(), re.DOTALL)[1]
    exec(code, found := {})
    with torch.inference_mode():
        embeddings, quality = model.rated(torch.stack([eval_transform(76, face_crop)(load_image(p)) for p in paths]))
    torch.testing.assert_close(torch.from_numpy(found["embeddings"]), embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["quality"]), quality, rtol=1e-4, atol=0)
    assert found["cosine"] == pytest.approx((embeddings[0] @ embeddings[1]).item(), abs=1e-5)


def test_a_resnet50_is_exported_without_what_facenet_pytorch_alone_can_load(script, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints, "FaceNet", FaceNet)
    monkeypatch.setattr(script, "BATCHES", (1, 2))
    script.CHECKPOINT = tmp_path / "best.pt"
    torch.manual_seed(0)
    model = tell_apart(FaceNet(None, dropout=0.0, backbone="resnet50"), 76)
    write_checkpoint(script.CHECKPOINT, model, backbone="resnet50", pretrained="/home/ann/weights.pt")
    script.OUT_DIR.mkdir()
    for name in ("facenet.onnx", "face.safetensors", "notes.txt"):  # of an earlier export, and of the user
        (script.OUT_DIR / name).touch()
    cosine, absolute = script.main()
    assert cosine < 1e-6 and absolute < 1e-3
    assert sorted(path.name for path in script.OUT_DIR.iterdir()) == ["README.md", "notes.txt", "resnet50.onnx"]
    metadata = metadata_of((script.OUT_DIR / "resnet50.onnx").read_bytes())
    assert (metadata["backbone"], metadata["pretrained"]) == ("resnet50", "weights.pt")
    card = (script.OUT_DIR / "README.md").read_text()
    assert "# ResNet50 for faces" in card and "[face-recognition, resnet50, onnx]" in card
    assert "Starting weights: weights.pt." in card and "/home" not in card
    assert "facenet" not in card and "safetensors" not in card and "InceptionResnetV1" not in card


@pytest.mark.parametrize(
    "weights, stated",
    [("None", "random"), ("vggface2", "vggface2"), ("/a/b/c.pt", "c.pt"), (r"C:\a\b.pt", "b.pt")],
)
def test_weights_are_stated_without_the_folder_that_they_came_from(weights, stated):
    assert export.origin(weights) == stated


@pytest.mark.parametrize(
    "others, stated",
    [
        ({"teacher": "vggface2"}, "a frozen teacher (vggface2), on photos"),
        ({"teacher": "None"}, "a frozen teacher (the same network after the first stage), on photos"),
        ({"epoch": 0, "selected_on": "val"}, "- Epoch 0 (before training, as no later one was better), chosen on"),
    ],
)
def test_the_card_of_stage_2_states_its_teacher_and_that_no_epoch_was_better(others, stated):
    facts = {"stage": 2, "epoch": 3, "image_size": 76, "face_crop": 1.0, "framing": "centre", "persons": ["ann"]}
    facts |= {"selected_on": "val", "pretrained": "vggface2", "teacher": "None"}
    assert stated in export.model_card(TinyNet(), facts | others, None)


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
