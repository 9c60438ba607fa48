"""The networks to choose from: released weights, downloads, and a backbone of another size through every script."""

import email
import http.client
import io
import math
import pickle
import re
import socket
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import MakesFolderWhenLoaded, same_tensors, write_photo
from facenet_pytorch import InceptionResnetV1
from torch import nn

import checkpoints
import evaluate
import identify
import train_stage2
from backbones import BACKBONES, Backbone, load_pretrained
from common import UserError
from embedding import embed
from enrolment import load_gallery
from gallery import build_gallery
from losses import ArcMarginProduct
from models import Crops, FaceNet, fingerprint
from transforms import eval_transform

URL = BACKBONES["facenet"].weights["vggface2"]
CACHED_NAME = "20180402-114759-vggface2.pt"


@pytest.fixture
def slim_state() -> dict[str, torch.Tensor]:
    """All names and shapes of a facenet's state dict, each tensor a single stored zero: a file of 200 kB."""
    with torch.device("meta"):
        state = InceptionResnetV1(pretrained=None).state_dict()
    return {name: torch.zeros(()).expand(value.shape) for name, value in state.items()}


def save(content, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# --- pretrained weights -----------------------------------------------------------------------------------------------


def test_every_network_draws_the_same_random_numbers(slim_state, tmp_path):
    """A head that is made next then starts the same, whichever network it is put on."""
    drawn, two = [], Crops(face=0.52, wide_size=76, wide_weight=0.3)
    for pretrained, crops in ((None, None), (save(slim_state, tmp_path / "slim.pt"), None), (None, two)):
        torch.manual_seed(0)
        FaceNet(pretrained, dropout=0.0, crops=crops)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 1


def test_a_half_precision_state_dict_loads_into_float32(slim_state, tmp_path):
    slim_state["last_linear.weight"] = torch.tensor(0.1, dtype=torch.float16).expand(512, 1792)
    weight = FaceNet(save(slim_state, tmp_path / "half.pt"), dropout=0.0).backbone.last_linear.weight
    assert weight.dtype == torch.float32 and (weight == 0.0999755859375).all()  # the half nearest to 0.1


def test_missing_unknown_and_misshapen_parameters_are_counted_and_the_first_three_named(slim_state, tmp_path):
    del slim_state["last_bn.bias"]
    slim_state |= {f"fc{number}": torch.zeros(3) for number in range(4)}
    slim_state["last_linear.weight"] = torch.zeros(256, 1792)
    path = save(slim_state, tmp_path / "other.pt")
    faults = "1 missing: last_bn.bias; 4 unknown: fc0, fc1, fc2, ...; 1 of another shape: last_linear.weight (256, 1792"
    with pytest.raises(UserError, match="^" + re.escape(f"{path}: not a state dict of InceptionResnetV1: {faults}")):
        FaceNet(path, dropout=0.0)


@pytest.mark.parametrize("name", ["vggface", "VGGFace2", "", "folder/nobody.pt"])
def test_a_misspelt_name_or_path_is_refused_with_the_choices(name):
    message = f"PRETRAINED = {name!r}: no such file; .*'vggface2' or 'casia-webface', or None"
    with pytest.raises(UserError, match=message):
        FaceNet(name, dropout=0.0)


def test_stage_2_calls_a_missing_teacher_by_its_own_constant(monkeypatch):
    stage1 = {
        "stage": 1,
        "backbone": "facenet",
        "image_size": 160,
        "face_crop": 0.52,
        "framing": "centre",
        "pretrained": "None",
        "holdout": [],
    }
    monkeypatch.setattr(train_stage2.checkpoints, "load_facenet", lambda *_, **__: (None, stage1))
    monkeypatch.setattr(train_stage2, "TEACHER", "nobody.pt")
    with pytest.raises(UserError, match=r"^TEACHER = 'nobody\.pt': no such file"):
        train_stage2.load_networks("cpu", saved=None)


@pytest.mark.parametrize("under", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.backbone.", "_orig_mod."])
def test_names_with_a_prefix_and_a_state_dict_beside_other_things_load_as_the_bare_one(
    slim_state, tmp_path, prefix, under
):
    state = slim_state | {"logits.weight": torch.zeros(9, 512)}
    state = {prefix + name: value for name, value in state.items()}
    path = save({under: state, "epoch": 3, "optimizer": {"state": {}}} if under else state, tmp_path / "wrapped.pt")
    assert same_tensors(load_pretrained(path), slim_state)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: {f"{part}.{name}": value for part in ("backbone", "wide") for name, value in state.items()},
            "holds several networks, 'backbone.', 'wide.'; save the state_dict() of one alone",
        ),
        (
            lambda state: {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.zeros(2)},
            "not a state dict of InceptionResnetV1: 1 unknown: loss.weight",
        ),
        (
            lambda state: state | {"last_linear.weight": torch.zeros((), dtype=torch.int8).expand(512, 1792)},
            "not a state dict of InceptionResnetV1: 1 of another type: last_linear.weight torch.int8, expected torch.f",
        ),
    ],
)
def test_what_is_left_after_the_prefix_is_named(slim_state, tmp_path, change, message):
    path = save(change(slim_state), tmp_path / "other.pt")
    with pytest.raises(UserError, match="^" + re.escape(f"{path}: {message}")):
        load_pretrained(path)


