"""Exports of small UNets, each made once in a test run, whichever test and process of pytest-xdist wants it first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import factories
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel
from filelock import FileLock

from sdtrt.components import Contract, unet_contract
from sdtrt.export import write_onnx
from sdtrt.specs import DEFAULT_OPSETS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
KINDS = tuple(factories.UNET_CONFIGS)
EXPORTERS = ("torchscript", "dynamo")
SMALLER = {"layers_per_block": 1}  # exporters' time goes by the number of layers, and two a block are as one
# The dynamo exporter takes ten seconds and more for a UNet.
EACH_BY_BOTH = [
    pytest.param(kind, exporter, marks=[pytest.mark.slow] if exporter == "dynamo" and kind != "sd1" else [])
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


def exported_unet(shared, kind="sd1", precision="fp16", exporter="torchscript"):
    """By kind, precision and exporter, in the folder of the test run; tests must not change it."""
    folder = shared / "-".join((kind, precision, exporter))
    overrides = factories.SMALLEST[kind] if exporter == "dynamo" else {}
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            unet, contract = module_of(kind, precision, **overrides)
            return Exported(folder / "model.onnx", unet, contract)
        draft = folder.with_suffix(".draft")
        draft.mkdir(exist_ok=True)
        it = make(draft, kind, precision, exporter, **overrides)
        draft.rename(folder)
        return replace(it, path=folder / "model.onnx")
