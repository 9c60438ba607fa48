"""Faster networks give the embeddings of the one they are made from; ONNX files are whole, told apart and checked."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import FRAME, TinyNet, noise_frames, tell_apart, write_photo
from torch import nn

import checkpoints
import fast
from common import UserError
from gallery import embed
from models import Crops, FaceNet, fingerprint
from tools import export_onnx
from transforms import eval_transform

SIZE = 80  # pixels: 76 is the least, and a tight size would hide an input size that is not looked at


@pytest.fixture(scope="module")
def facenet() -> FaceNet:
    """A random network that tells images apart: BatchNorm has the statistics of some, not the first 0 and 1."""
    torch.manual_seed(0)
    return tell_apart(FaceNet(None, dropout=0.4), SIZE)


@pytest.fixture(scope="module")
def content(facenet) -> bytes:
    pytest.importorskip("onnx")
    return fast.to_onnx(facenet, SIZE, {"fingerprint": fingerprint(facenet), "face_crop": 0.52})


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return 2 * torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 1


@pytest.fixture(scope="module")
def expected(facenet, images) -> torch.Tensor:
    with torch.inference_mode():
        return facenet(images)


def greatest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """By 1 - cosine, and sure that the images are told apart at all."""
    assert (1 - F.cosine_similarity(theirs[:1], theirs[1:])).max() > 1e-4
    return (1 - F.cosine_similarity(ours.double(), theirs.double())).max().item()


# --- torch ------------------------------------------------------------------------------------------------------------


def test_a_fused_network_has_no_batchnorm_left_takes_no_gradient_and_gives_the_same_embeddings(
    facenet, images, expected
):
    network = fast.fused(facenet)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training
    found = network(images)
    assert greatest_difference(found, expected) < 1e-6
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)


def test_fusing_leaves_the_network_as_it_is(facenet):
    before = copy.deepcopy(facenet.state_dict())
    model = copy.deepcopy(facenet).train()
    fast.fused(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_fused_network_can_be_fused_again(facenet, images, expected):
    assert greatest_difference(fast.fused(fast.fused(facenet))(images), expected) < 1e-6


def test_a_network_of_another_kind_is_copied_as_it_is():
    model, images = TinyNet().eval(), torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(fast.fused(model)(images), model(images))


def test_the_backend_torch_is_the_network_itself(facenet):
    assert fast.accelerated(facenet, "torch", SIZE, "cpu") is facenet


def test_the_compiled_backend_compiles_the_fused_network(monkeypatch):
    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_network(network, backend="eager"))  # no C++ compiler
    model, images = TinyNet().eval(), torch.rand(2, 3, 40, 40)
    network = fast.accelerated(model, "compiled", 40, "cpu")
    assert isinstance(network, torch._dynamo.OptimizedModule)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(network(images), model(images))


def test_an_unknown_backend_is_refused_with_the_known_ones(facenet):
    with pytest.raises(ValueError, match=r"BACKEND = 'tensorrt': expected one of 'torch', 'fused', .*'onnxruntime'"):
        fast.accelerated(facenet, "tensorrt", SIZE, "cpu")


@pytest.mark.parametrize("backend", fast.PACKAGES)
def test_a_runtime_of_the_cpu_is_refused_on_a_gpu(facenet, backend):
    with pytest.raises(ValueError, match=rf"{backend}.*on the CPU only, not on cuda:1; set BACKEND = 'fused'"):
        fast.accelerated(facenet, backend, SIZE, "cuda:1")


@pytest.mark.parametrize(
    "package, backend",
    [
        *(("onnx", "onnxruntime"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")),
        *(("openvino", "openvino-int8"), ("nncf", "openvino-int8")),
    ],
)
def test_a_missing_package_is_named_with_the_way_out(monkeypatch, facenet, package, backend):
    for needed in fast.PACKAGES[backend]:
        monkeypatch.setitem(sys.modules, needed, sys)  # none has to be installed
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"package {package} is not installed .*pip install onnx .*BACKEND = 'fused'"):
        fast.accelerated(facenet, backend, SIZE, "cpu")


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[fast.OnnxFaceNet, fast.OpenVinoFaceNet], ids=lambda exported: exported.package)
def exported(request) -> type:
    """The two classes that run exported files."""
    pytest.importorskip("onnx")
    pytest.importorskip(request.param.package)
    return request.param


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_exported_file_gives_the_same_embeddings_at_any_batch_size(
    tmp_path, content, facenet, images, expected, batch
):
    runtime = pytest.importorskip("onnxruntime")
    (tmp_path / "facenet.onnx").write_bytes(content)
    session = runtime.InferenceSession(tmp_path / "facenet.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["embeddings"], {"images": images[:batch].numpy()})
    assert found.shape == (batch, 512) and found.dtype == "float32"
    cosine = F.cosine_similarity(torch.from_numpy(found).double(), expected[:batch].double())
    assert (1 - cosine).max() < 1e-6
    assert torch.from_numpy(found).norm(dim=1).tolist() == pytest.approx([1.0] * batch, abs=1e-6)


def test_an_exported_file_knows_whose_it_is_and_what_it_takes(content, facenet):
    pytest.importorskip("onnxruntime")
    network = fast.OnnxFaceNet(content, SIZE)
    assert network.metadata == {"fingerprint": fingerprint(facenet), "face_crop": "0.52", "image_size": str(SIZE)}
    assert network.image_size == SIZE


def test_embed_takes_an_onnx_network_like_any_other(tmp_path, facenet, exported):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        write_photo(path, (80 * number, 200 - 80 * number, 40), seed=number, side=90)
    transform = eval_transform(SIZE, 1.0)
    network = fast.accelerated(facenet, exported.package, SIZE, "cpu")
    found = embed(network, paths, transform, "cpu", batch_size=2).embeddings  # the last batch is smaller
    assert greatest_difference(found, embed(facenet, paths, transform, "cpu").embeddings) < 1e-6


def test_an_onnx_network_is_not_confused_by_the_memory_format(content, images, expected, exported):
    network = exported(content, SIZE)
    found = network(images.contiguous(memory_format=torch.channels_last))
    assert greatest_difference(found, expected) < 1e-6


def test_an_onnx_network_takes_as_many_threads_as_torch(monkeypatch, content):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert fast.OnnxFaceNet(content, SIZE).session.get_session_options().intra_op_num_threads == 3


def test_an_onnx_network_gives_no_embedding_for_no_image(content, exported):
    assert exported(content, SIZE)(torch.empty(0, 3, SIZE, SIZE)).shape == (0, 512)


def test_two_onnx_networks_of_different_weights_have_different_fingerprints(exported):
    networks = [fast.accelerated(TinyNet().eval(), exported.package, SIZE, "cpu") for _ in range(2)]
    assert fingerprint(networks[0]) != fingerprint(networks[1])


def test_images_of_another_size_are_refused(content, exported):
    network = exported(content, SIZE)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 160, 160\) on cpu: expected \(B, 3, 80, 80\) on the CPU"):
        network(torch.zeros(2, 3, 160, 160))


def test_a_file_of_another_image_size_is_refused(content, tmp_path, exported):
    (tmp_path / "facenet.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"facenet\.onnx: takes images of 80 x 80 pixels, .* here is 160"):
        exported(tmp_path / "facenet.onnx", 160)


@pytest.mark.parametrize("junk", [b"", b"not a network", bytes(1000)])
def test_what_is_not_an_onnx_file_is_refused(tmp_path, junk, exported):
    (tmp_path / "junk.onnx").write_bytes(junk)
    with pytest.raises(
        ValueError, match=r"junk\.onnx: not an ONNX file that (onnxruntime|openvino) can run \(.*export_onnx\.py"
    ):
        exported(tmp_path / "junk.onnx", SIZE)


def test_a_cut_onnx_file_is_refused(content, tmp_path, exported):
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.onnx: not an ONNX file that (onnxruntime|openvino) can run"):
        exported(tmp_path / "cut.onnx", SIZE)


def test_an_onnx_file_of_another_network_is_refused(tmp_path, exported):
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"other\.onnx: an ONNX file, but not a FaceNet of export_onnx\.py"):
        exported(tmp_path / "other.onnx", SIZE)


def test_a_missing_onnx_file_is_named(tmp_path, exported):
    with pytest.raises(UserError, match=r"none\.onnx: no such file; export_onnx\.py writes it"):
        exported(tmp_path / "none.onnx", SIZE)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def int8():
    for package in fast.PACKAGES["openvino-int8"]:
        pytest.importorskip(package)


def test_eight_bits_give_nearly_the_embeddings_and_only_nearly(int8, facenet, images, expected):
    network = fast.accelerated(facenet, "openvino-int8", SIZE, "cpu", list(images))
    precisions = {node.get_rt_info()["runtimePrecision"].value for node in network.network.get_runtime_model().get_ops()
                  if node.get_rt_info()["layerType"].value == "Convolution"}  # fmt: skip
    assert precisions <= {"i8", "u8"}, precisions
    found = network(images)
    assert found.shape == expected.shape and found.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    cosine = F.cosine_similarity(found, expected)
    assert cosine.min() > 0.9 and cosine.max() < 1 - 1e-5
    assert (found @ expected.T).argmax(1).tolist() == list(range(5))  # each is nearest to its own


def test_eight_bits_leave_the_gate_and_the_last_steps_exact(int8, two_crops, frames, of_frames):
    found = fast.accelerated(two_crops, "openvino-int8", FRAME, "cpu", list(frames))(frames)
    assert (found[:, :512].norm(dim=1) == 0).tolist() == (of_frames[:, :512].norm(dim=1) == 0).tolist()
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert found[:, :512].norm(dim=1).tolist() == pytest.approx(of_frames[:, :512].norm(dim=1).tolist(), abs=1e-5)


def test_eight_bits_without_photos_are_refused(int8):
    for none in (None, []):
        with pytest.raises(ValueError, match=r"BACKEND = 'openvino-int8': needs photos to fit its ranges to"):
            fast.accelerated(TinyNet().eval(), "openvino-int8", SIZE, "cpu", none)


def test_the_quantizer_reports_to_nobody(int8, monkeypatch):
    monkeypatch.delenv("NNCF_CI", raising=False)
    fast._package("nncf")
    assert os.environ["NNCF_CI"]


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch, tmp_path):
    """export_onnx.py on TinyNet, from random weights."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(checkpoints, "FaceNet", TinyNet)
    constants = {"CHECKPOINT": None, "PRETRAINED": None, "IMAGE_SIZE": SIZE, "FACE_CROP": 0.8}
    for name, value in (constants | {"OUT": tmp_path / "out" / "tiny.onnx"}).items():
        monkeypatch.setattr(export_onnx, name, value)
    return export_onnx


