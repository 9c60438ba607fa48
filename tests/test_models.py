"""FaceNet: its embeddings, pretrained weights, frozen blocks, crops, gate and mirror, and another backbone."""

import copy
import email
import http.client
import io
import math
import pickle
import re
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import FRAME, MakesFolderWhenLoaded, noise_frames, same_tensors, tell_apart, write_photo
from PIL import Image

import train_stage2
from backbones import BACKBONES, EMBEDDING_DIM, load_pretrained
from common import UserError
from distortions import DISTORTIONS
from embedding import embed
from losses import ArcMarginProduct
from models import Crops, FaceNet, fingerprint
from transforms import eval_transform

BLOCKS, URL = BACKBONES["facenet"].blocks, BACKBONES["facenet"].weights["vggface2"]
CACHED_NAME = "20180402-114759-vggface2.pt"
CROPS = Crops(face=0.52, wide_size=76, wide_weight=0.3)


@pytest.fixture(scope="module")
def model() -> FaceNet:
    """Random weights, under which images differ; in eval mode, not to be changed."""
    torch.manual_seed(0)
    return tell_apart(FaceNet(None, dropout=0.4), side=80)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The state dict of `model` as a file, with the classifier that the released files have."""
    path = tmp_path_factory.mktemp("weights") / "facenet.pt"
    classifier = {"logits.weight": torch.zeros(9, 512), "logits.bias": torch.zeros(9)}
    torch.save(model.backbone.state_dict() | classifier, path)
    yield path
    path.unlink()  # 94 MB


@pytest.fixture
def slim_state(model) -> dict[str, torch.Tensor]:
    """All names and shapes of the state dict, each tensor a single stored zero: a file of 200 kB."""
    return {name: torch.zeros(()).expand(value.shape) for name, value in model.backbone.state_dict().items()}


def save(content, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def is_unit(embeddings: torch.Tensor) -> bool:
    norms = embeddings.norm(dim=1)
    return embeddings.dtype == torch.float32 and torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


# --- from image to embedding ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_an_embedding_has_512_numbers_and_norm_1_and_differs_between_images(model, images):
    embeddings = model(images)
    assert embeddings.shape == (2, 512) and EMBEDDING_DIM == 512 and is_unit(embeddings)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)
    assert model(torch.zeros(1, 3, 76, 76)).isfinite().all()  # the smallest image allowed


@torch.inference_mode()
def test_embeddings_stay_float32_of_norm_1_under_autocast(two_crops, frames):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [two_crops(frames, part) for part in ("both", "face", "wide")]
    assert all(is_unit(embeddings) for embeddings in parts)


@torch.inference_mode()
def test_dropout_acts_in_training_only(model, images):
    network = copy.deepcopy(model)
    assert torch.equal(network(images), network(images))
    network.backbone.dropout.train()
    assert not torch.equal(network(images), network(images))


def test_random_weights_follow_torch_manual_seed():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(FaceNet(None, dropout=0.4).state_dict())
    assert same_tensors(weights[0], weights[1]) and not same_tensors(weights[0], weights[2])


NO_FRAME = "WIDE_WEIGHT: a wide crop needs photos with more than the face in them, but stage 1's FACE_CROP is"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FaceNet(None, dropout=1.0), "DROPOUT = 1.0: expected a probability in [0, 1)"),
        (lambda: FaceNet(None, dropout=math.nan), "DROPOUT = nan: expected a probability in [0, 1)"),
        (lambda: frozen_until("Mixed_6a"), "FREEZE_UNTIL = 'Mixed_6a': expected None or one of 'conv2d_1a', "),
        (lambda: frozen_until("last_linear"), "FREEZE_UNTIL = 'last_linear': expected None or one of 'conv2d_1a'"),
        (lambda: Crops(0.0, 112, 0.3), f"{NO_FRAME} 0.0; set WIDE_WEIGHT = 0, or train stage 1 with FACE_CROP < 1"),
        (lambda: Crops(1.0, 112, 0.3), f"{NO_FRAME} 1.0; set WIDE_WEIGHT = 0, or train stage 1 with FACE_CROP < 1"),
        (lambda: Crops(0.52, 75, 0.3), "WIDE_SIZE = 75: expected a whole number of pixels, 76..2048"),
        (lambda: Crops(0.52, 76.5, 0.3), "WIDE_SIZE = 76.5: expected a whole number of pixels, 76..2048"),
        (lambda: Crops(0.52, 10**6, 0.3), "WIDE_SIZE = 1000000: expected a whole number of pixels, 76..2048"),
        (lambda: Crops(0.52, 112, 0.0), "WIDE_WEIGHT = 0.0: expected a positive number"),
        (lambda: Crops(0.52, 112, math.inf), "WIDE_WEIGHT = inf: expected a positive number"),
    ],
)
def test_a_constant_out_of_range_is_refused_with_what_was_expected(make, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        make()


# --- pretrained weights -----------------------------------------------------------------------------------------------


def test_a_state_dict_with_the_classifier_of_released_files_gives_the_same_embeddings(model, images, saved):
    loaded = FaceNet(str(saved), dropout=0.0).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def test_every_network_draws_the_same_random_numbers(slim_state, tmp_path):
    """A head that is made next then starts the same, whichever network it is put on."""
    drawn = []
    for pretrained, crops in ((None, None), (save(slim_state, tmp_path / "slim.pt"), None), (None, CROPS)):
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


# --- a frozen trunk ---------------------------------------------------------------------------------------------------

UNTIL = "mixed_6a"
TRUNK = BLOCKS[: BLOCKS.index(UNTIL) + 1]


def frozen_until(name: str, crops: Crops | None = None) -> FaceNet:
    with torch.device("meta"):  # no weights needed
        return FaceNet(None, dropout=0.0, freeze_until=name, crops=crops)


@pytest.fixture
def frozen(saved) -> FaceNet:
    return FaceNet(saved, dropout=0.0, freeze_until=UNTIL)


def block_of(name: str) -> str:
    """'mixed_6a' of backbone.mixed_6a.branch0.conv.weight"""
    return name.split(".")[1]


@torch.inference_mode()
def test_the_blocks_are_all_that_has_weights_but_the_last_two_layers_in_the_order_of_the_data(model, images):
    order, network = [], copy.deepcopy(model)
    for name, child in network.backbone.named_children():
        if list(child.parameters()):
            child.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    network(images)
    assert order == [*BLOCKS, "last_linear", "last_bn"]


@pytest.mark.parametrize(
    "name, widened", [(BLOCKS[0], "never"), (UNTIL, "at once"), (UNTIL, "later"), (BLOCKS[-1], "later")]
)
def test_a_block_and_those_before_it_freeze_in_the_faces_network_and_all_that_follows_trains(name, widened):
    network, trunk = frozen_until(name, CROPS if widened == "at once" else None), BLOCKS[: BLOCKS.index(name) + 1]
    if widened == "later":
        network.widen(CROPS)
    network.eval().train()
    for block, child in network.backbone.named_children():
        assert all(parameter.requires_grad == (block not in trunk) for parameter in child.parameters()), block
        assert all(module.training == (block not in trunk) for module in child.modules()), block
    if network.wide:
        assert all(parameter.requires_grad for parameter in network.wide.parameters())
        assert all(module.training for module in network.wide.modules())
    assert not any(module.training for module in network.eval().modules())


def test_only_what_follows_a_frozen_trunk_gets_a_gradient(frozen, images):
    frozen.train()(images)[:, 0].sum().backward()
    for name, parameter in frozen.named_parameters():
        assert (parameter.grad is None) == (block_of(name) in TRUNK), name
    assert all(p.grad.abs().max() > 0 for p in frozen.backbone.last_linear.parameters())


@torch.no_grad()
def test_frozen_statistics_stay_in_train_mode_and_all_others_move(frozen, saved, model, images):
    before = dict(model.named_buffers())
    for network, trunk in ((frozen, TRUNK), (FaceNet(saved, dropout=0.0), ())):
        assert network.training  # as every torch module starts, without a call of train()
        network(images)
        network.eval().train()(images)
        for name, buffer in network.named_buffers():
            assert torch.equal(buffer, before[name]) == (block_of(name) in trunk), name


def test_freezing_changes_neither_the_embeddings_nor_the_names_of_the_state(frozen, model, images):
    with torch.inference_mode():
        assert torch.equal(frozen.eval()(images), model(images))
    assert same_tensors(frozen.state_dict(), model.state_dict())


def test_a_copy_freezes_blocks_of_its_own():
    network = frozen_until(UNTIL)
    network.backbone.train()  # not network.train(): shows if the copy holds the blocks of the original
    clone = copy.deepcopy(network).train()
    for block in TRUNK:
        assert not any(module.training for module in clone.backbone.get_submodule(block).modules())
        assert all(module.training for module in network.backbone.get_submodule(block).modules())
        assert not any(p.requires_grad for p in clone.backbone.get_submodule(block).parameters())


# --- two crops of a frame ---------------------------------------------------------------------------------------------

BURNT_ONE = 1  # which of `frames`


@pytest.fixture(scope="module")
def two_crops(model) -> FaceNet:
    """Two networks of different weights and statistics, under which images differ; in eval mode, not to be changed."""
    network = copy.deepcopy(model)
    network.widen(CROPS)
    torch.manual_seed(2)
    return tell_apart(network, FRAME, 0.9)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Three of noise; BURNT_ONE is white where the face would be."""
    return noise_frames(3, BURNT_ONE, seed=3)


