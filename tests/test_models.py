import copy
import http.client
import io
import pickle
import socket
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FRAME, MakesFolderWhenLoaded, noise_frames, same_tensors, tell_apart
from PIL import Image

from common import UserError
from distortions import DISTORTIONS
from models import BLOCKS, EMBEDDING_DIM, PRETRAINED_URLS, Crops, FaceNet, load_pretrained
from transforms import eval_transform

SHARED = Path(__file__).parents[2] / "shared"
URL = PRETRAINED_URLS["vggface2"]
CACHED_NAME = "20180402-114759-vggface2.pt"


@pytest.fixture(scope="module")
def model() -> FaceNet:
    """Random weights, and statistics of BatchNorm that are not the initial ones; in eval mode, not to be changed."""
    torch.manual_seed(0)
    model = FaceNet(None, dropout=0.4)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(7)
    return model.eval()


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


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty download cache of our own; any download that a test has not prepared fails it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))

    def no_download(*args, **kwargs):
        pytest.fail("a download was started")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    return tmp_path / "torch_home" / "checkpoints"


def save(content, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# --- from image to embedding ------------------------------------------------------------------------------------------


def test_an_embedding_has_512_numbers_norm_1_and_float32(model, images):
    embeddings = model(images)
    assert embeddings.shape == (2, 512) and EMBEDDING_DIM == 512
    assert embeddings.dtype == torch.float32
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert not torch.allclose(embeddings[0], embeddings[1], atol=1e-3)


def test_embeddings_stay_float32_of_norm_1_under_autocast(model, images):
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = model(images)
    assert embeddings.dtype == torch.float32
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)


def test_the_smallest_allowed_image_of_76_pixels_goes_through(model):
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 76, 76)).isfinite().all()


@torch.inference_mode()
def test_dropout_acts_in_training_only(model, images):
    assert torch.equal(model(images), model(images))
    model.backbone.dropout.train()
    try:
        assert not torch.equal(model(images), model(images))
    finally:
        model.eval()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_below_1_is_refused(dropout):
    with pytest.raises(ValueError, match=rf"DROPOUT = {dropout}: expected a probability in \[0, 1\)"):
        FaceNet(None, dropout)


def test_random_weights_follow_torch_manual_seed(model):
    torch.manual_seed(0)
    same = dict(FaceNet(None, dropout=0.4).named_parameters())
    assert same_tensors(same, dict(model.named_parameters()))
    torch.manual_seed(1)
    other = dict(FaceNet(None, dropout=0.4).named_parameters())
    assert not torch.equal(other["backbone.last_linear.weight"], same["backbone.last_linear.weight"])


# --- pretrained weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_type", [str, Path])
def test_a_saved_state_dict_gives_the_same_embeddings_whatever_the_seed(model, images, saved, as_type):
    torch.manual_seed(123)
    loaded = FaceNet(as_type(saved), dropout=0.0).eval()
    assert same_tensors(loaded.state_dict(), model.state_dict())
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def test_pretrained_weights_draw_the_same_random_numbers_as_random_ones(slim_state, tmp_path):
    """So a head that is made next starts alike, whichever network it is put upon."""
    torch.manual_seed(0)
    FaceNet(None, dropout=0.0)
    after_random = torch.rand(3)
    torch.manual_seed(0)
    FaceNet(save(slim_state, tmp_path / "slim.pt"), dropout=0.0)
    assert torch.equal(torch.rand(3), after_random)


def test_the_classifier_of_a_released_file_is_left_out(saved, model):
    assert "logits.weight" in torch.load(saved, weights_only=True, mmap=True)
    assert load_pretrained(saved).keys() == model.backbone.state_dict().keys()


def test_a_state_dict_without_the_classifier_loads(slim_state, tmp_path):
    assert load_pretrained(save(slim_state, tmp_path / "slim.pt")).keys() == slim_state.keys()


def test_a_half_precision_state_dict_loads_into_float32(slim_state, tmp_path):
    slim_state["last_linear.weight"] = torch.tensor(0.1, dtype=torch.float16).expand(512, 1792)
    loaded = FaceNet(save(slim_state, tmp_path / "half.pt"), dropout=0.0)
    weight = loaded.backbone.last_linear.weight
    assert weight.dtype == torch.float32
    assert (weight == 0.0999755859375).all()  # the half nearest to 0.1