def test_the_script_writes_a_file_that_it_has_compared_with_torch(script, capsys):
    cosine, absolute = script.main()
    assert cosine < 1e-6 and absolute < 1e-5
    told = capsys.readouterr().out
    assert "8 images in batches of 1, 2, 5" in told and "(x - 127.5) / 128" in told
    assert "the centre square of 0.8 of the photo's shorter side, resized to 80 x 80" in told
    metadata = fast.OnnxFaceNet(script.OUT, SIZE).metadata
    assert metadata["stage"] == "0" and metadata["face_crop"] == "0.8" and len(metadata["fingerprint"]) == 16


def test_the_script_exports_a_checkpoint_with_its_own_size_and_crop(script, tiny_runs, monkeypatch):
    stage1, _ = tiny_runs
    monkeypatch.setattr(stage1, "EPOCHS", 1)
    stage1.main()
    monkeypatch.setattr(script, "CHECKPOINT", stage1.RUN_DIR / "best.pt")
    script.main()
    model, _ = checkpoints.load_facenet(script.CHECKPOINT, "cpu")
    metadata = fast.OnnxFaceNet(script.OUT, 76).metadata  # 76 and 0.8: of tiny_runs
    assert metadata["image_size"] == "76" and metadata["face_crop"] == "0.8" and metadata["stage"] == "1"
    assert metadata["fingerprint"] == fingerprint(model)