def cropping(wide_size: int = 112) -> FaceNet:
    """Without weights: for what happens to images before the networks see them."""
    with torch.device("meta"):
        return FaceNet(None, dropout=0.0, crops=Crops(face=0.52, wide_size=wide_size, wide_weight=0.3))


def test_the_centre_of_a_frame_of_308_pixels_is_the_face_crop_of_stage_1():
    """160 / 0.52 is 307.7: a frame of 308 is off by less than a tenth of a pixel at the edge of the face."""
    row, column = np.mgrid[:250, :250] * (2 * np.pi / 60)  # waves of 60 px, steep enough to show a shift of one pixel
    waves = np.stack([np.sin(row + phase) + np.sin(column + 2 * phase) for phase in range(3)], -1)
    photo = Image.fromarray((127.5 + 60 * waves).astype(np.uint8))
    network, frame, expected = cropping(), eval_transform(308, 1.0)(photo)[None], eval_transform(160, 0.52)(photo)[None]
    assert network.face(frame).shape == expected.shape
    assert (network.face(frame) - expected).abs().max() <= 2.01 / 128  # two of 256 levels
    for dim in (2, 3):
        assert (network.face(frame.roll(1, dim)) - expected).abs().max() > 4 / 128


@pytest.mark.parametrize("frame, size", [(154, 76), (308, 112), (154, 112)])  # the last one shrinks by less than half
def test_the_wide_crop_is_the_whole_frame_to_its_edges(frame, size):
    """The value of a ramp is its place, so it shows which place each pixel of the shrunk frame comes from."""
    ramp = torch.arange(float(frame)).expand(1, 3, frame, frame)
    whole = cropping(wide_size=size).whole(ramp)
    expected = (torch.arange(float(size)) + 0.5) * frame / size - 0.5
    torch.testing.assert_close(whole, expected.expand(1, 3, size, size), rtol=0, atol=1e-3)
    torch.testing.assert_close(cropping(wide_size=size).whole(ramp.transpose(2, 3)), whole.transpose(2, 3))


