"""Exports, each made once in a test run, whichever test and process of pytest-xdist wants it first; small UNets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import factories
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock

from sdtrt.exports.component import write_onnx
from sdtrt.exports.onnx_file import load_split
from sdtrt.exports.onnx_index import GraphIndex
from sdtrt.specs import DEFAULT_OPSETS
from sdtrt.specs.contract import Contract, unet_contract

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = tuple(factories.UNET_CONFIGS)
EXPORTERS = ("torchscript", "dynamo")
EACH_EXPORTER = ["torchscript", pytest.param("dynamo", marks=pytest.mark.slow)]
SMALLER = {"layers_per_block": 1}  # exporters' time goes by the number of layers, and two a block are as one
# The dynamo exporter takes ten seconds and more for a UNet; what SD 2's has, SDXL's has too.
EACH_BY_BOTH = [
    pytest.param(kind, exporter, marks=[pytest.mark.slow] if exporter == "dynamo" or kind == "sd2" else [])
    for kind in KINDS
    for exporter in EXPORTERS
]


@dataclass(frozen=True)
class Exported:
    path: Path
    unet: UNet2DConditionModel
    contract: Contract

    @property
    def model(self):
        return onnx.load(self.path)


def module_of(kind, precision, **overrides):
    unet = factories.small_unet(kind, **{**SMALLER, **overrides})
    torch.nn.Module.to(unet, DTYPES[precision])
    return unet, unet_contract(unet.config, precision)


def make(folder, kind="sd1", precision="fp16", exporter="torchscript", **overrides):
    unet, contract = module_of(kind, precision, **overrides)
    path = folder / "model.onnx"
    write_onnx(unet, contract, path, exporter=exporter, opset=DEFAULT_OPSETS[exporter])
    return Exported(path, unet, contract)


MOVING = {
    "Cast",
    "Concat",
    "Constant",
    "ConstantOfShape",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
}
MOVING |= {"Split", "Squeeze", "Transpose", "Unsqueeze", "Where"}


def computing_in_fp32(path):
    """The names of a file's nodes that compute in fp32, by their outputs' types."""
    model, weights = load_split(path)
    types = GraphIndex(model, weights).types
    computing = (node for node in model.graph.node if node.op_type not in MOVING)
    return {node.name for node in computing if types.get(node.output[0]) == onnx.TensorProto.FLOAT}


def made_once(path, write):
    """A file of the test run, which `write` makes where no test of any process has made it yet."""
    with FileLock(f"{path}.lock"):
        if not path.exists():
            draft = path.with_suffix(".draft")
            write(draft)
            draft.rename(path)
    return path


def exported_unet(shared, kind="sd1", precision="fp16", exporter="torchscript"):
    """By kind, precision and exporter, in the folder of the test run; tests must not change it."""
    unet, contract = module_of(kind, precision, **(factories.SMALLEST[kind] if exporter == "dynamo" else {}))
    write = partial(write_onnx, unet, contract, exporter=exporter, opset=DEFAULT_OPSETS[exporter])
    return Exported(made_once(shared / f"{kind}-{precision}-{exporter}.onnx", write), unet, contract)