def test_the_script_writes_nothing_when_the_embeddings_differ(script, monkeypatch):
    class Other(fast.OnnxFaceNet):
        def forward(self, images):
            return F.normalize(super().forward(images) + 0.01)

    monkeypatch.setattr(script, "OnnxFaceNet", Other)
    with pytest.raises(ValueError, match=r"tiny\.onnx: not written, its embeddings differ from torch's by .*TOLERANCE"):
        script.main()
    assert not script.OUT.exists()


def test_a_failed_export_leaves_the_earlier_file(script, monkeypatch):
    from google.protobuf.message import DecodeError

    script.main()
    first = script.OUT.read_bytes()
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: args[2].write(b"half a fi"))
    with pytest.raises(DecodeError):
        script.main()
    assert script.OUT.read_bytes() == first
    assert [file.name for file in script.OUT.parent.iterdir()] == ["tiny.onnx"]


def test_the_script_writes_nothing_when_an_embedding_is_not_a_number(script, monkeypatch):
    monkeypatch.setattr(script, "differences", lambda *args: (float("nan"), 0.0))
    with pytest.raises(ValueError, match=r"differ from torch's by nan"):
        script.main()
    assert not script.OUT.exists()


# --- two crops --------------------------------------------------------------------------------------------------------

BURNT_ONE = 2  # which of `frames`


