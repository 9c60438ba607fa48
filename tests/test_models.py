import copy
import http.client
import io
import pickle
import socket
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import MakesFolderWhenLoaded, same_tensors
from PIL import Image

from datasets import eval_transform
from models import BLOCKS, EMBEDDING_DIM, PRETRAINED_URLS, FaceNet, load_pretrained

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
    with pytest.raises(FileNotFoundError) as error:
        FaceNet(missing, dropout=0.0)
    assert f"PRETRAINED = {str(missing)!r}: no such file" in str(error.value)
    assert "'vggface2' or 'casia-webface', or None" in str(error.value)


@pytest.mark.parametrize("name", ["vggface", "VGGFace2", ""])
def test_a_misspelt_name_is_told_with_the_choices(name):
    with pytest.raises(FileNotFoundError, match=rf"PRETRAINED = '{name}': no such file; .*'vggface2'"):
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
    with pytest.raises(ConnectionError) as error:
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
    with pytest.raises(ConnectionError, match="reset by peer"):
        FaceNet("vggface2", dropout=0.0)
    assert list(cache.iterdir()) == []


def test_a_download_that_ends_early_without_an_error_is_not_taken_for_whole(real_download, cache, monkeypatch):
    """http.client says nothing where a server closes before the promised length, nor does torch."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", real_download)
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Answer(1000, None))
    with pytest.raises((ConnectionError, ValueError)) as error:
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