def test_missing_unknown_and_misshapen_parameters_are_each_named(slim_state, tmp_path):
    del slim_state["last_bn.bias"]
    slim_state["fc.weight"] = torch.zeros(3)
    slim_state["last_linear.weight"] = torch.zeros(256, 1792)
    path = save(slim_state, tmp_path / "other.pt")
    with pytest.raises(ValueError) as error:
        FaceNet(path, dropout=0.0)
    told = str(error.value)
    assert told.startswith(f"{path}: not a state dict of InceptionResnetV1: ")
    assert "1 missing: last_bn.bias" in told
    assert "1 unknown: fc.weight" in told
    assert "1 of another shape: last_linear.weight (256, 1792), expected (512, 1792)" in told


def test_of_many_faults_three_are_named_and_all_counted(slim_state, tmp_path):
    state = {f"module.{name}": value for name, value in slim_state.items()}  # as DataParallel saves it
    with pytest.raises(ValueError) as error:
        load_pretrained(save(state, tmp_path / "parallel.pt"))
    count = len(slim_state)
    assert f"{count} missing: conv2d_1a.conv.weight, conv2d_1a.bn.weight, conv2d_1a.bn.bias, ...;" in str(error.value)
    assert f"{count} unknown: module.conv2d_1a.conv.weight, " in str(error.value)


def test_a_path_without_a_file_is_told_with_the_choices(tmp_path):
    missing = tmp_path / "nobody.pt"
    with pytest.raises(UserError) as error:
        FaceNet(missing, dropout=0.0)
    assert f"PRETRAINED = {str(missing)!r}: no such file" in str(error.value)
    assert "'vggface2' or 'casia-webface', or None" in str(error.value)


@pytest.mark.parametrize("name", ["vggface", "VGGFace2", ""])
def test_a_misspelt_name_is_told_with_the_choices(name):
    with pytest.raises(UserError, match=rf"PRETRAINED = '{name}': no such file; .*'vggface2'"):
        FaceNet(name, dropout=0.0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        b".",
        b"garbage" * 100,
        b"r\xea\x00",
        b"name,value\n1,2\n",
        b"<html>404 not found</html>",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 47252091\n",
        b"PK\x03\x04" + bytes(64),
    ],
)
def test_a_file_that_is_no_torch_file_is_a_value_error_that_names_it(content, tmp_path):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert str(error.value).startswith(f"{path}: not a state dict that torch can read (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])  # the released files are of the older kind
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_a_value_error_that_names_it(slim_state, tmp_path, share, zipped):
    path = tmp_path / "truncated.pt"
    torch.save(slim_state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert str(error.value).startswith(f"{path}: not a state dict that torch can read (")


def test_a_file_with_code_is_refused_and_the_code_does_not_run(tmp_path):
    trace = tmp_path / "code_has_run"
    path = save(MakesFolderWhenLoaded(trace), tmp_path / "malicious.pt")
    bare = tmp_path / "bare_pickle.pt"
    bare.write_bytes(pickle.dumps(MakesFolderWhenLoaded(trace), protocol=2))  # torch's
    for file in (path, bare):
        with pytest.raises(ValueError, match="not a state dict that torch can read") as error:
            load_pretrained(file)
        assert str(file) in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's own advice: how to run the code all the same
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # the trap was armed


@pytest.mark.parametrize("content", [torch.zeros(3), torch.zeros(()), 5, None, [torch.zeros(2)], "weights", {"a": 1}])
def test_a_torch_file_of_something_else_is_a_value_error_that_names_it(content, tmp_path):
    path = save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert str(error.value).startswith(f"{path}: expected a state dict of InceptionResnetV1")
    assert "checkpoint" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {0: torch.zeros(3)}])
def test_a_dict_without_parameter_names_is_a_value_error_that_names_the_file(content, tmp_path):
    path = save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


def test_a_checkpoint_of_this_project_gets_the_hint_where_it_belongs(slim_state, tmp_path):
    path = save({"format": 1, "stage": 1, "model": slim_state, "persons": ["ann"]}, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="this is a checkpoint: name it where the script asks for one") as error:
        FaceNet(path, dropout=0.0)
    assert str(path) in str(error.value)


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError(URL, 404, "no route to host", None, None),
        TimeoutError("no route to host"),
        http.client.BadStatusLine("no route to host"),  # no OSError: what a broken proxy gives
    ],
)
def test_a_failed_download_tells_the_address_and_where_the_file_belongs(cache, monkeypatch, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError) as error:
        FaceNet("vggface2", dropout=0.0)
    told = str(error.value)
    assert told.startswith("PRETRAINED = 'vggface2': the weights could not be downloaded (")
    assert "no route to host" in told and URL in told and str(cache) in told
    assert socket.getdefaulttimeout() == before


