"""The digests of keys, as they were when the first engines were made: another digest, and everybody builds again."""

from __future__ import annotations

import json

import pytest
from trt_fakes import fake_library

from sdtrt.backends import build as engine_build
from sdtrt.backends.tensorrt.versions import libraries
from sdtrt.common import host
from sdtrt.engines.entry import key_digest
from sdtrt.engines.keys import EngineKey, export_key
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Range, Sizes

FIXED = (Profile.of(Sizes(2, 512, 512)),)
WIDE = (Profile(Range(2, 2, 2), Range(256, 512, 768), Range(256, 512, 768), Range(77, 77, 77)),)
ONE = (Profile.of(Sizes(1, 512, 512)),)


@pytest.fixture
def model(monkeypatch):
    """The built-in model, on a machine whose facts are fixed."""
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("NVIDIA H200", (9, 0), 2**37),))
    monkeypatch.setattr(host, "processor_name", lambda: "A processor")
    monkeypatch.setattr(host, "instruction_sets", lambda: ("avx2", "fma"))
    monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx2", "fma", "avx512_bf16"}))
    monkeypatch.setattr(host, "library_version", lambda name: "1.20.0")
    return resolve_model(ModelSpec("tiny"))


def on(monkeypatch, label):
    """Let TensorRT be of this version."""
    library = fake_library(label)
    monkeypatch.setattr(libraries, "open_library", lambda backend: library)
    monkeypatch.setattr(libraries, "version", lambda backend: label.split()[1])


@pytest.mark.parametrize(
    ("component", "precision", "exporter", "digest"),
    [
        ("unet", "fp16", "torchscript", "32606196a66affcd"),
        ("unet", "fp32", "dynamo", "ab725d5390c97945"),
        ("text_encoder", "fp16", "torchscript", "f3b418c2fab41dd1"),
        ("vae_decoder", "fp32", "torchscript", "1a1cf55265ed2083"),
    ],
)
def test_exports_are_found_under_the_keys_that_they_always_had(
    model, directory, component, precision, exporter, digest
):
    key = export_key(model, ExportSpec(model.spec, component, precision, exporter), directory.file_digest)
    assert key_digest("onnx", key.to_json())[:16] == digest


@pytest.mark.parametrize(
    ("label", "component", "precision", "options", "digest"),
    [
        (
            "tensorrt 8.6.1",
            "unet",
            "fp16",
            {"profiles": FIXED, "split_attention": 0, "norm_plugins": False},
            "c78fe01b80f5e15c",
        ),
        ("tensorrt 8.6.1", "unet", "fp16", {"profiles": WIDE, "workspace_bytes": 2**33}, "0bf1ee73fbb12721"),
        ("tensorrt 8.6.1", "text_encoder", "fp16", {"profiles": ONE, "optimization_level": 3}, "1d0fa9a8fe947c32"),
        ("tensorrt 10.13.3.9", "unet", "fp16", {"profiles": FIXED, "version_compatible": True}, "d5dc0263d537d7ff"),
        ("tensorrt 10.13.3.9", "vae_encoder", "bf16", {"profiles": ONE}, "f56a1c9b96bf417f"),
        (
            "tensorrt_rtx 1.7.1.116",
            "unet",
            "fp16",
            {"profiles": FIXED, "compute_capability": (8, 9)},
            "a498aca9060fbeee",
        ),
        ("tensorrt_rtx 1.7.1.116", "unet", "fp16", {"profiles": FIXED}, "b30851a04481bda2"),
        ("onnxruntime 1.20.0", "unet", "fp32", {}, "bc281ccb9d066f51"),
        ("onnxruntime 1.20.0", "vae_decoder", "fp16", {}, "04643e453b5f6fdc"),
        ("openvino 1.20.0", "unet", "fp32", {"profiles": FIXED}, "26f54211de9c9cda"),
        ("openvino 1.20.0", "unet", "bf16", {"profiles": WIDE}, "525a288652b55d70"),
    ],
)
def test_engines_are_found_under_the_keys_that_they_always_had(
    model, directory, monkeypatch, label, component, precision, options, digest
):
    check_engine_key(model, directory, monkeypatch, label, component, precision, options, digest)


def check_engine_key(model, directory, monkeypatch, label, component, precision, options, digest):
    """An engine's key has this digest, and is read back as it was written."""
    backend = label.split()[0].replace("_", "-")
    if backend not in ("onnxruntime", "openvino"):
        on(monkeypatch, label)
    spec = BuildSpec(ExportSpec(model.spec, component, precision), backend, **options)
    key = engine_build.engine_key(model, spec, directory)
    assert key_digest("engine", key.to_json())[:16] == digest
    assert EngineKey.from_json(json.loads(json.dumps(key.to_json()))).to_json() == key.to_json()