def test_shrinking_the_frame_skips_no_pixel():
    """A chequerboard of single pixels: only where every pixel counts does it come out as the grey between."""
    row, column = torch.meshgrid(torch.arange(308), torch.arange(308), indexing="ij")
    board = (2.0 * ((row + column) % 2) - 1).expand(1, 3, 308, 308)
    assert cropping().whole(board).abs().max() < 1e-6


@torch.inference_mode()
def test_an_embedding_is_the_face_and_the_frame_by_weight_or_the_frame_alone_for_a_burnt_face(two_crops, frames):
    embeddings, face, wide = (two_crops(frames, part) for part in ("both", "face", "wide"))
    weighted = torch.cat([torch.tensor([[1.0], [0.0], [1.0]]) * face, 0.3 * wide], 1)  # by the gate
    assert embeddings.shape == (3, 1024) and is_unit(embeddings)
    torch.testing.assert_close(embeddings, weighted / weighted.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert (embeddings[BURNT_ONE, :512] == 0).all()
    assert embeddings[0, 512:].norm().item() == pytest.approx(0.3 / (1 + 0.3**2) ** 0.5, abs=1e-6)


@torch.inference_mode()
def test_the_first_network_embeds_the_centre_alone_and_the_second_the_whole_frame(two_crops, frames):
    face, wide = two_crops(frames, part="face"), two_crops(frames, part="wide")
    of_centre = two_crops.backbone(frames[:, :, 37:117, 37:117])
    of_all = two_crops.wide(F.interpolate(F.avg_pool2d(frames, 2), (76, 76), mode="bilinear"))
    for part, expected in ((face, of_centre), (wide, of_all)):
        torch.testing.assert_close(part, F.normalize(expected), rtol=0, atol=1e-6)
        assert part.shape == (3, 512) and is_unit(part)
    around = torch.cat([-frames[..., :37], frames[..., 37:]], -1)
    assert torch.equal(two_crops(around, part="face"), face)
    assert (two_crops(around, part="wide") - wide).abs().max() > 1e-3


def test_a_burnt_out_face_gets_no_gradient_and_the_frame_does(two_crops, frames):
    network = copy.deepcopy(two_crops)
    network(frames[[BURNT_ONE]])[0, 600].backward()
    assert all((p.grad == 0).all() for p in network.backbone.parameters() if p.grad is not None)
    assert network.wide.last_linear.weight.grad.abs().max() > 0
    network(frames[:1])[0, 600].backward()
    assert network.backbone.last_linear.weight.grad.abs().max() > 0


@torch.inference_mode()
def test_without_crops_images_are_faces_and_every_part_is_the_embedding(model, images):
    assert torch.equal(model.face(images), images)
    expected = F.normalize(model.backbone(images))
    for part in ("both", "face", "wide"):
        torch.testing.assert_close(model(images, part), expected, rtol=0, atol=1e-6)
    assert is_unit(model(torch.full((1, 3, 80, 80), 127.5 / 128)))  # white: there is no gate


def test_widening_starts_from_a_copy_of_the_faces_network_and_leaves_that_as_it_is(model):
    network, before = copy.deepcopy(model), model.backbone.state_dict()
    network.widen(CROPS)
    assert same_tensors(network.wide.state_dict(), before)
    with torch.no_grad():
        for parameter in network.wide.parameters():
            parameter.add_(1)  # if the weights were shared, those of the face would move too
    assert same_tensors(network.backbone.state_dict(), before)


def test_a_state_dict_with_two_crops_fits_two_crops_alone(two_crops, model, frames):
    torch.manual_seed(9)
    loaded = FaceNet(None, dropout=0.0, crops=CROPS).eval()
    loaded.load_state_dict(two_crops.state_dict())
    with torch.inference_mode():
        assert torch.equal(loaded(frames), two_crops(frames))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*wide\."):
        copy.deepcopy(model).load_state_dict(two_crops.state_dict())


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate_of(image: Image.Image, size: int) -> float:
    return cropping().gate(eval_transform(size, 1.0)(image)[None]).item()


def test_the_gate_closes_on_average_and_heavy_glare_and_on_no_other_bright_distortion():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (250, 250, 3), dtype=np.uint8))
    cases = [("sunny", 0.0, 1), ("sunny", 0.5, 0), ("sunny", 1.0, 0), ("foggy", 1.0, 1), ("noisy", 1.0, 1)]
    for kind, severity, gate in cases:
        assert gate_of(DISTORTIONS[kind](noise, severity, np.random.default_rng(0)), 308) == gate, (kind, severity)


