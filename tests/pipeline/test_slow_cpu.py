"""What is said of a picture that takes long on a CPU: what would make it faster, once, and only that."""

from __future__ import annotations

from dataclasses import replace

import factories
import pytest

from sdtrt.backends.openvino.backend import OpenVino
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.opening.slow_cpu import note_slow_cpu
from sdtrt.specs import ModelSpec, Sizes


@pytest.fixture
def spec(monkeypatch):
    """A picture that takes minutes, on a processor that multiplies in bf16."""
    monkeypatch.setattr(host, "gpus", lambda: ())
    monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(OpenVino, "why_not", lambda self: None)
    return PipelineSpec(resolve_model(ModelSpec("tiny")), "onnxruntime", "fp32", Sizes(2, 512, 512), steps=50)


@pytest.fixture
def said(capsys):
    def call(spec):
        note_slow_cpu(spec, Console())
        return capsys.readouterr().err

    return call


def test_all_that_helps_is_said_in_one_note(spec, said):
    text = " ".join(said(spec).split())
    assert text.startswith("on a CPU this takes long; faster: a latent consistency model")
    assert "--backend openvino --precision bf16; a tiny VAE, as --vae madebyollin/taesd (docs/cpu.md)" in text


def test_what_is_done_already_is_not_advised(spec, said, tmp_path):
    assert "openvino" not in said(replace(spec, backend="openvino", precision="bf16"))
    assert "--precision bf16" in said(replace(spec, backend="openvino"))
    assert "consistency" not in said(replace(spec, steps=4))
    folder = factories.vae_folder(tmp_path / "vae", factories.small_tiny_vae())
    tiny = replace(spec, model=resolve_model(ModelSpec("tiny", vae=str(folder))))
    assert "a tiny VAE" not in said(tiny)
    assert said(replace(tiny, steps=4, backend="openvino", precision="bf16")) == ""


def test_a_processor_without_bf16_and_a_missing_extra_are_heeded(spec, said, monkeypatch):
    monkeypatch.setattr(host, "processor_flags", lambda: frozenset({"avx2"}))
    assert "--precision" not in said(spec)
    assert "openvino" not in said(replace(spec, backend="openvino"))
    missing = BuildError("it is not installed", hint="pip install")
    monkeypatch.setattr(OpenVino, "why_not", lambda self: missing)
    assert "pip install 'sdtrt[openvino]', then --backend openvino" in " ".join(said(spec).split())


def test_small_pictures_and_gpus_are_let_alone(spec, said, monkeypatch):
    assert said(replace(spec, sizes=Sizes(2, 128, 128))) == ""
    assert said(replace(spec, backend="tensorrt", precision="fp16")) == ""