def test_equal_weights_have_one_fingerprint_wherever_and_however_they_are_stored(slim_state, tmp_path):
    backwards = {f"module.{name}": slim_state[name] for name in reversed(slim_state)}
    older = tmp_path / "older.pt"
    torch.save(slim_state, older, _use_new_zipfile_serialization=False)
    same = [save(slim_state, tmp_path / "a" / "b.pt"), save({"state_dict": backwards}, tmp_path / "c.pt"), older]
    other = save(slim_state | {"last_bn.bias": torch.eye(512)[7]}, tmp_path / "other.pt")
    prints = [fingerprint(FaceNet(source, dropout=0.0)) for source in (*same, other)]
    assert prints[0] == prints[1] == prints[2] != prints[3]
    with pytest.raises(UserError, match=r"^TEACHER = 'nobody': no such file"):
        load_pretrained("nobody", "TEACHER")


UNREADABLE = "not a state dict that torch can read ("
NO_STATE_DICT = "expected a state dict (parameter name -> tensor)"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", UNREADABLE),
        (b"garbage" * 100, UNREADABLE),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 47252091\n", UNREADABLE),
        (torch.zeros(3), NO_STATE_DICT),
        ({"a": 1}, NO_STATE_DICT),
        ({0: torch.zeros(3)}, NO_STATE_DICT),
        ({}, "not a state dict of InceptionResnetV1: "),
        (
            {"model": {}, "stage": 1},
            NO_STATE_DICT + "; this is a checkpoint, which evaluate.py and identify.py",
        ),
        ({"state_dict": [torch.zeros(3)], "epoch": 1}, NO_STATE_DICT),
        ({"state_dict": {"a": 1}}, NO_STATE_DICT),
    ],
)
def test_a_file_of_something_else_is_refused_by_name_in_one_line(content, message, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match="^" + re.escape(f"{path}: {message}")) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped, share", [(True, 0.1), (True, 0.999), (False, 0.001), (False, 0.999)])
def test_a_truncated_file_is_refused_by_name(slim_state, tmp_path, zipped, share):
    path = tmp_path / "truncated.pt"
    torch.save(slim_state, path, _use_new_zipfile_serialization=zipped)  # the released files are of the older format
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match="^" + re.escape(f"{path}: {UNREADABLE}")):
        load_pretrained(path)


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    trace = tmp_path / "code_has_run"
    path = save(MakesFolderWhenLoaded(trace), tmp_path / "malicious.pt")
    (bare := tmp_path / "bare_pickle.pt").write_bytes(pickle.dumps(MakesFolderWhenLoaded(trace), protocol=2))
    for file in (path, bare):
        with pytest.raises(UserError, match="not a state dict that torch can read") as error:
            load_pretrained(file)
        assert "weights_only" not in str(error.value)  # torch's own advice is how to run the code after all
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was armed


# --- downloads --------------------------------------------------------------------------------------------------------


class Response(io.BytesIO):
    """What urlopen returns: 9 of 1000 promised bytes, then the failure or the end."""

    def __init__(self, failure: Exception | None):
        super().__init__(b"123456789")
        self.failure = failure

    def info(self):
        return email.message_from_string("Content-Length: 1000\n\n")

    def read(self, size=-1):
        chunk = super().read(size)
        if not chunk and self.failure:
            raise self.failure
        return chunk


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty download cache of our own; a download that a test has not prepared fails it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: pytest.fail("a download was started"))
    return tmp_path / "torch_home" / "checkpoints"


@pytest.mark.parametrize(
    "kind", [urllib.error.URLError, TimeoutError, http.client.BadStatusLine]
)  # no OSError: the last
def test_a_failed_download_leaves_no_file_and_names_the_address_and_where_the_file_belongs(cache, monkeypatch, kind):
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(kind("no route to host")))
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError, match=r"^TEACHER = 'vggface2': the weights could not be downloaded") as error:
        FaceNet("vggface2", dropout=0.0, constant="TEACHER")
    assert all(part in str(error.value) for part in ("no route to host", URL, str(cache), "set TEACHER to its path"))
    assert list(cache.iterdir()) == [] and socket.getdefaulttimeout() == before