@pytest.mark.parametrize(
    "face, columns, elsewhere, gate",
    [
        (255, 64, 0, 1),  # exactly 0.8 of the face's 80 columns
        (255, 65, 0, 0),
        (250, 80, 0, 0),
        (249, 80, 0, 1),
        ((200, 255, 255), 80, 255, 1),  # all three channels must be burnt out
        ((255, 255, 200), 80, 255, 1),
        (100, 80, 255, 1),  # what lies around the face does not count
    ],
)
def test_the_gate_closes_where_over_0_8_of_the_face_have_250_of_255_in_all_channels(face, columns, elsewhere, gate):
    pixels = np.full((FRAME, FRAME, 3), elsewhere, np.uint8)
    pixels[37:117, 37 : 37 + columns] = face
    assert gate_of(Image.fromarray(pixels), FRAME) == gate


# --- quality and mirror -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror", [False, True])
@torch.inference_mode()
def test_the_quality_is_the_norm_of_the_faces_features_before_they_are_normalized(two_crops, frames, mirror):
    network, norms = copy.deepcopy(two_crops), []
    network.mirror = mirror
    network.backbone.last_bn.register_forward_hook(lambda module, inputs, output: norms.append(output.norm(dim=1)))
    embedding, quality = network.rated(frames)
    torch.testing.assert_close(quality, torch.stack(norms).mean(0), rtol=1e-5, atol=0)  # over image and mirror image
    assert len(norms) == 1 + mirror and quality.dtype == torch.float32 and quality.unique().numel() == 3
    assert torch.equal(embedding, network(frames))


