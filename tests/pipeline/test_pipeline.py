"""Pipelines opened for other uses than `generate`."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import pytest

from sdtrt.common.console import QUIET
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening.open import open_pipeline
from sdtrt.pipeline.opening.request import PipelineSpec
from sdtrt.pipeline.parts.facades import TextEncoderFacade, VaeFacade
from sdtrt.specs import ModelSpec, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def spec(smallest):
    return PipelineSpec(
        resolve_model(ModelSpec(str(smallest))), "torch", "fp32", Sizes(2, 64, 64), steps=2, scheduler="euler"
    )


def test_a_pipeline_can_be_opened_for_other_uses(spec, engine_dir):
    with open_pipeline(spec, EngineDirectory(engine_dir), QUIET) as opened:
        result = opened.pipe("red", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert result.shape == (1, 64, 64, 3)
    assert type(opened.pipe) is diffusers.StableDiffusionPipeline
    assert opened.entry is None


def test_engines_are_in_diffusers_own_pipeline_by_their_facades(spec, engine_dir):
    spec = replace(spec, backend="onnxruntime", components=("text_encoder", "vae_decoder"))
    with open_pipeline(spec, EngineDirectory(engine_dir), QUIET) as opened:
        pipe = opened.pipe
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert (type(pipe.text_encoder), type(pipe.vae)) == (TextEncoderFacade, VaeFacade)
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert list(opened.entries) == ["text_encoder", "vae_decoder"]
    assert opened.entry is None
