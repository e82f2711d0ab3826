"""Group normalisations as nodes of TensorRT 8.6's plugin: the same arithmetic, and only where the plugin serves."""

import re
from dataclasses import dataclass
from pathlib import Path

import factories
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn
from trt_fakes import fake_library

from sdtrt.backends.tensorrt.build import Request
from sdtrt.backends.tensorrt.versions import building
from sdtrt.backends.tensorrt86 import norm_plugin
from sdtrt.backends.tensorrt86.worker import _parse
from sdtrt.exports import onnx_file, onnx_simplify
from sdtrt.exports.component import write_onnx
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes
from sdtrt.specs.contract import Contract, unet_contract

# The smallest UNet with Stable Diffusion's own width.
SMALLEST = {
    "block_out_channels": (320,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": None,
    "layers_per_block": 1,
    "sample_size": 8,
}


class GroupNorm(OpRun):
    """What the plugin computes, by its source: in fp32, the variance in one pass and without the epsilon."""

    op_domain = ""

    def _run(self, x, scale, shift, epsilon=None, bSwish=None, plugin_version=None):  # noqa: N803  # the plugin's name
        assert plugin_version == "1"
        assert scale.dtype == shift.dtype == np.float32
        groups = torch.from_numpy(x).float().view(x.shape[0], norm_plugin.GROUPS, -1)
        mean = groups.mean(-1, keepdim=True)
        variance = (groups * groups).mean(-1, keepdim=True) - mean * mean
        normal = ((groups - mean) * torch.where(variance > 0, torch.rsqrt(variance), 1.0)).view(x.shape)
        result = normal * torch.from_numpy(scale).view(1, -1, 1, 1) + torch.from_numpy(shift).view(1, -1, 1, 1)
        return ((nn.functional.silu(result) if bSwish else result).to(torch.float16).numpy(),)


def trained(module):
    """Scales and shifts as after training; those of a new module are ones and zeros."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module


@dataclass(frozen=True)
class Exported:
    """A UNet, its contract and its ONNX file."""

    unet: nn.Module
    contract: Contract
    path: Path


@pytest.fixture(scope="module")
def wide_onnx(tmp_path_factory):
    """A UNet whose norms the plugin serves."""
    unet = trained(factories.small_unet("sd1", **SMALLEST)).half()
    it = Exported(unet, unet_contract(dict(unet.config), "fp16"), tmp_path_factory.mktemp("wide") / "model.onnx")
    write_onnx(it.unet, it.contract, it.path)
    return it


def exported(module, path, channels):
    sample = torch.randn(2, channels, 6, 5).half()
    names = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "B", 2: "H", 3: "W"}}}
    torch.onnx.export(module, (sample,), str(path), dynamo=False, opset_version=17, **names)
    model, weights = onnx_file.load_split(path)
    onnx_simplify.simplify(model, weights)
    return model, weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("channels", "swish"), [(320, True), (320, False), (960, True), (1280, True), (2560, True)])
def test_the_plugin_gets_the_same_arithmetic(tmp_path, channels, swish):
    """On groups that vary: the plugin has no epsilon. Large scales lie apart from the graph."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(32, channels, eps=1e-6)
    module = trained(nn.Sequential(norm, nn.SiLU() if swish else nn.Tanh())).half().eval()
    model, weights = exported(module, tmp_path / "norm.onnx", channels)
    assert norm_plugin.use_plugin(model, weights) == 1
    (node,) = [node for node in model.graph.node if node.op_type == "GroupNorm"]
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {"epsilon": pytest.approx(1e-6), "bSwish": int(swish), "plugin_version": b"1"}
    assert [node.op_type for node in model.graph.node] == ["GroupNorm"] + ([] if swish else ["Tanh"])
    onnx_file.save(model, weights, tmp_path / "plugin.onnx")
    sample = 3 * torch.randn(2, channels, 9, 4).half() + 1
    evaluator = ReferenceEvaluator(str(tmp_path / "plugin.onnx"), new_ops=[GroupNorm])
    (found,) = evaluator.run(None, {"x": sample.numpy()})
    with torch.no_grad():
        expected = module.float()(sample.float())
    assert np.allclose(found.astype(np.float32), expected.numpy(), atol=4e-3, rtol=2e-3)


def test_the_norms_of_a_unet_are_replaced_and_nothing_else(wide_onnx):
    unet, path = wide_onnx.unet, wide_onnx.path
    model, weights = onnx_file.load_split(path)
    before = [node.op_type for node in model.graph.node]
    norms = {name: part for name, part in unet.named_modules() if isinstance(part, nn.GroupNorm)}
    assert norm_plugin.use_plugin(model, weights) == len(norms) == before.count("InstanceNormalization")
    after = [node.op_type for node in model.graph.node]
    assert "InstanceNormalization" not in after
    for operator in ("Conv", "MatMul", "Softmax", "LayerNormalization", "Resize"):
        assert after.count(operator) == before.count(operator)
    # A transformer's own norm has no SiLU after it; each of a resnet's, and the last one, has.
    replaced = [node for node in model.graph.node if node.op_type == "GroupNorm"]
    plain = [node for node in replaced if not next(a.i for a in node.attribute if a.name == "bSwish")]
    assert len(plain) == sum(".attentions." in name for name in norms)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.raw_data}
    scales = {name: value for name, value in tensors.items() if re.fullmatch(r"group_norm\.\d+\.scale", name)}
    wanted = {tuple(norm.weight.float().tolist()) for norm in norms.values()}
    assert {tuple(values.tolist()) for values in scales.values()} == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
