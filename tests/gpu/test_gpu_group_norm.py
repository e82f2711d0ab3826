"""TensorRT 8.6's plugin for group normalisation on a real GPU, alone in an engine."""

from __future__ import annotations

import json

import pytest
import torch
from gpu_engines import NEEDS_GPU, NEEDS_TENSORRT
from torch import nn

from sdtrt.backends.tensorrt.checking import LAYERS_FILE
from sdtrt.backends.tensorrt.plan import TENSORRT_FILE
from sdtrt.backends.tensorrt.versions import libraries, weak_typing
from sdtrt.backends.tensorrt86.build import build_plan
from sdtrt.backends.tensorrt86.norm_plugin import OPERATOR
from sdtrt.backends.tensorrt86.session import open_plans
from sdtrt.common.console import QUIET
from sdtrt.common.metrics import relative_l2
from sdtrt.exports import onnx_file, onnx_simplify
from sdtrt.specs import BuildSpec, ExportSpec, Profile, Sizes
from sdtrt.specs.contract import Contract, TensorSpec

pytestmark = [*NEEDS_GPU, NEEDS_TENSORRT, pytest.mark.timeout(600)]
CUDA = torch.device("cuda")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("channels", "batch"), [(320, 2), (960, 2), (1920, 2), (2560, 2), (320, 32)])
def test_the_plugin_normalises_as_pytorch_does(channels, batch, tmp_path):
    if not weak_typing.has_plugin(libraries.open_library("tensorrt"), OPERATOR):
        pytest.skip("this TensorRT has no need of the plugin")
    torch.manual_seed(0)
    module = nn.Sequential(nn.GroupNorm(32, channels, eps=1e-5), nn.SiLU()).half().eval()
    shape = (batch, channels, 16, 12)
    contract = Contract(
        "unet", "fp16", (TensorSpec("sample", "float16", shape),), (TensorSpec("out_sample", "float16", shape),)
    )
    path = tmp_path / "model.onnx"
    names = {"input_names": ["sample"], "output_names": ["out_sample"]}
    torch.onnx.export(module, (torch.randn(shape).half(),), str(path), dynamo=False, opset_version=17, **names)
    model, weights = onnx_file.load_split(path)
    onnx_simplify.simplify(model, weights)
    onnx_file.save(model, weights, path)
    spec = BuildSpec(ExportSpec(), "tensorrt", (Profile.of(Sizes(batch, 128, 96)),))
    build_plan(path, tmp_path, contract, spec, timing_cache=None, console=QUIET)
    assert "Plugin" in json.dumps(json.loads((tmp_path / LAYERS_FILE).read_text()))
    module = module.float().to(CUDA)
    with open_plans(tmp_path / TENSORRT_FILE, contract, device=CUDA) as session, torch.no_grad():
        for mean, deviation in ((0, 1), (0, 30), (3, 1), (0, 0.1)):
            sample = (mean + deviation * torch.randn(shape)).half().to(CUDA)
            found = session.run({"sample": sample})["out_sample"].float()
            expected = module(sample.float())
            error = relative_l2(found.cpu().numpy(), expected.cpu().numpy())
            assert error < 1e-3, f"mean {mean}, deviation {deviation}: {error:.1e}"
