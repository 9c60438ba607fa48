"""Faster networks give the embeddings of the one that they are made from."""

import copy
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import FRAME, noise_frames, same_tensors, tell_apart, write_photo
from tiny_net import TinyNet
from torch import nn

import common
import evaluate
import fast
from common import UserError
from embedding import embed
from models import Crops, FaceNet, fingerprint
from transforms import eval_transform

SIZE = 80  # pixels; not the least that is allowed, 76, so that a wrong input size shows
CROPS = Crops(face=0.52, wide_size=76, wide_weight=0.3, hidden=0.65)
BURNT_ONE = 2  # which of `frames`


@pytest.fixture(scope="module")
def facenet() -> FaceNet:
    torch.manual_seed(0)
    return tell_apart(FaceNet(None, dropout=0.4), SIZE)


@pytest.fixture(scope="module")
def tiny() -> TinyNet:
    """A small network with all that FaceNet has around its backbone: crops, gate and mirror."""
    torch.manual_seed(0)
    return tell_apart(TinyNet(crops=CROPS, mirror=True), FRAME, 0.9)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return 2 * torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) - 1


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    """Five of noise; BURNT_ONE is white where the face would be."""
    return noise_frames(5, BURNT_ONE, seed=1)


@pytest.fixture(scope="module")
def content(facenet) -> bytes:
    pytest.importorskip("onnx")
    return fast.to_onnx(facenet, SIZE, {"fingerprint": fingerprint(facenet), "face_crop": 0.52})


@pytest.fixture(scope="module")
def tiny_content(tiny) -> bytes:
    pytest.importorskip("onnx")
    return fast.to_onnx(tiny, FRAME, {})


@pytest.fixture(params=[fast.OnnxFaceNet, fast.OpenVinoFaceNet], ids=lambda exported: exported.package)
def exported(request) -> type:
    """The two classes that run exported files."""
    pytest.importorskip("onnx")
    pytest.importorskip(request.param.package)
    return request.param


@torch.inference_mode()
def check_same(found: torch.Tensor, network: nn.Module, images: torch.Tensor) -> None:
    """Whether `found` is what `network` makes of `images`, which it does tell apart."""
    expected = network(images)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (1 - F.cosine_similarity(expected[:1], expected[1:])).max() > 1e-4
    assert (1 - F.cosine_similarity(found.double(), expected.double())).max() < 1e-6
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(images)), rtol=0, atol=1e-5)
    assert torch.equal(found[:, :512].norm(dim=1) == 0, expected[:, :512].norm(dim=1) == 0)  # by the gate


# --- torch ------------------------------------------------------------------------------------------------------------


def test_a_fused_network_has_no_batchnorm_and_no_gradient_and_gives_the_same_embeddings(facenet, images, frames):
    two_crops = copy.deepcopy(facenet)
    two_crops.widen(CROPS)
    for model, seen in ((facenet, images), (two_crops, frames)):
        network = fast.fused(model)
        assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training
        check_same(network(seen), model, seen)


