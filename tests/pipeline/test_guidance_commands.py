"""Guidance in a part of a run, in `generate`, `load` and the commands, beside plain diffusers that does it by hand.

Engines are Inductor's that PyTorch runs here: of a fixed number of rows, without weights, and built in no time.
"""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import factories
import numpy as np
import pytest
import test_control_commands
import torch
import torch_engines
from PIL import Image
from test_guidance_interval import by_hand
from test_memory import engine

import sdtrt
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.images import read_metadata, read_parameters
from sdtrt.pipeline.opening import all_engines, memory
from sdtrt.pipeline.opening.open import open_pipeline
from sdtrt.pipeline.opening.request import resolve_request
from sdtrt.pipeline.runs.generate import generate
from sdtrt.reports.verify import verify
from sdtrt.specs import (
    ControlSpec,
    GenerateSpec,
    GuidanceInterval,
    ModelSpec,
    Profile,
    Range,
    RefinerSpec,
    Savings,
    Sizes,
    UpscaleSpec,
    VerifySpec,
)

pytestmark = [pytest.mark.usefixtures("on_the_cpu"), pytest.mark.usefixtures("engines")]
SLOW = pytest.mark.slow
LEVELS = 2  # of 255
MIDDLE = Savings(guidance=GuidanceInterval(0.25, 0.75))
net_of = test_control_commands.net_of


