"""Faster embedding: a copy of the network with fused layers, a compiled one, and ONNX files with their runtimes."""

import copy
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from facenet_pytorch.models.inception_resnet_v1 import BasicConv2d, InceptionResnetV1
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from common import UserError, check_compiler, optional_package
from models import Crops, FaceNet

# Backends that run outside torch, on the CPU, and the optional packages that they need.
PACKAGES = {
    "onnxruntime": ("onnx", "onnxruntime"),
    "openvino": ("onnx", "openvino"),
    "openvino-int8": ("onnx", "openvino", "nncf"),
}
BACKENDS = ("torch", "fused", "compiled", *PACKAGES)
OPSET = 17  # ONNX version: runtimes since 2022 read it, and nothing here needs a later one
# Operations, by OpenVINO's names, that Int8FaceNet leaves in float32, besides FaceNet's own products.
EXACT = ["ReduceL2", "Divide", "Broadcast", "MatMul", "ReduceMean", "Interpolate", "AvgPool", "Unsqueeze"]
INPUT, OUTPUT, QUALITY = "images", "embeddings", "quality"  # names in the ONNX file


def accelerated(
    model: FaceNet,
    backend: str,
    image_size: int,
    device: torch.device | str,
    photos: Sequence[Tensor] | None = None,
) -> nn.Module:
    """`model` for embedding on `device`: the same embeddings but for rounding, in eval mode, without gradients.

    "torch" returns `model` itself. The others return copies, which later training of `model` does not change; for a
    gallery's made_by take the fingerprint of `model`.
    "fused": see `fused`. "compiled": that through torch.compile, which needs a C++ compiler and takes about a minute at
    the first batch, and again at the first batch of another size. On the CPU only: "onnxruntime", see OnnxFaceNet;
    "openvino", see OpenVinoFaceNet; "openvino-int8", see Int8FaceNet, which needs `photos` and whose embeddings differ.
    Raises what check_backend raises.
    """
    check_backend(backend, device)
    if backend == "torch":
        return model
    if backend in PACKAGES:
        exported = to_onnx(model, image_size, metadata={})
        if backend == "openvino-int8":
            network = Int8FaceNet(exported, photos)
        else:
            network = OnnxFaceNet(exported) if backend == "onnxruntime" else OpenVinoFaceNet(exported)
        network.crops = model.crops
        return network
    network = fused(model).to(device)
    if backend == "compiled":
        network.forward = torch.compile(network.forward)
        network.rated = torch.compile(network.rated)  # what embedding.embed calls
    return network


def check_backend(backend: str, device: torch.device | str) -> None:
    """Raises UserError if `backend` is unknown or cannot work on `device`, or if what it needs is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"BACKEND = {backend!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    if backend in PACKAGES and torch.device(device).type != "cpu":
        raise UserError(
            f"BACKEND = {backend!r}: runs on the CPU only, not on {device}; set BACKEND = 'fused' or 'compiled'"
        )
    for package in PACKAGES.get(backend, ()):
        optional_package(package, PACKAGES[backend], ", or set BACKEND = 'fused'")
    if backend == "compiled":
        check_compiler(device, setting="BACKEND = 'compiled'", way_out="BACKEND = 'fused'")


# --- torch ------------------------------------------------------------------------------------------------------------


def fused(model: FaceNet) -> FaceNet:
    """A copy of `model` in eval mode and channels_last, without gradients; each BatchNorm of an InceptionResnetV1 is
    folded into the layer before it.

    In eval mode BatchNorm of x = W z is y = g (x - mean) / sqrt(var + eps) + b, which equals y = W' z + b' with
    W' = g W / sqrt(var + eps), b' = b - g mean / sqrt(var + eps).
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        if isinstance(module, InceptionResnetV1):
            module.last_linear = fuse_linear_bn_eval(module.last_linear, module.last_bn)
            module.last_bn = nn.Identity()
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


# --- ONNX -------------------------------------------------------------------------------------------------------------


def to_onnx(model: FaceNet, image_size: int, metadata: Mapping[str, object]) -> bytes:
    """`model`, fused, as the bytes of an ONNX file.

    Input "images": (B, 3, image_size, image_size) float32, any B >= 1, as transforms.eval_transform gives them: RGB,
    (x - 127.5) / 128. Outputs "embeddings": (B, D) float32, rows of norm 1, and "quality": (B,) float32, see
    FaceNet.rated.
    metadata: fingerprint, face_crop and the like, kept as strings in metadata_props; image_size is added.
    Raises UserError if the package onnx is not installed.
    """
    onnx = optional_package("onnx", PACKAGES["onnxruntime"])
    network = fused(model).cpu().to(memory_format=torch.contiguous_format)
    example, file = torch.zeros(2, 3, image_size, image_size), io.BytesIO()
    with warnings.catch_warnings():
        # Deprecated, but the same in every torch since 2.5, and its successor needs another package, onnxscript.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Rated(network),
            (example,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT, QUALITY],
            dynamic_axes={name: {0: "B"} for name in (INPUT, OUTPUT, QUALITY)},
        )
    graph = onnx.load_from_string(file.getvalue())
    columns = graph.graph.output[0].type.tensor_type.shape.dim[1]
    columns.dim_value = network(example).shape[1]  # the tracer loses it in the normalization
    props = {name: str(value) for name, value in metadata.items()} | {"image_size": str(image_size)}
    onnx.helper.set_model_props(graph, props)
    onnx.checker.check_model(graph)
    return graph.SerializeToString()


