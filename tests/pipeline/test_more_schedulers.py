"""Schedulers by all their names, those beyond the usual eight, and how their noise levels are spaced."""

from __future__ import annotations

import importlib.util
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from test_schedulers import SD1, PointScore, denoise

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.parts.scheduler_checks import check_eta, check_steps
from sdtrt.pipeline.parts.schedulers import keep_on_host, make_scheduler, with_noise
from sdtrt.pipeline.runs.sampler_names import eta_field, sampler_name, schedule_type
from sdtrt.specs import SCHEDULERS, BenchSpec, GenerateSpec, NoiseSpec, find_scheduler, find_sigmas

HAS_TORCHSDE = importlib.util.find_spec("torchsde") is not None
SDE = pytest.param("dpm++sde", marks=pytest.mark.skipif(not HAS_TORCHSDE, reason="needs torchsde"))
NEW = ("dpm++2m-sde", "dpm++2m-sde-heun", "dpm++3m-sde", "dpm++2s", "dpm2", "dpm2-a", "lms", "deis", "sa-solver", "tcd")
NEW = (*NEW, "ddpm")
MULTI, SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# diffusers' own table of what web UIs call them (docs/source/en/api/schedulers/overview.md), and what is not in it.
TABLE = {
    "DPM++ 2M": (MULTI, {}),
    "DPM++ 2M Karras": (MULTI, {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": (MULTI, {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (MULTI, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "DPM++ 2M SDE Heun": (MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "DPM++ 3M SDE Exponential": (
        MULTI,
        {
            "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3,
            "use_exponential_sigmas": True,
            "timestep_spacing": "linspace",
        },
    ),
    "DPM++ 2M Beta": (MULTI, {"use_beta_sigmas": True, "timestep_spacing": "linspace"}),
    "DPM++ 2M SGM Uniform": (MULTI, {"timestep_spacing": "trailing"}),
    "DPM++ 2S Karras": (SINGLE, {"use_karras_sigmas": True}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Simple": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "PLMS": ("PNDMScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "LCM": ("LCMScheduler", {"clip_sample": False}),
    "TCD": ("TCDScheduler", {"clip_sample": False}),
    "SA Solver": ("SASolverScheduler", {}),
}


def test_sgm_uniform_is_called_so_where_it_is_asked_for():
    found = made("Euler SGM Uniform")
    for steps in (4, 8, 20):
        found.set_timesteps(steps)
        assert schedule_type(found, "sgm_uniform") == "SGM Uniform"
    assert schedule_type(found, "simple") == "Simple"


def made(text, noise=None):
    """What a request of a name runs with."""
    spec = GenerateSpec(("x",), scheduler=text, noise=noise or NoiseSpec())
    return with_noise(make_scheduler(spec.scheduler, SD1), spec.noise)


@pytest.mark.slow
@pytest.mark.parametrize("text", TABLE)
def test_web_uis_names_make_what_diffusers_table_says(text):
    class_name, config = TABLE[text]
    found, plain = made(text), getattr(diffusers, class_name).from_config(SD1.config, **config)
    assert type(found) is type(plain)
    pairs = {name: (value, plain.config[name]) for name, value in found.config.items()}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    assert not {name for name in differing if not name.startswith(("_", "use_"))}, differing
    assert all(bool(one) == bool(other) for name, (one, other) in differing.items() if name.startswith("use_"))
    sampler = text.removesuffix(" Karras").removesuffix(" Exponential").removesuffix(" Beta")
    assert sampler_name(found) == sampler.removesuffix(" SGM Uniform").removesuffix(" Simple")
    found.set_timesteps(10)
    if text != sampler:
        assert schedule_type(found) == text.removeprefix(f"{sampler} ")


@pytest.mark.parametrize(
    ("text", "name", "sigmas"),
    [
        ("dpm++2m-karras", "dpm++", "karras"),
        ("DPM++ 2M Karras", "dpm++", "karras"),
        ("dpmpp_2m_sde", "dpm++2m-sde", None),
        ("DPM++ SDE", "dpm++sde", None),
        ("DPMSolverSDEScheduler", "dpm++sde", None),
        ("euler_ancestral", "euler-a", None),
        ("EulerAncestralDiscreteScheduler", "euler-a", None),
        ("EULER A", "euler-a", None),
        ("dpm_2_ancestral", "dpm2-a", None),
        ("uni_pc", "unipc", None),
        ("Euler SGM Uniform", "euler", "sgm_uniform"),
        ("ddim", "ddim", None),
        ("Heun beta", "heun", "beta"),
    ],
)
def test_case_spaces_and_dashes_do_not_matter(text, name, sigmas):
    assert find_scheduler(text) == (name, sigmas)
    spec = GenerateSpec(("x",), scheduler=text)
    assert (spec.scheduler, spec.noise.sigmas) == (name, sigmas)
    assert BenchSpec(scheduler=text).noise.sigmas == sigmas


def test_every_name_is_its_own():
    assert [find_scheduler(name) for name in SCHEDULERS] == [(name, None) for name in SCHEDULERS]
    assert find_sigmas("SGM Uniform") == "sgm_uniform"
    assert find_sigmas("DDIM") == "ddim_uniform"
    assert find_sigmas("Automatic") is None


@pytest.mark.parametrize(
    ("text", "near"),
    [("eulr", "euler"), ("DPM++ 2S a", "dpm++2s"), ("dpm++ 2m kerras", "dpm++"), ("lmss", "lms")],
)
def test_an_unknown_name_is_an_error_with_near_ones(text, near):
    with pytest.raises(UsageError, match="unknown scheduler: ") as caught:
        find_scheduler(text)
    assert near in caught.value.hint.split("?")[0]
    with pytest.raises(UsageError, match="unknown sigmas: 'x'"):
        find_sigmas("x")


def test_what_is_said_twice_and_differently_is_an_error():
    with pytest.raises(UsageError, match="has karras sigmas, and --sigmas says beta"):
        made("Euler Karras", NoiseSpec(sigmas="beta"))
    with pytest.raises(UsageError, match="sigmas simple are at trailing timesteps, not at leading ones"):
        made("Euler Simple", NoiseSpec(timestep_spacing="leading"))
    assert made("Euler Karras", NoiseSpec(sigmas="karras")).config.use_karras_sigmas
    assert (
        "karras sigmas (--scheduler 'Euler Karras')" in GenerateSpec(("x",), scheduler="Euler Karras").noise.describe()
    )


@pytest.mark.parametrize("text", ["DDIM Karras", "PLMS Beta", "Euler a Karras", "LCM Karras", "TCD SGM Uniform"])
def test_what_a_scheduler_can_not_space_is_refused_with_what_can(text):
    with pytest.raises(UsageError, match="has no choice of sigmas") as caught:
        made(text)
    assert "use --scheduler" in caught.value.hint
    assert "euler" in caught.value.hint


def test_one_spacing_takes_the_place_of_another():
    own = diffusers.EulerDiscreteScheduler.from_config(SD1.config, use_karras_sigmas=True)
    found = with_noise(own, NoiseSpec(sigmas="exponential"))
    assert (found.config.use_karras_sigmas, found.config.use_exponential_sigmas) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NEW, SDE])