class Answer(io.BytesIO):
    """What urlopen returns: 9 of the promised `length` bytes, then the end or an exception."""

    def __init__(self, length: int, failure: Exception | None):
        super().__init__(b"123456789")
        self.length, self.failure = length, failure

    def info(self):
        headers = http.client.HTTPMessage()
        headers["Content-Length"] = str(self.length)
        return headers

    def read(self, size=-1):
        chunk = super().read(size)
        if not chunk and self.failure:
            raise self.failure
        return chunk


@pytest.fixture
def real_download(monkeypatch):
    """torch's own download_url_to_file, taken before `cache` replaces it: ask for this fixture first."""
    return torch.hub.download_url_to_file


def test_a_download_that_breaks_off_leaves_no_file(real_download, cache, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", real_download)
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(1000, ConnectionResetError("reset by peer")))
    with pytest.raises(UserError, match="reset by peer"):
        FaceNet("vggface2", dropout=0.0)
    assert list(cache.iterdir()) == []


def test_a_download_that_ends_early_without_an_error_is_not_taken_for_whole(real_download, cache, monkeypatch):
    """http.client says nothing where a server closes before the promised length, nor does torch."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", real_download)
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(1000, None))
    with pytest.raises(UserError) as error:
        FaceNet("vggface2", dropout=0.0)
    assert str(cache / CACHED_NAME) in str(error.value)
    # Either the half file is gone, or the sentence says to remove it: the next run would trip over it again.
    assert not (cache / CACHED_NAME).exists() or "delete" in str(error.value)


def test_a_download_gives_up_on_a_silent_server_and_restores_the_timeout(cache, monkeypatch, slim_state):
    seen = []

    def download(url, path):
        seen.append((url, socket.getdefaulttimeout()))
        save(slim_state, Path(path))

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    socket.setdefaulttimeout(77)
    try:
        state = load_pretrained("vggface2")
        assert socket.getdefaulttimeout() == 77
    finally:
        socket.setdefaulttimeout(None)
    assert seen == [(URL, 30)]
    assert state.keys() == slim_state.keys()
    assert (cache / CACHED_NAME).is_file()


def test_a_cached_file_is_used_without_a_download(cache, slim_state):
    slim_state["last_bn.bias"] = torch.full((512,), 0.25)
    save(slim_state, cache / CACHED_NAME)  # the fixture `cache` fails the test upon any download
    assert torch.equal(load_pretrained("vggface2")["last_bn.bias"], torch.full((512,), 0.25))


# --- the real network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_network() -> FaceNet:
    path = SHARED / "weights" / "facenet_msceleb_fp16.pt"
    if not path.is_file():
        pytest.skip("no pretrained weights at ../shared/weights/facenet_msceleb_fp16.pt, which are not in the repo")
    return FaceNet(path, dropout=0.0).eval()


def test_the_real_half_precision_weights_load(real_network):
    assert all(value.isfinite().all() for value in real_network.state_dict().values())
    assert real_network.backbone.last_linear.weight.dtype == torch.float32


@torch.inference_mode()
def test_the_real_network_tells_persons_apart(real_network):
    root = SHARED / "lfw_faces" / "cross" / "val"
    if not root.is_dir():
        pytest.skip("no photos at ../shared/lfw_faces/cross/val, which are not in the repo")
    transform = eval_transform(160, 0.52)
    photos = [sorted(folder.glob("*.jpg"))[:2] for folder in sorted(root.iterdir())[:6]]
    images = [transform(Image.open(path).convert("RGB")) for pair in photos for path in pair]
    cosine = (embeddings := real_network(torch.stack(images))) @ embeddings.T  # (12, 12)
    cosine.fill_diagonal_(-1)
    nearest = cosine.argmax(1).tolist()
    right = sum(other // 2 == own // 2 for own, other in enumerate(nearest))
    assert right >= 9  # of 12; chance is about 1


# --- a frozen trunk ---------------------------------------------------------------------------------------------------

UNTIL = "mixed_6a"
TRUNK = BLOCKS[: BLOCKS.index(UNTIL) + 1]


@pytest.fixture
def frozen(saved) -> FaceNet:
    """`model`'s weights and statistics, frozen up to and with mixed_6a."""
    return FaceNet(saved, dropout=0.0, freeze_until=UNTIL)


def block_of(name: str) -> str:
    """'mixed_6a' of backbone.mixed_6a.branch0.conv.weight"""
    return name.split(".")[1]