@pytest.fixture(scope="module")
def two_crops() -> FaceNet:
    """As `facenet`, with another network for the whole frame."""
    torch.manual_seed(0)
    return tell_apart(FaceNet(None, dropout=0.4, crops=Crops(face=0.52, wide_size=76, wide_weight=0.3)), FRAME, 0.9)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Five of noise; BURNT_ONE is white where the face would be."""
    return noise_frames(5, BURNT_ONE, seed=1)


@pytest.fixture(scope="module")
def of_frames(two_crops, frames) -> torch.Tensor:
    """What torch makes of them: the gate closed for the burnt one, and for no other."""
    with torch.inference_mode():
        embeddings = two_crops(frames)
    assert embeddings.shape == (5, 1024)
    assert (embeddings[:, :512].norm(dim=1) < 0.5).nonzero().flatten().tolist() == [BURNT_ONE]
    return embeddings


@pytest.fixture(scope="module")
def wide_content(two_crops) -> bytes:
    pytest.importorskip("onnx")
    return fast.to_onnx(two_crops, FRAME, {"fingerprint": fingerprint(two_crops), "face_crop": 1.0})


def check_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4, by the closed gate 0 to the bit, and sure that both halves tell the images apart."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4
    assert (found[BURNT_ONE, :512] == 0).all()
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * len(expected), abs=1e-5)
    for half in (expected[:2, :512], expected[:, 512:]):
        assert (half[0] - half[1]).abs().max() > 1e-3
    assert greatest_difference(found, expected) < 1e-6


def test_a_fused_network_of_two_crops_has_both_fused_and_gives_the_same_embeddings(two_crops, frames, of_frames):
    network = fast.fused(two_crops)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert isinstance(two_crops.wide.last_bn, nn.BatchNorm1d)  # the network itself is left as it is
    check_same(network(frames), of_frames)
    for part in ("face", "wide"):
        with torch.inference_mode():
            assert (network(frames, part) - two_crops(frames, part)).abs().max() < 1e-4


def test_an_exported_file_of_two_crops_gives_the_same_1024_numbers_gate_included(
    wide_content, frames, of_frames, exported
):
    network = exported(wide_content, FRAME)
    check_same(network(frames), of_frames)
    check_same(network(frames[: BURNT_ONE + 1]), of_frames[: BURNT_ONE + 1])  # at another batch size
    alone = network(frames[[BURNT_ONE]])
    assert (alone[0, :512] == 0).all() and (alone[0] - of_frames[BURNT_ONE]).abs().max() < 1e-4


def test_the_quality_is_the_same_fused_and_exported(two_crops, frames, wide_content, exported):
    with torch.inference_mode():
        _, expected = two_crops(frames, "rated")
    for network in (fast.fused(two_crops), exported(wide_content, FRAME)):
        embedding, quality = network(frames, "rated")
        assert network.rates and embedding.shape == (5, 1024)
        torch.testing.assert_close(quality, expected, rtol=1e-4, atol=0)
    embedding, quality = exported(wide_content, FRAME)(frames[:0], "rated")
    assert embedding.shape == (0, 1024) and quality.shape == (0,)


def test_a_file_without_the_quality_is_run_all_the_same(images, exported):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 512))
    found = exported(fast.to_onnx(network, SIZE, {}), SIZE)
    assert not found.rates
    torch.testing.assert_close(found(images), network(images), rtol=0, atol=1e-5)


def test_the_gate_of_an_exported_file_is_drawn_where_torchs_is(two_crops, wide_content, exported):
    """24 of the face's 80 columns are just 0.3 of it: at 250 of 255, 24 leave the gate open and 25 close it."""
    frames = torch.zeros(4, 3, FRAME, FRAME)
    for frame, columns, level in zip(frames, (24, 25, 25, 80), (250, 250, 249, 250), strict=True):
        frame[:, 37:117, 37 : 37 + columns] = (level - 127.5) / 128
    with torch.inference_mode():
        expected = two_crops(frames)
    found = exported(wide_content, FRAME)(frames)
    assert (found[:, :512].norm(dim=1) > 0.5).tolist() == [True, False, True, False]
    assert (found - expected).abs().max() < 1e-4