def test_a_download_that_ends_early_without_an_error_is_reported_as_a_file_to_delete(cache, monkeypatch):
    """Neither http.client nor torch complains where a server closes before the promised length."""
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(None))
    with pytest.raises(UserError, match=re.escape(str(cache / CACHED_NAME)) + r".*; delete it and download it again"):
        FaceNet("vggface2", dropout=0.0)


def test_a_download_gives_up_on_a_server_that_does_not_respond_and_restores_the_timeout(cache, monkeypatch, slim_state):
    seen = []

    def download(url, path):
        seen.append((url, socket.getdefaulttimeout()))
        save(slim_state, Path(path))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    before = socket.getdefaulttimeout()
    for _ in range(2):  # the second time the file is in the cache
        assert load_pretrained("vggface2").keys() == slim_state.keys()
    assert seen == [(URL, 30)] and socket.getdefaulttimeout() == before


# --- another backbone -------------------------------------------------------------------------------------------------


def test_a_step_of_each_backbone_lowers_the_loss_and_the_blocks_freeze(tmp_path):
    write_photo(tmp_path / "ann.png", (90, 120, 150), seed=0)
    for name, until, frozen, trained in (
        ("facenet", "repeat_1", "conv2d_1a.conv.weight", "mixed_6a.branch0.conv.weight"),
        ("resnet50", "layer2", "conv1.weight", "layer3.0.conv1.weight"),
    ):
        torch.manual_seed(0)
        network = FaceNet(None, dropout=0.0, freeze_until=until, backbone=name)
        head = ArcMarginProduct(network.dim, 2, s=32, m=0.5)
        optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], 1e-3)
        photos, labels, losses = torch.randn(4, 3, 76, 76), torch.tensor([0, 0, 1, 1]), []
        for _ in range(2):
            losses.append(F.cross_entropy(head(network(photos), labels), labels))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[1] < losses[0]
        parameters = dict(network.backbone.named_parameters())
        assert parameters[frozen].grad is None and parameters[trained].grad.abs().max() > 0
        found = embed(network, [tmp_path / "ann.png"], eval_transform(76, 0.52), "cpu")
        assert found.embeddings.shape == (1, network.dim) and found.embeddings.norm().item() == pytest.approx(1)


def test_resnet50_sees_imagenet_s_standardization():
    network, seen = FaceNet(None, dropout=0.0, backbone="resnet50").eval(), []
    pixels = torch.rand(1, 3, 76, 76)
    network.backbone.conv1.register_forward_pre_hook(lambda module, images: seen.append(images[0]))
    network((pixels * 255 - 127.5) / 128)
    expected = torchvision.transforms.functional.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


def test_imagenet_s_weights_start_a_resnet50_but_for_its_last_layer(tmp_path):
    released = torchvision.models.resnet50(weights=None).state_dict()
    path = save(released, tmp_path / "resnet50.pth")
    network = FaceNet(path, dropout=0.0, backbone="resnet50")
    state = network.backbone.state_dict()
    assert all(torch.equal(state[name], value) for name, value in released.items() if not name.startswith("fc."))
    again = FaceNet(save(state, tmp_path / "trained.pt"), dropout=0.0, backbone="resnet50")
    assert torch.equal(again.backbone.fc[1].weight, network.backbone.fc[1].weight)  # weights of our own are whole
    del released["layer1.0.conv1.weight"]
    with pytest.raises(UserError, match=r"not a state dict of ResNet50: 1 missing: layer1\.0\.conv1\.weight"):
        FaceNet(save(released, path), dropout=0.0, backbone="resnet50")


@pytest.mark.parametrize("name", ["vgg16", None, ["facenet"]])
def test_an_unknown_backbone_is_refused(name):
    with pytest.raises(UserError, match=r"^BACKBONE = .*: expected one of 'facenet', 'resnet50'$"):
        FaceNet(None, dropout=0.0, backbone=name)