def test_the_blocks_are_all_that_has_weights_but_the_last_linear_layer_and_its_norm(model):
    with_weights = [name for name, child in model.backbone.named_children() if list(child.parameters())]
    assert sorted(with_weights) == sorted([*BLOCKS, "last_linear", "last_bn"])  # and no classifier, `logits`
    assert {block_of(name) for name, _ in model.named_parameters()} == set(with_weights)
    assert len(set(BLOCKS)) == len(BLOCKS)


def test_the_blocks_are_named_in_the_order_of_the_data(model, images):
    order = []
    hooks = [
        child.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, child in model.backbone.named_children()
        if list(child.parameters())
    ]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    assert order == [*BLOCKS, "last_linear", "last_bn"]


def test_a_frozen_trunk_gets_no_gradient_and_all_that_follows_does(frozen, images):
    outputs = {}
    for name in (UNTIL, "repeat_2"):
        frozen.backbone.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: output})
        )
    frozen.train()(images)[:, 0].sum().backward()
    for name, parameter in frozen.named_parameters():
        assert parameter.requires_grad == (block_of(name) not in TRUNK), name
        assert (parameter.grad is None) == (block_of(name) in TRUNK), name
    assert all(p.grad.abs().max() > 0 for p in frozen.backbone.last_linear.parameters())
    assert not outputs[UNTIL].requires_grad and outputs["repeat_2"].requires_grad  # no backward through the trunk


@torch.no_grad()
def test_frozen_statistics_stay_in_train_mode_and_later_ones_move(frozen, model, images):
    before = dict(model.named_buffers())
    frozen.eval()
    assert same_tensors(dict(frozen.named_buffers()), before)
    frozen.train()
    assert frozen.training and frozen.backbone.training and frozen.backbone.repeat_2.training
    frozen(images)
    for name, buffer in frozen.named_buffers():
        assert torch.equal(buffer, before[name]) == (block_of(name) in TRUNK), name


@torch.no_grad()
def test_a_network_fresh_from_its_constructor_keeps_its_frozen_statistics_too(frozen, model, images):
    assert frozen.training  # as any module of torch starts: nobody need have called train()
    frozen(images)
    before = dict(model.named_buffers())
    assert all(torch.equal(b, before[n]) for n, b in frozen.named_buffers() if block_of(n) in TRUNK)


@torch.no_grad()
def test_without_freezing_all_statistics_move_and_all_weights_train(saved, model, images):
    free, before = FaceNet(saved, dropout=0.0).train(), dict(model.named_buffers())
    free(images)
    assert not any(torch.equal(buffer, before[name]) for name, buffer in free.named_buffers())
    assert all(parameter.requires_grad for parameter in free.parameters())
    assert all(module.training for module in free.modules())


