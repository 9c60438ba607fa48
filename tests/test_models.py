"""FaceNet: its embeddings, frozen blocks, crops, gate, quality and mirror."""

import copy
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FRAME, noise_frames, same_tensors, tell_apart
from PIL import Image

from backbones import BACKBONES
from common import UserError
from distortions import DISTORTIONS
from models import Crops, FaceNet
from transforms import eval_transform

BLOCKS = BACKBONES["facenet"].blocks
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


def is_unit(embeddings: torch.Tensor) -> bool:
    norms = embeddings.norm(dim=1)
    return embeddings.dtype == torch.float32 and torch.allclose(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


# --- from image to embedding ------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_an_embedding_has_512_numbers_and_norm_1_and_differs_between_images(model, images):
    embeddings = model(images)
    assert embeddings.shape == (2, 512) and model.dim == 512 and is_unit(embeddings)
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
        (lambda: Crops(0.95, 112, 0.3, 0.95), "WIDE_WEIGHT: of the side of a frame, 0.95 are hidden"),
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


@torch.inference_mode()
def test_the_network_of_the_frame_does_not_see_its_centre(frames):
    network = tell_apart(FaceNet(None, dropout=0.0, crops=Crops(0.52, 76, 0.3, hidden=0.65)), FRAME, 0.9).eval()
    burnt, around = frames.clone(), frames.clone()
    burnt[..., 27:127, 27:127] = 1.0  # 100 of the 154 pixels
    around[..., 27:128, 26:127] = 1.0  # one row and one column more
    wide, wide_of_burnt, other = (network(images, "wide") for images in (frames, burnt, around))
    assert torch.equal(wide, wide_of_burnt) and not torch.equal(wide, other)
    assert not torch.equal(network(frames, "face"), network(burnt, "face"))
    assert (network.whole(burnt)[..., 14:62, 14:62] == 0).all()  # grey, within the 49.4 pixels that the 100 become


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