def test_an_exported_file_of_two_crops_gives_1024_columns_for_no_image_and_knows_its_size(wide_content, two_crops):
    pytest.importorskip("onnxruntime")
    network = fast.OnnxFaceNet(wide_content, FRAME)
    assert network(torch.empty(0, 3, FRAME, FRAME)).shape == (0, 1024)
    assert network.metadata == {"fingerprint": fingerprint(two_crops), "face_crop": "1.0", "image_size": str(FRAME)}
    with pytest.raises(ValueError, match=rf"expected \(B, 3, {FRAME}, {FRAME}\) on the CPU"):
        network(torch.zeros(1, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match=rf"takes images of {FRAME} x {FRAME} pixels, .* here is {SIZE}"):
        fast.OnnxFaceNet(wide_content, SIZE)


def test_a_mirrored_network_is_mirrored_fused_and_exported_too(two_crops, frames, of_frames, exported):
    mirrored = copy.deepcopy(two_crops)
    mirrored.mirror = True
    with torch.inference_mode():
        expected = mirrored(frames)
    assert greatest_difference(expected, of_frames) > 1e-3
    check_same(fast.fused(mirrored)(frames), expected)
    check_same(exported(fast.to_onnx(mirrored, FRAME, {}), FRAME)(frames), expected)


@pytest.mark.parametrize("width", [256, 1536])
def test_a_file_whose_embeddings_are_neither_512_nor_1024_wide_is_refused(width, exported):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, width))
    content = fast.to_onnx(network, SIZE, {})
    with pytest.raises(ValueError, match=r"an ONNX file, but not a FaceNet of export_onnx\.py; found .*" + str(width)):
        exported(content, SIZE)