@pytest.fixture
def engines(monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def spec(tmp_path, smallest):
    given = {"steps": 4, "seed": 5, "height": 64, "width": 64, "output": tmp_path / "out", "savings": MIDDLE}
    return GenerateSpec(("a red circle",), ModelSpec(str(smallest)), "inductor", scheduler="ddim", **given)


def pixels(report):
    return [np.asarray(Image.open(one.path)).astype(int) for one in report.images]


def names(directory):
    return sorted(entry.name for entry in directory.entries("engine"))


def plain_picture(spec, guided, cls=diffusers.StableDiffusionPipeline, **options):
    """What the untouched pipeline makes, whose UNet does by hand what the interval says."""
    pipe = cls.from_pretrained(spec.model.name, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    by_hand(pipe, guided)
    given = {"num_inference_steps": spec.steps, "guidance_scale": spec.guidance_scale, "height": 64, "width": 64}
    made = pipe(spec.prompts[0], generator=torch.Generator().manual_seed(spec.seed), **{**given, **options}).images[0]
    return np.asarray(made).astype(int)


def test_a_picture_is_what_plain_diffusers_makes_by_hand_and_tells_how(spec, directory, capsys):
    console = Console()
    report = generate(spec, directory, console)
    said = capsys.readouterr().err
    assert "unet: steps without guidance are of 1 row, for which a second engine computes with the same weights" in said
    assert abs(pixels(report)[0] - plain_picture(spec, {1, 2})).max() <= LEVELS
    assert set(report.engines) == {"unet", "unet_prompt_rows", "text_encoder", "vae_decoder"}
    built = names(directory)
    path = report.images[0].path
    assert read_metadata(path).details["guidance_interval"] == [0.25, 0.75]
    assert read_parameters(path).fields["Guidance interval"] == "0.25:0.75"
    generate(replace(spec, savings=Savings(GuidanceInterval(0.4, 0.9))), directory, console)
    assert names(directory) == built
    assert "building" not in capsys.readouterr().err


@SLOW
def test_pytorch_does_it_too(spec, directory):
    found, expected = (generate(replace(spec, backend=one), directory, QUIET) for one in ("torch", "inductor"))
    assert abs(pixels(found)[0] - pixels(expected)[0]).max() <= LEVELS
    assert found.engines == {}


@SLOW
def test_the_whole_run_is_nothing_at_all(spec, directory, tmp_path):
    own = EngineDirectory(tmp_path / "engines")
    plain, whole = (
        generate(replace(spec, savings=savings), own, QUIET) for savings in (Savings(), Savings(GuidanceInterval(0, 1)))
    )
    assert np.array_equal(pixels(plain)[0], pixels(whole)[0])
    assert set(whole.engines) == {"unet", "text_encoder", "vae_decoder"}
    assert len(names(own)) == 3
    assert "guidance_interval" not in whole.settings
    assert "Guidance interval" not in read_parameters(whole.images[0].path).fields


@SLOW
def test_a_picture_s_file_and_its_text_bring_the_interval_back(spec, directory, run, folder):
    report = generate(replace(spec, savings=Savings(GuidanceInterval(1 / 3, 0.75))), directory, QUIET)
    (path,) = (one.path for one in report.images)
    (folder / "text.txt").write_text(read_metadata(path).parameters)
    for source, more in ((path, ()), (folder / "text.txt", ("--model", spec.model.name, "--backend", "inductor"))):
        code, out, err = run(
            *(
                "txt2img",
                "--from",
                str(source),
                *more,
                "--engine-dir",
                str(directory.path),
                "--json",
                "-o",
                "again.png",
            ),
            "--overwrite",
        )
        assert code == 0, err
        assert json.loads(out)["guidance_interval"] == [1 / 3, 0.75]
        assert "guidance_interval" in err
        assert np.array_equal(np.asarray(Image.open("again.png")).astype(int), pixels(report)[0])


def test_what_no_guidance_makes_of_it_is_said(spec, directory, run, capsys):
    model = resolve_model(spec.model)
    console = Console()
    found = resolve_request(replace(spec, guidance_scale=1.0), model, console)
    assert found.prompt_rows is None
    said = "--guidance-interval 0.25:0.75 has no effect: guidance scales up to 1 are no guidance"
    assert said in capsys.readouterr().err
    assert resolve_request(spec, model, console).prompt_rows == 1
    assert "no effect" not in capsys.readouterr().err


@SLOW
def test_a_missing_engine_is_named_with_the_command_that_builds_it(spec, tmp_path):
    own, model = EngineDirectory(tmp_path / "engines"), str(spec.model.name)
    generate(replace(spec, savings=Savings()), own, QUIET)
    with pytest.raises(EngineError, match="no inductor fp32 engine for the unet") as caught:
        generate(replace(spec, allow_build=False), own, QUIET)
    options = "--backend inductor --precision fp32 --component unet --batch 1"
    assert f"sdtrt build --model {model} {options}" in caught.value.hint


@SLOW
def test_loaded_pipelines_have_the_pair_and_say_so(spec, directory):
    given = {"height": 64, "width": 64, "backend": "inductor", "engine_dir": directory.path, "progress": False}
    pipe = sdtrt.load(spec.model, **given, scheduler="ddim", guidance_interval=MIDDLE.guidance)
    sizes = [one.sizes for one in sdtrt.status(pipe)["unet"].engines]
    assert sizes == [f"batch {rows}-{rows}, 64-64 x 64-64 pixels" for rows in (2, 1)]
    call = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np"}
    made = pipe(spec.prompts[0], generator=torch.Generator().manual_seed(spec.seed), **call).images[0]
    assert abs(made * 255 - plain_picture(spec, {1, 2})).max() <= LEVELS
    assert np.isfinite(pipe(spec.prompts[0], guidance_scale=1.0, **call).images).all()  # one row an image: the second
    pipe.close()
    with pytest.raises(UsageError, match="guidance=False says that there is none"):
        sdtrt.load(spec.model, **given, guidance=False, guidance_interval=MIDDLE.guidance)


@SLOW
def test_batches_a_second_pass_and_an_image_count_their_own_steps(spec, directory, tmp_path):
    two = replace(spec, num_images=2, batch_size=2)
    batch, alone = generate(two, directory, QUIET), generate(spec, directory, QUIET)
    assert abs(pixels(batch)[0] - pixels(alone)[0]).max() <= LEVELS
    larger = replace(spec, upscale=UpscaleSpec(1.5, "lanczos", strength=0.5))
    engines, pytorch = generate(larger, directory, QUIET), generate(replace(larger, backend="torch"), directory, QUIET)
    assert abs(pixels(engines)[0] - pixels(pytorch)[0]).max() <= LEVELS
    assert {"upscale_unet", "upscale_unet_prompt_rows"} <= set(engines.engines)
    start = replace(spec, init_image=alone.images[0].path, strength=0.5, steps=8, backend="torch")
    expected = plain_picture(
        replace(start, strength=0.5),
        {1, 2},
        diffusers.StableDiffusionImg2ImgPipeline,
        image=Image.open(start.init_image),
        strength=0.5,
    )
    for backend in ("torch", "inductor"):
        assert abs(pixels(generate(replace(start, backend=backend), directory, QUIET))[0] - expected).max() <= LEVELS


@SLOW
def test_a_refiner_counts_the_schedule_that_it_shares(spec, directory, tmp_path_factory):
    base = factories.sdxl_folder(tmp_path_factory.mktemp("m") / "xl", **factories.SMALLEST["sdxl"])
    refiner = factories.refiner_folder(tmp_path_factory.mktemp("m") / "refiner")
    shared = replace(spec, model=ModelSpec(str(base)), refiner=RefinerSpec(ModelSpec(str(refiner)), 0.5))
    found, expected = (generate(replace(shared, backend=one), directory, QUIET) for one in ("inductor", "torch"))
    assert abs(pixels(found)[0] - pixels(expected)[0]).max() <= LEVELS
    assert {"unet_prompt_rows", "refiner_unet_prompt_rows"} <= set(found.engines)


@SLOW
def test_controlnets_have_second_engines_each(spec, directory, net_of, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8) * 255).save(tmp_path / "map.png")
    nets = tuple(ControlSpec(str(net_of("sd1", number)), tmp_path / "map.png", 0.5) for number in (0, 1))
    found, expected = (
        generate(replace(spec, controls=nets, backend=one), directory, QUIET) for one in ("inductor", "torch")
    )
    assert abs(pixels(found)[0] - pixels(expected)[0]).max() <= LEVELS
    second = {name for name in found.engines if name.endswith("_prompt_rows")}
    assert second == {"unet_prompt_rows", "controlnet_prompt_rows", "controlnet_2_prompt_rows"}


@SLOW
def test_verify_holds_both_engines_against_pytorch_and_bench_times_both(spec, directory, run, tmp_path):
    image = replace(spec, output=None)
    report = verify(VerifySpec(image, output=tmp_path / "verified"), directory, QUIET)
    assert not report.failures
    assert len(report.timesteps) == 4
    assert set(report.engines) >= {"unet", "unet_prompt_rows"}
    name = report.engines["unet"]["name"]
    with pytest.raises(EngineError, match="takes no call of 1 row, which steps without guidance are") as caught:
        verify(VerifySpec(image, engine=name, output=tmp_path / "verified"), directory, QUIET)
    assert "leave --guidance-interval or --engine out" in caught.value.hint
    options = ("--steps", "4", "--height", "64", "--width", "64", "--repeats", "1", "--warmups", "1", "--json")
    code, out, _ = run(
        *(
            "bench",
            "--model",
            spec.model.name,
            "--task",
            "txt2img",
            "--backend",
            "inductor",
            "--baselines",
            "torch-fp32",
        ),
        *(*options, "--engine-dir", str(directory.path), "--guidance-interval", "0.25:0.75"),
    )
    asked, baseline = json.loads(out)["rows"]
    assert code == 0
    assert (asked["variant"], baseline["variant"]) == ("guidance in 0.25:0.75", "TF32 off")
    assert "unet_prompt_rows" in asked["components_ms"]
    assert asked["component_share"] is None
    assert "unet_prompt_rows" not in baseline["components_ms"]


@pytest.mark.parametrize(
    ("rows", "found"), [(Range.of(2), ["unet_prompt_rows"]), (Range(1, 2, 2), [])], ids=["fixed", "range"]
)
def test_an_engine_that_holds_weights_serves_both_where_its_range_has_the_rows(
    spec, directory, monkeypatch, capsys, rows, found
):
    model = resolve_model(spec.model)
    first = engine(1.0, 0.0, Profile(rows, Range.of(64), Range.of(64)))
    wanted = factories.engines_wanted(model, "tensorrt", "fp16", Sizes(2, 64, 64), ("unet", "text_encoder"))
    asked = []
    monkeypatch.setattr(
        all_engines, "ensure_engines", lambda request, *_, **__: asked.append(request) or {"unet": engine(1.0, 0.0)}
    )
    monkeypatch.setattr(all_engines, "find_engines", lambda request, _: dict.fromkeys(request.components))
    second = {"unet": all_engines.for_prompt_rows(wanted, 1)}
    assert list(all_engines.ensure_second(second, {"unet": first}, directory, Console())) == found
    assert [(one.components, one.sizes.batch) for one in asked] == [(("unet",), 1)] * len(found)
    said = "unet: steps without guidance are of 1 row, for which a second engine holds the weights a second time"
    assert (said in capsys.readouterr().err) == bool(found)


@SLOW
def test_the_memory_of_weights_that_are_shared_is_counted_once(spec, directory):
    with open_pipeline(resolve_request(spec, resolve_model(spec.model), QUIET), directory, QUIET) as opened:
        first = {name: one for name, one in opened.entries.items() if not name.endswith("_prompt_rows")}
        figures = {"plan_bytes": 2**30, "scratch_bytes": 2**20}
        known = {name: replace(one, info={**one.info, **figures}) for name, one in opened.entries.items()}
        sizes = opened.spec.sizes
        pair, alone = (memory.demand_of({name: known[name] for name in one}, sizes, 1) for one in (known, first))
        assert len(known) == len(first) + 1
        assert pair.fixed == alone.fixed
        held = replace(known["unet_prompt_rows"], key={**known["unet"].key, "backend": "tensorrt"})
        twice = memory.demand_of({**known, "unet_prompt_rows": held}, sizes, 1)
        assert twice.fixed == alone.fixed + 2**30