def test_widths_that_the_plugin_does_not_serve_stay_as_they_are(tmp_path):
    """The built-in model's, say; a kernel that is asked for them would stop the build."""
    unet = factories.small_unet("sd1", **factories.SMALL).half()
    path = tmp_path / "unet.onnx"
    write_onnx(unet, unet_contract(dict(unet.config), "fp16"), path)
    model, weights = onnx_file.load_split(path)
    untouched = model.SerializeToString(deterministic=True)
    assert norm_plugin.use_plugin(model, weights) == 0
    assert model.SerializeToString(deterministic=True) == untouched


def test_which_widths_the_plugin_serves():
    """Those of the UNets of Stable Diffusion 1, 2 and XL, skip connections included; not those of their VAEs."""
    assert all(map(norm_plugin.serves, (320, 640, 960, 1280, 1920, 2560)))
    assert not any(map(norm_plugin.serves, (32, 64, 100, 128, 160, 256, 384, 448, 512)))


@pytest.mark.parametrize(
    ("label", "options", "used"),
    [
        ("tensorrt 8.6.1", {}, True),
        ("tensorrt 8.6.1", {"norm_plugins": False}, False),
        ("tensorrt 8.6.1", {"version_compatible": True}, False),  # a lean runtime has no plugins
        ("tensorrt 8.6.1", {"profiles": (Profile.of(Sizes(32, 64, 64)),)}, True),
        ("tensorrt 8.6.1", {"profiles": (Profile.of(Sizes(33, 64, 64)),)}, False),  # beyond the plugin's workspace
        ("tensorrt 10.13.3.9", {}, False),
    ],
)
def test_who_gets_the_plugin(label, options, used, wide_onnx, tmp_path, monkeypatch):
    """TensorRT 8.6, unless told otherwise; the export stays as it is, and nothing is left in the entry's folder."""
    path, contract = wide_onnx.path, wide_onnx.contract
    before = path.read_bytes()
    read = []
    monkeypatch.setattr(building, "parse_onnx", lambda library, onnx_path: read.append(onnx.load(onnx_path)))
    spec = BuildSpec(ExportSpec(), "tensorrt", **{"profiles": (Profile.of(Sizes(2, 64, 64)),), **options})
    _parse(fake_library(label), Request(path, tmp_path, contract, spec, None, False))
    assert ("GroupNorm" in {node.op_type for node in read[0].graph.node}) == used
    assert path.read_bytes() == before
    assert not list(tmp_path.iterdir())