def test_weights_and_blocks_of_one_backbone_are_none_of_another(slim_state, tmp_path):
    with pytest.raises(UserError, match=r"PRETRAINED = 'vggface2': no such file; .* 'imagenet', or None"):
        FaceNet("vggface2", dropout=0.0, backbone="resnet50")
    with pytest.raises(UserError, match="FREEZE_UNTIL = 'mixed_6a': expected None or one of 'conv1'"):
        FaceNet(None, dropout=0.0, freeze_until="mixed_6a", backbone="resnet50")
    path = save(slim_state, tmp_path / "facenet.pt")
    with pytest.raises(
        UserError, match=r"no.* state dict of ResNet50: 318 missing: conv1\.weight, .* unknown: conv2d_1a"
    ):
        FaceNet(path, dropout=0.0, backbone="resnet50")


# --- a backbone of another size ---------------------------------------------------------------------------------------


@pytest.fixture
def scripts(stages, monkeypatch, tmp_path) -> SimpleNamespace:
    """Both stages, evaluate and identify, set to "small": a backbone of 32 numbers."""

    def small(dropout: float) -> nn.Module:
        trunk = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        return nn.Sequential(trunk, nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 32))

    monkeypatch.setitem(BACKBONES, "small", Backbone(small, dim=32, blocks=("0",), weights={}, classifier="logits."))
    for module in (*stages, checkpoints):
        monkeypatch.setattr(module, "FaceNet", FaceNet)
    val = stages[0].DATA_DIR / "val"
    constants = {
        stages[0]: {"BACKBONE": "small", "PRETRAINED": None},
        stages[1]: {"WIDE_WEIGHT": 0.3},
        evaluate: {"DATA_DIR": val.parent, "RESULTS_DIR": tmp_path / "results", "PICTURES": False, "NUM_WORKERS": 0},
        identify: {"ENROLL": val, "PHOTOS": sorted(val.glob("*/clean/*.png")), "CALIBRATE_ON": None, "NUM_WORKERS": 0},
    }
    for script, of_script in constants.items():
        for name, value in of_script.items():
            monkeypatch.setattr(script, name, value)
    return SimpleNamespace(stage1=stages[0], stage2=stages[1])


def test_a_backbone_of_another_size_is_trained_evaluated_enrolled_and_identified(scripts, train, monkeypatch, tmp_path):
    one = train(scripts.stage1, "one")
    assert one.best["backbone"] == "small" and one.best["head"]["weight"].shape == (4, 32)
    first = scripts.stage1.RUN_DIR / "best.pt"
    two = train(scripts.stage2, "two", {"STAGE1_CHECKPOINT": first})
    for trained in (one, two):
        assert all(math.isfinite(loss) for loss in trained.column("loss")) and trained.column("loss")
    for checkpoint, dims in ((first, 32), (scripts.stage2.RUN_DIR / "best.pt", 64)):
        monkeypatch.setattr(evaluate, "CHECKPOINT", checkpoint)
        monkeypatch.setattr(identify, "CHECKPOINT", checkpoint)
        monkeypatch.setattr(identify, "GALLERY", tmp_path / f"{dims}.pt")
        details = evaluate.main()
        assert details["embeddings"].shape == (6, dims)
        answers = identify.main()
        assert [answer.person for answer in answers] == [path.parent.parent.name for path in identify.PHOTOS]
        model, facts = checkpoints.load_facenet(checkpoint, "cpu")
        transform = eval_transform(facts["image_size"], facts["face_crop"])
        built = build_gallery(model, identify.ENROLL, transform, "cpu").templates("mean")[0]
        assert built.shape == (3 if dims == 64 else 2, dims)  # a row for each frame, or for each person
        torch.testing.assert_close(load_gallery(identify.GALLERY).templates("mean")[0], built, rtol=0, atol=1e-5)
    monkeypatch.setattr(identify, "GALLERY", tmp_path / "32.pt")
    with pytest.raises(
        UserError, match=r"32\.pt: made by another model \(.*; use the checkpoint that made it, or delete"
    ):
        identify.main()


def test_a_teacher_of_another_size_is_refused(scripts, train, cache):
    train(scripts.stage1, "one")
    message = (
        "^TEACHER = 'vggface2': embeddings of a facenet have 512 numbers, those of stage 1's small 32; set TEACHER = "
        "None, and the network of stage 1 is its own teacher$"
    )
    with pytest.raises(UserError, match=message):
        train(scripts.stage2, "two", {"STAGE1_CHECKPOINT": scripts.stage1.RUN_DIR / "best.pt", "TEACHER": "vggface2"})


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_as_many_numbers_as_it_states_and_has_the_blocks_that_it_names(name):
    with torch.device("meta"):
        network = BACKBONES[name].build(0.0).eval()
        assert network(torch.zeros(2, 3, 76, 76)).shape == (2, BACKBONES[name].dim)
    assert all(network.get_submodule(block) for block in BACKBONES[name].blocks)