def test_every_new_name_denoises_to_what_the_model_predicts(name):
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    scheduler = make_scheduler(name, SD1)
    result = denoise(scheduler, 20, PointScore(scheduler, target))
    assert (result - target).abs().max() < 0.15
    keep_on_host(kept := make_scheduler(name, SD1))
    torch.manual_seed(0)
    one = denoise(kept, 5, lambda latents, _: latents * 0.5)
    torch.manual_seed(0)
    assert torch.equal(one, denoise(make_scheduler(name, SD1), 5, lambda latents, _: latents * 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NEW, SDE])
def test_every_new_name_runs_few_steps(name):
    for steps in (1, 2, 3, 8):
        check_steps(make_scheduler(name, SD1), steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_no_step_of_a_new_name_reads_what_is_on_the_device(name):
    """Meta tensors have no values: whoever asks for one, as a wait for the GPU would, raises."""
    scheduler = make_scheduler(name, SD1)
    keep_on_host(scheduler)
    scheduler.set_timesteps(4, device="meta")
    latents, generator = torch.empty((1, 4, 8, 8), device="meta"), torch.Generator()
    seeded = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for timestep in scheduler.timesteps:
        noise = scheduler.scale_model_input(latents, timestep) * 0.5
        latents = scheduler.step(noise, timestep, latents, **seeded).prev_sample
    assert latents.device.type == "meta"


def test_a_package_that_is_missing_is_named_with_the_mend(monkeypatch):
    if not HAS_TORCHSDE:
        with pytest.raises(UsageError, match="DPMSolverSDEScheduler needs torchsde, which is not installed") as caught:
            make_scheduler("dpm++sde", SD1)
        assert "pip install torchsde; or use --scheduler" in caught.value.hint
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.is_scipy_available", lambda: False)
    with pytest.raises(UsageError, match="EulerDiscreteScheduler with beta sigmas needs scipy"):
        made("Euler Beta")


def test_eta_is_for_those_that_take_it():
    for name in ("ddim", "tcd"):
        check_eta(make_scheduler(name, SD1))
    with pytest.raises(UsageError, match="EulerDiscreteScheduler has no eta"):
        check_eta(make_scheduler("euler", SD1))
    with pytest.raises(UsageError, match=r"eta must be from 0 to 1, got 1\.5"):
        GenerateSpec(("x",), eta=1.5)
    assert [eta_field(make_scheduler(name, SD1)) for name in ("ddim", "tcd")] == ["Eta DDIM", "Eta"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("scheduler", "options", "config", "call", "text"),
    [
        (
            "DPM++ 2M SDE Karras",
            ["--guidance-scale", "3"],
            (MULTI, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
            {"guidance_scale": 3.0},
            "Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 3",
        ),
        (
            "TCD",
            ["--guidance-scale", "0", "--eta", "0.3"],
            ("TCDScheduler", {"clip_sample": False}),
            {"guidance_scale": 0.0, "eta": 0.3},
            "Eta: 0.3",
        ),
        (
            "euler",
            ["--guidance-scale", "1", "--timestep-spacing", "trailing"],
            ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
            {"guidance_scale": 1.0},
            "Sampler: Euler, Schedule type: Simple, CFG scale: 1",
        ),
        pytest.param(
            "DPM++ SDE",
            ["--guidance-scale", "3"],
            ("DPMSolverSDEScheduler", {"noise_sampler_seed": 3}),
            {"guidance_scale": 3.0},
            "Sampler: DPM++ SDE",
            marks=SDE.marks,
        ),
    ],
    ids=["dpm++2m-sde-karras", "tcd", "euler-trailing", "dpm++sde"],
)
@pytest.mark.feature("Schedulers by diffusers' and web UIs' names, sigmas, eta", "sd1", "onnxruntime")
def test_a_picture_is_plain_diffusers_with_that_scheduler(
    smallest, engine_dir, tmp_path, run, scheduler, options, config, call, text
):
    request = ["--model", str(smallest), "--engine-dir", str(engine_dir), "--backend", "onnxruntime", "--seed", "3"]
    request += ["--height", "64", "--width", "64", "--steps", "4", "--output", str(tmp_path / "x.png"), "--json"]
    code, out, err = run("txt2img", "a star", "--scheduler", scheduler, *options, *request)
    assert code == 0, err
    plain = diffusers.StableDiffusionPipeline.from_pretrained(smallest, torch_dtype=torch.float32, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = getattr(diffusers, config[0]).from_config(plain.scheduler.config, **config[1])
    given = {"num_inference_steps": 4, "height": 64, "width": 64, **call}
    expected = plain("a star", generator=torch.Generator().manual_seed(3), **given).images[0]
    image = Image.open(tmp_path / "x.png")
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 2
    assert text in image.text["parameters"]
    facts = json.loads(out)
    assert facts["scheduler"]["class"] == config[0]
    assert facts.get("eta") == call.get("eta")


def test_an_eta_that_has_no_effect_is_refused(smallest, run, tmp_path):
    request = ["--model", str(smallest), "--engine-dir", str(tmp_path), "--backend", "onnxruntime", "--eta", "0.3"]
    code, _, err = run("txt2img", "a star", "--scheduler", "euler", *request)
    assert (code, "EulerDiscreteScheduler has no eta" in err) == (2, True)
    assert not list(tmp_path.iterdir())