def test_fusing_leaves_the_network_as_it_is(facenet):
    model = copy.deepcopy(facenet).train()
    fast.fused(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert same_tensors(model.state_dict(), facenet.state_dict())


def test_the_backend_torch_is_the_network_itself(facenet):
    assert fast.accelerated(facenet, "torch", SIZE, "cpu") is facenet


def test_the_compiled_backend_compiles_the_embedding_and_the_quality_of_the_fused_network(monkeypatch, tiny, frames):
    compiled, compile_function = [], torch.compile

    def without_a_compiler(function):
        compiled.append(function.__name__)
        return compile_function(function, backend="eager")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    common._try_compiler.cache_clear()
    network = fast.accelerated(tiny, "compiled", FRAME, "cpu")
    assert compiled == ["_double", "forward", "rated"]  # the first to see whether it works
    check_same(network(frames), tiny, frames)
    check_same(network.rated(frames)[0], tiny, frames)


def test_without_a_compiler_the_compiled_backend_is_refused_at_once(monkeypatch, facenet):
    def without_a_compiler(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", without_a_compiler)
    common._try_compiler.cache_clear()
    with pytest.raises(UserError) as error:
        fast.accelerated(facenet, "compiled", SIZE, "cpu")
    assert str(error.value).startswith(
        "BACKEND = 'compiled': torch.compile does not work here (InvalidCxxCompiler: No working C++ compiler found); "
        "install a C++ compiler (Linux: g++"
    )
    assert str(error.value).endswith("or set BACKEND = 'fused'") and "\n" not in str(error.value)


@pytest.mark.parametrize("backend, device", [("tensorrt", "cpu"), *((backend, "cuda:1") for backend in fast.PACKAGES)])
def test_a_backend_that_is_unknown_or_not_for_this_device_is_refused(facenet, backend, device):
    message = (
        "expected one of 'torch', 'fused', 'compiled'" if device == "cpu" else "runs on the CPU only, not on cuda:1"
    )
    with pytest.raises(UserError, match=f"BACKEND = '{backend}': {message}"):
        fast.accelerated(facenet, backend, SIZE, device)


def test_evaluate_refuses_a_backend_before_it_reads_a_photo(monkeypatch):
    monkeypatch.setattr(evaluate, "BACKEND", "onnxruntime")
    monkeypatch.setattr(evaluate, "check_constants", lambda: None)
    monkeypatch.setattr(evaluate, "scan_persons", lambda *_, **__: pytest.fail("photos were read"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"package onnx is not installed"):
        evaluate.main()


@pytest.mark.parametrize(
    "package, backend", [(package, backend) for backend, packages in fast.PACKAGES.items() for package in packages]
)
def test_a_missing_package_is_named_with_the_way_out(monkeypatch, facenet, package, backend):
    for needed in fast.PACKAGES[backend]:
        monkeypatch.setitem(sys.modules, needed, sys)  # none has to be installed
    monkeypatch.setitem(sys.modules, package, None)
    wanted = f"pip install {' '.join(fast.PACKAGES[backend])}, or set BACKEND = 'fused'"
    with pytest.raises(UserError, match=rf"^the package {package} is not installed \(.*\): {wanted}$"):
        fast.accelerated(facenet, backend, SIZE, "cpu")


def test_a_package_that_is_there_and_broken_is_named_too(monkeypatch, facenet):
    def broken(name):
        raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file")

    monkeypatch.setattr(common.importlib, "import_module", broken)
    message = "the package onnx cannot be imported (Descriptors cannot be created directly.): pip install --upgrade"
    with pytest.raises(UserError) as error:
        fast.accelerated(facenet, "onnxruntime", SIZE, "cpu")
    assert str(error.value) == f"{message} onnx onnxruntime, or set BACKEND = 'fused'"


def test_the_export_script_names_no_constant_that_it_does_not_have(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"^the package onnx is not installed \(.*\): pip install onnx onnxruntime$"):
        fast.to_onnx(tiny, FRAME, {})


# --- ONNX -------------------------------------------------------------------------------------------------------------


def metadata_of(exported: bytes) -> dict[str, str]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.parametrize("batch", [1, 5])
def test_an_exported_file_states_its_origin_and_runs_in_a_session_at_any_batch_size(content, facenet, images, batch):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert metadata_of(content) == {"fingerprint": fingerprint(facenet), "face_crop": "0.52", "image_size": str(SIZE)}
    found, _ = session.run(["embeddings", "quality"], {"images": images[:batch].numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(found), facenet(images[:batch]), rtol=0, atol=1e-5)


def test_an_exported_network_has_the_crops_the_gate_the_mirror_and_the_quality(tiny, tiny_content, frames, exported):
    network = exported(tiny_content)
    check_same(network(frames[:3].contiguous(memory_format=torch.channels_last)), tiny, frames[:3])
    for seen in (frames, frames[[BURNT_ONE]]):
        with torch.inference_mode():
            expected, expected_quality = tiny.rated(seen)
        embeddings, quality = network.rated(seen)
        torch.testing.assert_close(embeddings, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(quality, expected_quality, rtol=1e-4, atol=0)


def test_the_gate_of_an_exported_file_closes_where_torchs_does(tiny, tiny_content, exported):
    """64 of the face's 80 columns are just 0.8 of it: at 250 of 255, 64 leave the gate open and 65 close it."""
    frames = torch.zeros(4, 3, FRAME, FRAME)
    for frame, columns, level in zip(frames, (64, 65, 65, 80), (250, 250, 249, 250), strict=True):
        frame[:, 37:117, 37 : 37 + columns] = (level - 127.5) / 128
    found = exported(tiny_content)(frames)
    assert (found[:, :512].norm(dim=1) > 0.5).tolist() == [True, False, True, False]
    check_same(found, tiny, frames)


def test_embed_takes_an_exported_network_like_any_other(tmp_path, tiny, exported):
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        write_photo(path, (80 * number, 200 - 80 * number, 40), seed=number, side=160)
    transform, network = eval_transform(FRAME, 1.0), fast.accelerated(tiny, exported.package, FRAME, "cpu")
    found, expected = (embed(model, paths, transform, "cpu", batch_size=2) for model in (network, tiny))
    torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.quality, expected.quality, rtol=1e-4, atol=0)
    assert found.wide and expected.wide


def test_an_exported_network_takes_as_many_threads_as_torch(monkeypatch, tiny_content):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert fast.OnnxFaceNet(tiny_content).session.get_session_options().intra_op_num_threads == 3


# --- 8 bits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def int8():
    for package in fast.PACKAGES["openvino-int8"]:
        pytest.importorskip(package)


def test_eight_bits_give_nearly_the_embeddings_and_only_nearly(int8, facenet, images):
    network = fast.accelerated(facenet, "openvino-int8", SIZE, "cpu", list(images))
    nodes = [node.get_rt_info() for node in network.network.get_runtime_model().get_ops()]
    precisions = {node["runtimePrecision"].value for node in nodes if node["layerType"].value == "Convolution"}
    assert precisions <= {"i8", "u8"}, precisions
    with torch.inference_mode():
        found, expected = network(images), facenet(images)
    cosine = F.cosine_similarity(found, expected)
    assert cosine.min() > 0.9 and cosine.max() < 1 - 1e-5
    assert (found @ expected.T).argmax(1).tolist() == list(range(5))  # each is nearest to its own


def test_eight_bits_leave_the_gate_and_the_last_steps_exact_and_report_nothing(int8, monkeypatch, tiny, frames):
    monkeypatch.delenv("NNCF_CI", raising=False)
    found = fast.accelerated(tiny, "openvino-int8", FRAME, "cpu", list(frames))(frames)
    with torch.inference_mode():
        torch.testing.assert_close(found[:, :512].norm(dim=1), tiny(frames)[:, :512].norm(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)
    assert (found[BURNT_ONE, :512] == 0).all()
    assert os.environ["NNCF_CI"]  # without it nncf sends usage statistics


def test_eight_bits_reach_to_the_brightest_photo_correct_every_bias_and_spare_the_last_steps(
    int8, monkeypatch, tiny, frames
):
    nncf, seen = pytest.importorskip("nncf"), []
    quantize = nncf.quantize

    def watched(network, *arguments, **settings):
        seen.extend([network, quantize(network, *arguments, **settings)])
        return seen[-1]

    monkeypatch.setattr(nncf, "quantize", watched)
    photos = [*frames[:-1], 3 * frames[-1]]
    fast.accelerated(tiny, "openvino-int8", FRAME, "cpu", photos)
    before, after = (network.get_ops() for network in seen)
    sums = [op for op in before if op.get_type_name() == "Add" and op.get_friendly_name().endswith("/Conv")]
    assert sums and {op.input_value(1).get_node().get_type_name() for op in sums} == {"Constant"}
    quantized = [op for op in after if op.get_type_name() == "FakeQuantize"]
    upper = {op.input_value(0).get_node().get_type_name(): [] for op in quantized}
    for op in quantized:
        upper[op.input_value(0).get_node().get_type_name()].append(op.input_value(2).get_node().get_data().max())
    assert not {"Divide", "ReduceL2", "Add", "Multiply"} & upper.keys()  # of the embeddings and the quality
    assert max(upper["Slice"]) == pytest.approx(tiny.face(torch.stack(photos)).max().item(), rel=0.02)


def test_eight_bits_without_photos_are_refused(int8):
    with pytest.raises(UserError, match=r"BACKEND = 'openvino-int8': needs photos to fit its ranges to"):
        fast.accelerated(TinyNet().eval(), "openvino-int8", SIZE, "cpu", [])