def test_freezing_changes_no_embedding_and_no_name_of_the_state(frozen, model, images):
    with torch.inference_mode():
        assert torch.equal(frozen.eval()(images), model(images))
    assert same_tensors(frozen.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", BLOCKS)
def test_whichever_block_is_named_it_and_those_before_it_freeze_and_the_last_layers_train(name):
    with torch.device("meta"):  # no weights needed
        network = FaceNet(None, dropout=0.0, freeze_until=name).train()
    trunk = BLOCKS[: BLOCKS.index(name) + 1]
    trained = {block_of(n) for n, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {*BLOCKS, "last_linear", "last_bn"} - set(trunk)
    assert {"last_linear", "last_bn"} <= trained
    for block, child in network.backbone.named_children():
        assert all(module.training == (block not in trunk) for module in child.modules()), block


@pytest.mark.parametrize("name", ["mixed_6b", "last_linear", "logits", "Mixed_6a", ""])
def test_an_unknown_block_to_freeze_is_refused_with_the_choices(name):
    with pytest.raises(ValueError, match=rf"FREEZE_UNTIL = '{name}': expected None or one of") as error:
        FaceNet(None, dropout=0.0, freeze_until=name)
    assert all(repr(block) in str(error.value) for block in BLOCKS)


def test_a_copy_freezes_blocks_of_its_own():
    with torch.device("meta"):
        network = FaceNet(None, dropout=0.0, freeze_until=UNTIL)
    network.backbone.train()  # past FaceNet.train: so that a copy that froze the original's blocks would show
    clone = copy.deepcopy(network)
    clone.train()
    for block in TRUNK:
        assert not any(module.training for module in clone.backbone.get_submodule(block).modules())
        assert all(module.training for module in network.backbone.get_submodule(block).modules())
    assert clone.backbone.repeat_2.training
    assert not any(p.requires_grad for block in TRUNK for p in clone.backbone.get_submodule(block).parameters())


# --- two crops of a frame ---------------------------------------------------------------------------------------------

CROPS = Crops(face=0.52, wide_size=76, wide_weight=0.3)
BURNT_ONE = 1  # which of `frames`


@pytest.fixture(scope="module")
def two_crops(model) -> FaceNet:
    """Two networks that embed otherwise and tell images apart: BatchNorm has the statistics of some, as each sees them.

    In eval mode, not to be changed.
    """
    network = copy.deepcopy(model)
    network.widen(CROPS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return tell_apart(network, FRAME, 0.9)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Three of noise; BURNT_ONE is white where the face would be."""
    return noise_frames(3, BURNT_ONE, seed=3)


def without_weights(crops: Crops | None) -> FaceNet:
    """For what is done to images before the networks see them."""
    with torch.device("meta"):
        return FaceNet(None, dropout=0.0, crops=crops)


def photo(seed: int, side: int = 250) -> Image.Image:
    """Noise of every brightness, from black to white."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def smooth_photo() -> Image.Image:
    """Waves of 60 px in both directions, other ones in each channel: steep enough to tell a shift by one pixel."""
    row, column = np.mgrid[:250, :250] * (2 * np.pi / 60)
    waves = [np.sin(row + phase) + np.sin(column + 2 * phase) for phase in range(3)]
    return Image.fromarray((127.5 + 60 * np.stack(waves, -1)).astype(np.uint8))


@pytest.mark.parametrize("face", [0.0, 1.0, -0.5, 1.2, float("nan")])
def test_a_face_crop_that_leaves_nothing_around_it_or_nothing_in_it_is_refused(face):
    with pytest.raises(ValueError, match=rf"FACE_CROP = {face}: a wide crop needs photos with more than the face"):
        Crops(face, 112, 0.3)


@pytest.mark.parametrize("size", [75, 0, -112])
def test_a_wide_crop_too_small_for_the_network_is_refused(size):
    with pytest.raises(ValueError, match=rf"WIDE_SIZE = {size}: expected a whole number of pixels, 76 or more"):
        Crops(0.52, size, 0.3)


@pytest.mark.parametrize("weight", [0.0, -0.3, float("inf"), float("nan")])
def test_a_wide_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ValueError, match=rf"WIDE_WEIGHT = {weight}: expected a positive number"):
        Crops(0.52, 112, weight)


def test_crops_at_the_ends_of_their_ranges_are_taken():
    crops = Crops(face=0.999, wide_size=76, wide_weight=1e-3)
    assert (crops.face, crops.wide_size, crops.wide_weight) == (0.999, 76, 1e-3)


def test_the_centre_of_a_frame_is_the_face_crop_of_the_photo():
    """0.5 of 250 px at 160 is exactly half of the frame at 320; only the rounding of pixels to 0..255 is left."""
    face = without_weights(Crops(0.5, 112, 0.3)).face(eval_transform(320, 1.0)(photo(seed=0))[None])[0]
    expected = eval_transform(160, 0.5)(photo(seed=0))
    assert face.shape == expected.shape == (3, 160, 160) and face.dtype == torch.float32
    assert (face - expected).abs().max() <= 1.01 / 128


def test_the_centre_of_a_frame_of_308_pixels_is_the_face_crop_of_stage_1():
    """160 / 0.52 is 307.7: a frame of 308 is off by less than a tenth of a pixel at the edge of the face."""
    network, frame = without_weights(Crops(0.52, 112, 0.3)), eval_transform(308, 1.0)(smooth_photo())
    expected = eval_transform(160, 0.52)(smooth_photo())
    face = network.face(frame[None])[0]
    assert face.shape == expected.shape
    assert (face - expected).abs().max() <= 2.01 / 128  # two of 256 levels
    for dim in (1, 2):
        assert (network.face(frame.roll(1, dim)[None])[0] - expected).abs().max() > 4 / 128


def test_the_wide_crop_is_the_whole_frame_to_its_edges():
    """A ramp, whose value is its place, tells which place each pixel of the shrunk frame comes from."""
    for frame, size in ((154, 76), (308, 112), (154, 112)):  # the last one by less than half
        ramp = torch.arange(float(frame)).expand(1, 3, frame, frame)
        whole = without_weights(Crops(0.52, size, 0.3)).whole(ramp)
        assert whole.shape == (1, 3, size, size)
        expected = (torch.arange(float(size)) + 0.5) * frame / size - 0.5
        torch.testing.assert_close(whole, expected.expand_as(whole), rtol=0, atol=1e-3)
        down = without_weights(Crops(0.52, size, 0.3)).whole(ramp.transpose(2, 3))
        torch.testing.assert_close(down, whole.transpose(2, 3))


def test_shrinking_the_frame_skips_no_pixel():
    """Single pixels of black and white in turn: only where each is looked at do they come out as the grey between."""
    row, column = torch.meshgrid(torch.arange(308), torch.arange(308), indexing="ij")
    board = (2.0 * ((row + column) % 2) - 1).expand(1, 3, 308, 308)
    assert without_weights(Crops(0.52, 112, 0.3)).whole(board).abs().max() < 1e-6


@torch.inference_mode()
def test_an_embedding_is_the_face_and_the_frame_each_by_its_weight(two_crops, frames):
    face, wide = two_crops(frames, part="face"), two_crops(frames, part="wide")
    gate = torch.tensor([[1.0], [0.0], [1.0]])
    weighted = torch.cat([gate * face, 0.3 * wide], 1)
    embeddings = two_crops(frames)
    assert embeddings.shape == (3, 1024) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, weighted / weighted.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert embeddings[0, 512:].norm().item() == pytest.approx(0.3 / (1 + 0.3**2) ** 0.5, abs=1e-6)


@torch.inference_mode()
def test_one_cosine_compares_faces_and_frames_by_the_square_of_the_weight(two_crops, frames):
    a, b = two_crops(frames)[[0, 2]]
    (face_a, face_b), (wide_a, wide_b) = (two_crops(frames, part)[[0, 2]] for part in ("face", "wide"))
    assert (a @ b).item() == pytest.approx((face_a @ face_b + 0.09 * wide_a @ wide_b).item() / 1.09, abs=1e-6)


@torch.inference_mode()
def test_the_face_is_what_the_network_alone_makes_of_the_centre_and_the_rest_what_the_other_makes_of_all(
    two_crops, frames
):
    face, wide = two_crops(frames, part="face"), two_crops(frames, part="wide")
    of_centre = two_crops.backbone(frames[:, :, 37:117, 37:117])
    of_all = two_crops.wide(F.interpolate(F.avg_pool2d(frames, 2), (76, 76), mode="bilinear"))
    for part, expected in ((face, of_centre), (wide, of_all)):
        torch.testing.assert_close(part, F.normalize(expected), rtol=0, atol=1e-6)
        assert part.shape == (3, 512) and part.dtype == torch.float32
        assert part.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    around = frames.clone()
    around[..., :37] = -around[..., :37]
    assert torch.equal(two_crops(around, part="face"), face)
    assert (two_crops(around, part="wide") - wide).abs().max() > 1e-3


@torch.inference_mode()
def test_where_the_face_is_burnt_out_the_frame_says_it_all(two_crops, frames):
    embeddings, wide = two_crops(frames), two_crops(frames, part="wide")
    assert (embeddings[BURNT_ONE, :512] == 0).all()
    torch.testing.assert_close(embeddings[BURNT_ONE, 512:], wide[BURNT_ONE], rtol=0, atol=1e-6)
    assert embeddings[0, :512].norm() > 0.9 and embeddings[2, :512].norm() > 0.9


@torch.inference_mode()
def test_two_crops_give_float32_of_norm_1_under_autocast(two_crops, frames):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = [two_crops(frames, part) for part in ("both", "face", "wide")]
    for embeddings in parts:
        assert embeddings.dtype == torch.float32
        assert embeddings.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-6)


def test_a_burnt_out_face_gets_no_gradient_and_the_frame_does(two_crops, frames):
    network = copy.deepcopy(two_crops)
    network(frames[[BURNT_ONE]])[0, 600].backward()
    assert all((p.grad == 0).all() for p in network.backbone.parameters() if p.grad is not None)
    assert network.wide.last_linear.weight.grad.abs().max() > 0
    network.zero_grad()
    network(frames[:1])[0, 600].backward()
    assert network.backbone.last_linear.weight.grad.abs().max() > 0


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate_of(image: Image.Image) -> float:
    gate = without_weights(Crops(0.52, 112, 0.3)).gate(eval_transform(308, 1.0)(image)[None])
    assert gate.shape == (1,) and gate.dtype == torch.float32
    return gate.item()


@pytest.mark.parametrize("seed", range(3))
def test_the_gate_closes_on_the_average_glare_and_the_heaviest_and_not_on_the_mildest(seed):
    image, generator = photo(seed), np.random.default_rng(seed)
    assert gate_of(image) == 1
    assert [gate_of(DISTORTIONS["sunny"](image, severity, generator)) for severity in (0.0, 0.5, 1.0)] == [1, 0, 0]


@pytest.mark.parametrize("severity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", sorted(set(DISTORTIONS) - {"sunny"}))
def test_the_gate_stays_open_for_every_other_kind(kind, severity):
    assert gate_of(DISTORTIONS[kind](photo(4), severity, np.random.default_rng(4))) == 1


def test_each_image_of_a_batch_has_a_gate_of_its_own(two_crops, frames):
    assert two_crops.gate(frames).tolist() == [1, 0, 1]
    assert two_crops.gate(frames.flip(0)[:2]).tolist() == [1, 0]


def frame_with(face_level: int, burnt_columns: int, elsewhere: int = 0) -> Image.Image:
    """154 px, `elsewhere` but for the first `burnt_columns` of the face's 80, of brightness `face_level`."""
    pixels = np.full((FRAME, FRAME, 3), elsewhere, np.uint8)
    pixels[37:117, 37 : 37 + burnt_columns] = face_level
    return Image.fromarray(pixels)


def small_gate(image: Image.Image) -> float:
    return without_weights(CROPS).gate(eval_transform(FRAME, 1.0)(image)[None]).item()


def test_the_gate_closes_above_three_tenths_of_the_face_and_not_at_them():
    assert [small_gate(frame_with(255, columns)) for columns in (0, 24, 25, 80)] == [1, 1, 0, 0]  # 24 of 80 is 0.3


def test_the_gate_takes_a_channel_for_burnt_out_from_250_of_255():
    assert [small_gate(frame_with(level, 80)) for level in (249, 250, 255)] == [1, 0, 0]
    exactly = torch.full((1, 3, FRAME, FRAME), (250 - 127.5) / 128)  # eval_transform rounds it up a little
    assert without_weights(CROPS).gate(exactly).item() == 0


def test_the_gate_wants_all_three_channels_burnt_out():
    pixels = np.full((FRAME, FRAME, 3), 255, np.uint8)
    assert small_gate(Image.fromarray(pixels)) == 0
    for channel in range(3):
        coloured = pixels.copy()
        coloured[..., channel] = 200
        assert small_gate(Image.fromarray(coloured)) == 1


def test_the_gate_looks_at_the_face_alone():
    around = np.full((FRAME, FRAME, 3), 255, np.uint8)
    around[37:117, 37:117] = 100
    assert small_gate(Image.fromarray(around)) == 1


# --- widening, freezing and keeping two crops -------------------------------------------------------------------------


def test_widening_starts_from_a_copy_of_the_faces_network_and_leaves_that_as_it_is(model, frames):
    network, before = copy.deepcopy(model), model.state_dict()
    network.widen(CROPS)
    assert network.crops == CROPS
    assert same_tensors(network.wide.state_dict(), model.backbone.state_dict())
    assert {name.split(".")[0] for name in network.state_dict()} == {"backbone", "wide"}
    with torch.no_grad():
        for parameter in network.wide.parameters():
            parameter.add_(1)  # were the weights shared, the face's would move too
        assert same_tensors(network.backbone.state_dict(), {n.removeprefix("backbone."): v for n, v in before.items()})
        assert torch.equal(network.eval()(frames, part="face"), model(frames[:, :, 37:117, 37:117]))


def test_crops_given_at_the_start_are_as_widened_later_and_draw_no_random_numbers():
    torch.manual_seed(0)
    network = FaceNet(None, dropout=0.4, crops=CROPS)
    after = torch.rand(3)
    torch.manual_seed(0)
    later = FaceNet(None, dropout=0.4)
    assert torch.equal(torch.rand(3), after)
    later.widen(CROPS)
    assert network.crops == later.crops == CROPS
    assert same_tensors(network.state_dict(), later.state_dict())


@pytest.mark.parametrize("later", [False, True])
def test_a_frozen_trunk_stays_the_faces_alone_whenever_it_is_widened(later):
    with torch.device("meta"):
        network = FaceNet(None, dropout=0.0, freeze_until=UNTIL, crops=None if later else CROPS)
        if later:
            network.widen(CROPS)
    for _ in range(2):
        network.train()
        assert all(parameter.requires_grad for parameter in network.wide.parameters())
        assert all(module.training for module in network.wide.modules())
        for name, parameter in network.backbone.named_parameters():
            assert parameter.requires_grad == (name.split(".")[0] not in TRUNK), name
        for block, child in network.backbone.named_children():
            assert all(module.training == (block not in TRUNK) for module in child.modules()), block
        assert not any(module.training for module in network.eval().modules())


@torch.no_grad()
def test_with_two_crops_frozen_statistics_stay_and_all_of_the_wide_networks_move(saved, model, frames):
    network = FaceNet(saved, dropout=0.0, freeze_until=UNTIL, crops=CROPS).train()
    network(frames)
    before = dict(model.backbone.named_buffers())
    for name, buffer in network.backbone.named_buffers():
        assert torch.equal(buffer, before[name]) == (name.split(".")[0] in TRUNK), name
    assert not any(torch.equal(buffer, before[name]) for name, buffer in network.wide.named_buffers())


def test_a_state_dict_with_two_crops_gives_the_same_embeddings_again(two_crops, frames, tmp_path):
    path = save(two_crops.state_dict(), tmp_path / "wide.pt")
    torch.manual_seed(9)
    loaded = FaceNet(None, dropout=0.0, crops=CROPS).eval()
    with torch.inference_mode():
        assert not torch.allclose(loaded(frames), two_crops(frames), atol=1e-3)
        loaded.load_state_dict(torch.load(path, weights_only=True))
        assert same_tensors(loaded.state_dict(), two_crops.state_dict())
        assert torch.equal(loaded(frames), two_crops(frames))
    path.unlink()  # 190 MB


def test_a_network_without_crops_does_not_take_the_weights_of_one_with_them(two_crops, model):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*wide\."):
        copy.deepcopy(model).load_state_dict(two_crops.state_dict())


@torch.inference_mode()
def test_without_crops_images_are_faces_and_every_part_is_all_there_is(model, images):
    assert model.crops is None and model.wide is None
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone"}
    assert torch.equal(model.face(images), images)
    expected = F.normalize(model.backbone(images))
    for part in ("both", "face", "wide"):
        torch.testing.assert_close(model(images, part), expected, rtol=0, atol=1e-6)
    white = torch.full((1, 3, 80, 80), 127.5 / 128)
    assert model(white).norm().item() == pytest.approx(1, abs=1e-6)  # no gate here


@pytest.mark.parametrize("mirror", [False, True])
@torch.inference_mode()
def test_the_quality_is_the_norm_of_the_faces_features_before_they_are_normalized(two_crops, frames, mirror):
    asked = copy.deepcopy(two_crops).eval()
    asked.mirror = mirror
    norms = []
    asked.backbone.last_bn.register_forward_hook(lambda module, inputs, output: norms.append(output.norm(dim=1)))
    embedding, quality = asked(frames, "rated")
    torch.testing.assert_close(embedding, asked(frames), rtol=0, atol=1e-6)
    of_face = torch.stack(norms[: 1 + mirror]).mean(0)  # of the image, and of its mirror image
    torch.testing.assert_close(quality, of_face, rtol=1e-5, atol=0)
    assert quality.shape == (3,) and quality.dtype == torch.float32 and quality.unique().numel() == 3
    assert asked(frames.repeat(2, 1, 1, 1)[:4], "rated")[1].tolist() == pytest.approx(
        [*quality.tolist(), quality[0].item()], rel=1e-4
    )


@pytest.mark.parametrize("with_crops", [False, True])
@torch.inference_mode()
def test_a_mirrored_embedding_is_the_mean_of_an_image_and_its_mirror_image_and_knows_no_side(
    two_crops, model, frames, images, with_crops
):
    plain, asked = (two_crops, frames) if with_crops else (model, images)
    mirrored = copy.deepcopy(plain).eval()
    mirrored.mirror = True
    for part in ("face", "wide") if with_crops else ("face",):
        of_two = [F.normalize(plain(seen, part).double()) for seen in (asked, asked.flip(3))]
        assert (of_two[0] - of_two[1]).abs().max() > 1e-3  # a network alone does tell the sides apart
        expected = (of_two[0] + of_two[1]) / (of_two[0] + of_two[1]).norm(dim=1, keepdim=True)
        torch.testing.assert_close(mirrored(asked, part).double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(mirrored(asked), mirrored(asked.flip(3)), rtol=0, atol=1e-4)
    if with_crops:  # each part by its weight, as without a mirror: the gate is closed for one
        assert mirrored(asked)[:, :512].norm(dim=1).tolist() == pytest.approx(
            plain(asked)[:, :512].norm(dim=1).tolist(), abs=1e-6
        )
    in_training = mirrored.train()
    torch.manual_seed(0)
    found = in_training(asked)
    torch.manual_seed(0)
    again = copy.deepcopy(plain).train()(asked)
    torch.testing.assert_close(found, again, rtol=0, atol=1e-6)  # each image as it is drawn, then
