"""What the backend that `auto` comes to refuses is refused before a build is spoken of, and before a model is read."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

import sdtrt
from sdtrt.backends import registry
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SIZES = ("--height", "64", "--width", "64")
NOWHERE = ("--model", "somebody/there-is-none", "--offline")


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command that fails for a wrong request, and gives what it said; no engine and no picture is there then."""

    def command(*words: str) -> str:
        folder = tmp_path / "engines"
        code, out, err = run(*words, "--engine-dir", str(folder))
        assert (code, out) == (2, ""), err
        assert "building" not in err
        assert not list(EngineDirectory(folder).entries("engine"))
        return str(err)

    return command


@pytest.mark.parametrize("precision", ["int8", "fp8", "bf16"])
def test_a_precision_is_refused_before_a_build(refused, sd1, tmp_path, precision):
    said = refused(
        "txt2img", "--model", str(sd1), "--prompt", "red", *SIZES, "--precision", precision, "-o", f"{tmp_path}/a.png"
    )
    assert said.splitlines()[-2].startswith("error: ONNX Runtime")
    assert precision in said.splitlines()[-2]
    assert "--precision" in said.splitlines()[-1]


@pytest.mark.parametrize("command", [("build",), ("bench",)])
def test_builds_and_benches_ask_before_a_model_is_looked_for(refused, command):
    assert "ONNX Runtime has no engines in int8" in refused(*command, *NOWHERE, "--precision", "int8")


def test_a_build_of_several_profiles_is_refused_before_a_model_is_looked_for(refused):
    profiles = ("--profile", "height=64", "--profile", "height=128")
    said = refused("build", *NOWHERE, "--backend", "inductor", "--precision", "fp32", *profiles)
    assert "PyTorch Inductor builds an engine for one profile, got 2" in said
    said = refused("build", *NOWHERE, "--optimization-level", "3")
    assert "ONNX Runtime engines have no optimization level" in said
    assert "has no engines to build" in refused("build", *NOWHERE, "--backend", "torch")


def test_components_are_refused_where_auto_comes_to_pytorch(refused, sd1, monkeypatch):
    monkeypatch.setattr(registry, "expected", lambda console=None: ("torch", "a GPU without engines"))
    words = ("txt2img", "--model", str(sd1), "--prompt", "red", *SIZES)
    assert "the torch backend has no engines" in refused(*words, "--component", "unet")
    assert "PyTorch has no engines in int8" in refused(*words, "--precision", "int8")


def refuse_text(self, spec):
    """A refusal that only a component's own build meets, the last one of those that a pipeline lacks."""
    if spec.export.component == "vae_decoder":
        raise UsageError("it builds no such part", hint="leave it out")


@pytest.mark.parametrize("more", [(), ("--cache-interval", "3", "--steps", "9"), ("--guidance-interval", "0.2:0.8")])
def test_whatever_a_backend_refuses_is_refused_before_the_first_build(refused, sd1, monkeypatch, more):
    monkeypatch.setattr(type(registry.get("onnxruntime")), "check", refuse_text)
    assert "it builds no such part" in refused("txt2img", "--model", str(sd1), "--prompt", "red", *SIZES, *more)


def test_a_live_pipeline_is_refused_likewise(smallest, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(registry.get("onnxruntime")), "check", refuse_text)
    pipe = StableDiffusionPipeline.from_pretrained(smallest, torch_dtype=torch.float32)
    with pytest.raises(UsageError, match="it builds no such part"):
        sdtrt.accelerate(pipe, backend="onnxruntime", engine_dir=tmp_path / "engines")
    assert "building" not in capsys.readouterr().err
    assert "forward" not in vars(pipe.unet), "nothing of the pipeline is changed"