class _Rated(nn.Module):
    """Both outputs of a FaceNet: the exporter calls forward()."""

    def __init__(self, network: FaceNet):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.rated(images)


class _Exported(nn.Module):
    """What to_onnx returns, run outside torch: on the CPU, with as many threads as torch.

    Images (B, 3, image_size, image_size) float32 on the CPU, of any memory format, B >= 1 -> embeddings (B, D) float32
    of norm 1, without gradients. Raises UserError if the runtime is not installed.
    """

    memory_format = torch.contiguous_format  # what the runtimes take without a copy
    rates = True  # has rated()
    crops: Crops | None = None  # of the FaceNet that was exported
    package: str  # of the runtime

    def __init__(self, exported: bytes):
        super().__init__()
        self._load(optional_package(self.package, PACKAGES["onnxruntime"]), exported)

    def _load(self, runtime: ModuleType, exported: bytes) -> None:
        raise NotImplementedError

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        """Embeddings and quality."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return self.rated(images)[0]

    def rated(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As FaceNet.rated."""
        embeddings, quality = self._run(images.float().contiguous().numpy())
        return torch.from_numpy(embeddings), torch.from_numpy(quality)


class OnnxFaceNet(_Exported):
    """A network run by onnxruntime, see _Exported."""

    package = "onnxruntime"

    def _load(self, runtime: ModuleType, exported: bytes) -> None:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only, and those are raised
        self.session = runtime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        return self.session.run([OUTPUT, QUALITY], {INPUT: images})


class OpenVinoFaceNet(_Exported):
    """A network run by OpenVINO in float32, see _Exported."""

    package = "openvino"

    def _load(self, runtime: ModuleType, exported: bytes) -> None:
        core = runtime.Core()
        network = self._prepared(core.read_model(io.BytesIO(exported)))
        # By default it computes in bfloat16 on CPUs that can: three digits instead of seven.
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.network = core.compile_model(network, "CPU", options)

    def _prepared(self, network: object) -> object:
        """The openvino.Model that is run in place of `network`."""
        return network

    def _run(self, images: np.ndarray) -> list[np.ndarray]:
        outputs = self.network(images)
        return [outputs[name].copy() for name in (OUTPUT, QUALITY)]  # the next call writes into the same memory


class Int8FaceNet(OpenVinoFaceNet):
    """A network run by OpenVINO in 8-bit integers, by NNCF's post-training quantization; see _Exported.

    Much faster, but the embeddings differ: measure what that costs. photos: some hundred images
    (3, image_size, image_size) like those that will be embedded, which the quantization is calibrated on.
    Raises UserError without photos.
    """

    def __init__(self, exported: bytes, photos: Sequence[Tensor] | None):
        if not photos:
            raise UserError("BACKEND = 'openvino-int8': needs photos to fit its ranges to, and got none")
        self._photos = photos
        super().__init__(exported)

    def _prepared(self, network: object) -> object:
        nncf = optional_package("nncf", PACKAGES["openvino-int8"])
        logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level() would silence other packages too
        # A bias read from ONNX is an expression of the shape; NNCF corrects constants only, and passes over the rest.
        passes = optional_package("openvino.passes", PACKAGES["openvino-int8"])
        folding = passes.Manager()
        folding.register_pass(passes.ConstantFolding())
        folding.run_passes(network)
        images = nncf.Dataset(self._photos, lambda image: {INPUT: image[None].numpy()})
        # The convolutions take the time. What turns their results into an embedding, gate included, stays exact.
        exact = nncf.IgnoredScope(types=EXACT, patterns=["^(/network)?/(Mul|Add).*"], validate=False)
        return nncf.quantize(
            network,
            images,
            preset=nncf.QuantizationPreset.MIXED,  # for activations that are not symmetric around 0, as after a ReLU
            subset_size=len(self._photos),
            ignored_scope=exact,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                # By default means over the photos, which cut off what strong distortions bring.
                activations_range_estimator_params=nncf.quantization.range_estimator.RangeEstimatorParametersSet.MINMAX
            ),
        )