@torch.inference_mode()
def test_a_mirrored_embedding_is_the_mean_over_an_image_and_its_mirror_image_in_eval_mode(two_crops, frames):
    mirrored = copy.deepcopy(two_crops)
    mirrored.mirror = True
    for part in ("face", "wide"):
        both = [F.normalize(two_crops(seen, part).double()) for seen in (frames, frames.flip(3))]
        assert (both[0] - both[1]).abs().max() > 1e-3  # without `mirror` the sides do differ
        expected = F.normalize(both[0] + both[1])
        torch.testing.assert_close(mirrored(frames, part).double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(mirrored(frames), mirrored(frames.flip(3)), rtol=0, atol=1e-4)
    in_training = []
    for network in (two_crops, mirrored):
        torch.manual_seed(0)
        in_training.append(copy.deepcopy(network).train()(frames))
    torch.testing.assert_close(*in_training, rtol=0, atol=1e-6)


# --- another backbone -------------------------------------------------------------------------------------------------


def test_a_step_of_each_backbone_lowers_the_loss_and_the_blocks_freeze(tmp_path):
    write_photo(tmp_path / "ann.png", (90, 120, 150), seed=0)
    for name, until, frozen, trained in (
        ("facenet", "repeat_1", "conv2d_1a.conv.weight", "mixed_6a.branch0.conv.weight"),
        ("resnet50", "layer2", "conv1.weight", "layer3.0.conv1.weight"),
    ):
        torch.manual_seed(0)
        network = FaceNet(None, dropout=0.0, freeze_until=until, backbone=name)
        head = ArcMarginProduct(EMBEDDING_DIM, 2, s=32, m=0.5)
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
        assert found.embeddings.shape == (1, EMBEDDING_DIM) and is_unit(found.embeddings)


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
