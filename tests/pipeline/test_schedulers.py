"""Schedulers by name: made from the model's own configuration, and each one denoises."""

from __future__ import annotations

import copy
import inspect
import pickle

import diffusers
import pytest
import torch
from factories import small_unet

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.pipeline.parts.scheduler_checks import check_steps
from sdtrt.pipeline.parts.schedulers import Settings, keep_on_host, let_go, make_scheduler, with_noise
from sdtrt.pipeline.runs.sampler_names import noise_schedule, sampler_name, schedule_type
from sdtrt.specs import NoiseSpec

STORED = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SD1 = diffusers.PNDMScheduler(**STORED)
SCHEDULERS = ("pndm", "ddim", "euler", "euler-a", "dpm++", "unipc", "lcm", "heun")  # test_more_schedulers has others
SAMPLERS = {
    "pndm": "PLMS",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++": "DPM++ 2M",
    "unipc": "UniPC",
    "lcm": "LCM",
    "heun": "Heun",
}


class PointScore:
    """The perfect noise prediction for data that is a single point: any sound scheduler walks to that point."""

    def __init__(self, scheduler, target):
        self.alphas, self.target = scheduler.alphas_cumprod, target

    def __call__(self, latents, timestep):
        low = int(timestep)
        share = float(timestep) - low
        high = min(low + 1, len(self.alphas) - 1)
        alpha = self.alphas[low] * (1 - share) + self.alphas[high] * share
        return (latents - alpha.sqrt() * self.target) / (1 - alpha).sqrt()


def denoise(scheduler, steps, predict, *, seed=0, shape=(1, 4, 8, 8)):
    """A pipeline's loop, without the pipeline."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    seeded = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for timestep in scheduler.timesteps:
        noise = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(noise, timestep, latents, **seeded).prev_sample
    return latents


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_denoises_to_what_the_model_predicts(name):
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    scheduler = make_scheduler(name, SD1)
    result = denoise(scheduler, 20, PointScore(scheduler, target))
    # these two end at the first noise level, the others at none
    tolerance = 0.15 if name in ("pndm", "ddim") else 1e-4
    assert (result - target).abs().max() < tolerance


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_number_of_steps_runs_and_stays_finite(name, steps):
    result = denoise(make_scheduler(name, SD1), steps, lambda latents, _: latents * 0.5)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_name_runs_a_real_unet(name):
    unet, states = small_unet("sd1"), torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        result = denoise(make_scheduler(name, SD1), 3, lambda latents, t: unet(latents, t, states).sample)
    assert torch.isfinite(result).all()
    assert result.std() > 0.1


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_and_prediction_are_the_models_own(name):
    own = diffusers.DDIMScheduler(
        beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )
    scheduler = make_scheduler(name, own)
    torch.testing.assert_close(scheduler.alphas_cumprod, own.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"


# PNDM and Heun know no zero terminal SNR.
ZERO_SNR = tuple(name for name in SCHEDULERS if name not in ("pndm", "heun"))


@pytest.mark.parametrize("name", ZERO_SNR)
def test_v_prediction_at_zero_snr_denoises_to_what_the_model_predicts(name):
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    scheduler = with_noise(make_scheduler(name, SD1), NoiseSpec("v_prediction", None, True))

    def velocity(latents, timestep):
        alpha = scheduler.alphas_cumprod[int(timestep)]
        noise = (latents - alpha.sqrt() * target) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * target

    result = denoise(scheduler, 20, velocity)
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert scheduler.timesteps.max() == 999
    assert (result - target).abs().max() < (0.15 if name == "ddim" else 0.01)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lcm"])
@pytest.mark.parametrize(("spacing", "first"), [("leading", 901), ("linspace", 999), ("trailing", 999)])
def test_every_name_takes_every_spacing(name, spacing, first):
    scheduler = with_noise(make_scheduler(name, SD1), NoiseSpec(timestep_spacing=spacing))
    scheduler.set_timesteps(10)
    assert scheduler.config.timestep_spacing == spacing
    assert scheduler.timesteps.max() == (first if name not in ("dpm++", "unipc") or first == 999 else 901)
    assert scheduler.config.prediction_type == "epsilon"


def test_a_scheduler_of_which_nothing_is_said_stays_as_it_is():
    assert with_noise(SD1, NoiseSpec()) is SD1
    assert with_noise(SD1, NoiseSpec(zero_snr=False)) is SD1, "it knows none"


@pytest.mark.parametrize(
    ("name", "noise", "message", "mend"),
    [
        ("pndm", NoiseSpec("v_prediction", None, True), "PNDMScheduler has no zero terminal SNR", "ddim, euler, "),
        ("heun", NoiseSpec(zero_snr=True), "HeunDiscreteScheduler has no zero terminal SNR", "--scheduler"),
        ("lcm", NoiseSpec(timestep_spacing="linspace"), "LCMScheduler has no choice of timestep spacing", "euler"),
        ("euler", NoiseSpec(zero_snr=True), "epsilon prediction", "--prediction-type v_prediction, or --no-zero-snr"),
    ],
)
def test_what_a_scheduler_can_not_do_is_refused_with_what_can(name, noise, message, mend):
    with pytest.raises(UsageError, match=message) as caught:
        with_noise(make_scheduler(name, SD1), noise)
    assert mend in caught.value.hint


def test_without_a_name_it_is_the_models_own_scheduler():
    assert make_scheduler(None, SD1) is SD1


def test_dpm_is_never_the_stochastic_one():
    own = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    assert make_scheduler("dpm++", own).config.algorithm_type == "dpmsolver++"


def test_latents_are_never_clipped_unless_the_model_says_so():
    assert make_scheduler("ddim", SD1).config.clip_sample is False
    assert make_scheduler("ddim", diffusers.DDIMScheduler(clip_sample=True)).config.clip_sample is True


def test_pndm_for_another_models_scheduler_has_no_warm_up():
    scheduler = make_scheduler("pndm", diffusers.EulerDiscreteScheduler())
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == 51


def test_heun_calls_the_unet_twice_a_step():
    scheduler = make_scheduler("heun", SD1)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 19


@pytest.mark.parametrize("name", SCHEDULERS)
def test_web_uis_know_the_names(name):
    assert sampler_name(make_scheduler(name, SD1)) == SAMPLERS[name]


def test_an_unknown_scheduler_keeps_its_class_name():
    assert sampler_name(diffusers.DDPMScheduler()) == "DDPM"


@pytest.mark.parametrize(
    ("name", "config", "sampler"),
    [
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "DPM++ 2M SDE Heun"),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "DPM++ 3M SDE"),
        ("DPMSolverMultistep", {"solver_order": 3}, "DPM++ 3M"),
        ("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "DPMSolverMultistep"),
        ("LMSDiscrete", {}, "LMS"),
        ("KDPM2Discrete", {}, "DPM2"),
        ("KDPM2AncestralDiscrete", {}, "DPM2 a"),
    ],
)
def test_variants_of_a_class_have_names_of_their_own(name, config, sampler):
    assert sampler_name(getattr(diffusers, f"{name}Scheduler").from_config(SD1.config, **config)) == sampler


# What web UIs compute for 20 steps: linspace(999, 0, 20); 1, 51, …, 951; linspace(999, 0, 21) without its end; every
# fiftieth from the end.
@pytest.mark.parametrize(
    ("name", "config", "spacing"),
    [
        ("euler", {}, "Uniform"),
        ("euler", {"timestep_spacing": "leading"}, "DDIM"),
        ("euler", {"timestep_spacing": "trailing"}, "Simple"),
        ("heun", {"timestep_spacing": "leading"}, "DDIM"),
        ("heun", {"timestep_spacing": "linspace"}, "Uniform"),
        ("dpm++", {"timestep_spacing": "linspace"}, "SGM Uniform"),
        ("dpm++", {"timestep_spacing": "trailing"}, "Simple"),
        ("dpm++", {"use_karras_sigmas": True}, "Karras"),
        ("dpm++", {"use_exponential_sigmas": True}, "Exponential"),
        ("pndm", {}, None),
        ("ddim", {}, None),
        ("unipc", {}, None),
        ("lcm", {}, None),
    ],
)
def test_the_spacing_is_named_wherever_web_uis_would_take_another(name, config, spacing):
    made = make_scheduler(name, SD1)
    scheduler = type(made).from_config(made.config, **config)
    for steps in (4, 20, 50):
        scheduler.set_timesteps(steps)
        assert schedule_type(scheduler) == spacing


def test_a_spacing_that_no_web_ui_has_is_called_by_the_nearest():
    own = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", steps_offset=1)
    own.set_timesteps(20)  # 941, 894, …, 48
    assert schedule_type(own) == "DDIM"


def test_a_spacing_of_one_step_has_a_name_too():
    scheduler = make_scheduler("euler", diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"))
    assert schedule_type(scheduler) is None  # nothing is set
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    assert schedule_type(scheduler) == "Uniform"


def test_the_noise_schedule_of_zero_snr_has_a_name():
    assert noise_schedule(SD1) is None
    assert noise_schedule(diffusers.DDIMScheduler(rescale_betas_zero_snr=True)) == "Zero Terminal SNR"


# Stable Diffusion's DDIM and PNDM begin at timestep 1, so that the last of a thousand steps would be at 1000; DPM++ and
# UniPC round two of a thousand to one timestep.
MOST_STEPS = {"lcm": 50, "euler": 1000, "euler-a": 1000, "heun": 1000}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_more_steps_than_there_are_is_a_usage_error(name):
    scheduler, most = make_scheduler(name, SD1), MOST_STEPS.get(name, 999)
    keep_on_host(scheduler)
    before = scheduler.num_inference_steps
    check_steps(scheduler, most)
    for steps in (most + 1, 10**9):
        with pytest.raises(UsageError, match=str(steps)) as caught:
            check_steps(scheduler, steps)
        assert caught.value.hint == f"use --steps {most}"
    assert scheduler.num_inference_steps == before


@pytest.mark.parametrize("name", SCHEDULERS)
def test_as_many_steps_as_are_let_through_run(name):
    result = denoise(make_scheduler(name, SD1), MOST_STEPS.get(name, 999), lambda latents, _: latents * 0.5)
    assert torch.isfinite(result).all()


def test_karras_spacing_may_be_at_a_timestep_twice():
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(SD1.config, use_karras_sigmas=True)
    scheduler.set_timesteps(200)
    assert len(set(scheduler.timesteps.tolist())) < 200
    check_steps(scheduler, 200)


# --- what can't run is known before anything is built ----------------------------------------------------------------


@pytest.mark.parametrize("own", ["PNDM", "EulerDiscrete", "DPMSolverMultistep", "DDPM"])
@pytest.mark.parametrize(
    "values",
    [
        {"prediction_type": "evil"},
        {"timestep_spacing": "x"},
        {"trained_betas": [0.1] * 50},
        {"beta_start": float("nan")},
    ],
)
def test_a_configuration_that_fails_in_a_step_fails_before_the_first(own, values):
    scheduler = getattr(diffusers, f"{own}Scheduler").from_config({**STORED, **values})
    with pytest.raises(ModelError, match=f"the model's scheduler configuration does not do for {own}Scheduler"):
        check_steps(scheduler, 4)


@pytest.mark.parametrize("name", ["pndm", "ddim"])
@pytest.mark.parametrize(("offset", "steps"), [(-50, 4), (-1000, 1), (1000, 1), (5000, 30)])
def test_timesteps_that_no_model_was_trained_for_are_refused(name, offset, steps):
    """A negative one counts from the end of the tables: a picture, though a wrong one."""
    scheduler = make_scheduler(name, diffusers.DDIMScheduler.from_config(SD1.config, steps_offset=offset))
    with pytest.raises(ModelError, match=r"its timesteps are -?[0-9]+ to -?[0-9]+, and there are 0 to 999"):
        check_steps(scheduler, steps)


@pytest.mark.parametrize(
    "name",
    ["RePaint", "DDPMWuerstchen", "ScoreSdeVe", "KarrasVe", "FlowMatchEulerDiscrete", "DDIMInverse", "CogVideoXDPM"],
)
def test_schedulers_that_are_none_of_text_to_image_are_refused(name):
    with pytest.raises(ModelError, match=f"{name}Scheduler"):
        check_steps(getattr(diffusers, f"{name}Scheduler")(), 4)


def test_a_scheduler_that_adds_no_noise_starts_from_none_but_text():
    scheduler = diffusers.IPNDMScheduler()
    check_steps(scheduler, 4)
    with pytest.raises(ModelError, match="it has no add_noise") as caught:
        check_steps(scheduler, 4, img2img=True)
    assert "--scheduler euler" in caught.value.hint


def test_steps_that_some_schedulers_lack_are_no_fault_of_others():
    """PNDM with its Runge-Kutta warm-up can't run one step, and EDM's timesteps are logarithms below zero."""
    check_steps(diffusers.PNDMScheduler(), 20)
    check_steps(diffusers.EDMEulerScheduler(), 20)
    check_steps(diffusers.TCDScheduler(), 50)
    with pytest.raises(UsageError, match="TCDScheduler runs at most 50 steps, got 51"):
        check_steps(diffusers.TCDScheduler(), 51)


def test_checking_draws_no_numbers():
    state = torch.get_rng_state()
    check_steps(make_scheduler("euler-a", SD1), 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_of_the_models_own_scheduler_its_configuration_is_enough(name):
    one, other = make_scheduler(name, SD1), make_scheduler(name, Settings(STORED))
    assert {**one.config, "_use_default_values": 0} == {**other.config, "_use_default_values": 0}


def test_a_name_for_a_configuration_that_makes_no_such_scheduler():
    with pytest.raises(ModelError, match="does not do for EulerDiscreteScheduler: "):
        make_scheduler("euler", Settings({"beta_start": "x"}))


# --- nothing to wait for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_reads_what_is_on_the_device(name, steps):
    """Meta tensors have no values: whoever asks for one, as a wait for the GPU would, raises."""
    scheduler = make_scheduler(name, SD1)
    keep_on_host(scheduler)
    scheduler.set_timesteps(steps, device="meta")
    latents = torch.empty((1, 4, 8, 8), device="meta")
    generator = torch.Generator()
    seeded = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for timestep in scheduler.timesteps:
        noise = scheduler.scale_model_input(latents, timestep) * 0.5
        latents = scheduler.step(noise, timestep, latents, **seeded).prev_sample
    assert latents.device.type == "meta"
    assert latents.dtype == torch.float32


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_on_the_host_change_nothing(name):
    plain, kept = make_scheduler(name, SD1), make_scheduler(name, SD1)
    keep_on_host(kept)
    one, other = (denoise(scheduler, 5, lambda latents, _: latents * 0.5) for scheduler in (plain, kept))
    assert torch.equal(one, other)


def same(scheduler):
    return scheduler


COPIES = {
    "itself": same,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
    "a copy's pickle": lambda scheduler: pickle.loads(pickle.dumps(copy.copy(scheduler), protocol=0)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_runs_its_own_number_of_steps_on_the_host(name, how):
    """One set of engines, a scheduler a worker: what one is set to is nothing to the others."""
    scheduler, plain = make_scheduler(name, SD1), make_scheduler(name, SD1)
    keep_on_host(scheduler)
    scheduler.set_timesteps(5, device="meta")
    copied = COPIES[how](scheduler)
    assert torch.equal(copied.timesteps, scheduler.timesteps)
    copied.set_timesteps(12, "meta")
    plain.set_timesteps(12)
    assert torch.equal(copied.timesteps, plain.timesteps)
    if copied is not scheduler:
        before = len(scheduler.timesteps)
        assert before < len(copied.timesteps)
        scheduler.set_timesteps(4, device="meta")
        assert torch.equal(copied.timesteps, plain.timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_on_the_host_a_scheduler_is_still_what_it_was(name, tmp_path):
    scheduler, plain = make_scheduler(name, SD1), make_scheduler(name, SD1)
    for _ in range(2):  # the second time changes nothing
        keep_on_host(scheduler)
    assert isinstance(scheduler, type(plain))
    assert type(scheduler).__name__ == type(plain).__name__
    assert len(type(scheduler).__mro__) == len(type(plain).__mro__) + 2
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(plain.set_timesteps)
    assert str(scheduler) == str(plain)
    scheduler.save_pretrained(tmp_path)
    assert type(type(plain).from_pretrained(tmp_path)) is type(plain)
    again = type(scheduler).from_config(scheduler.config)
    assert again.config == scheduler.config


def test_a_pipelines_own_timesteps_and_sigmas_stay_on_the_host():
    """diffusers looks for these arguments in the signature."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

    scheduler = diffusers.EulerDiscreteScheduler.from_config(SD1.config)
    keep_on_host(scheduler)
    for given in ({"timesteps": [900, 500, 100]}, {"sigmas": [9.0, 2.0, 0.5, 0.0]}):
        timesteps, count = retrieve_timesteps(copy.deepcopy(scheduler), device="meta", **given)
        assert (len(timesteps), count, timesteps.device.type) == (3, 3, "cpu")


def test_a_wrong_call_is_the_schedulers_own_error():
    scheduler = make_scheduler("ddim", SD1)
    keep_on_host(scheduler)
    for wrong in ({}, {"num_inference_steps": 3, "sigma": [1.0]}):
        with pytest.raises(TypeError, match=r"num_inference_steps|sigma"):
            scheduler.set_timesteps(**wrong)


def test_a_scheduler_that_is_let_go_is_of_its_own_class_again():
    scheduler = make_scheduler("euler", SD1)
    keep_on_host(scheduler)
    assert type(scheduler) is not diffusers.EulerDiscreteScheduler
    let_go(scheduler)
    assert type(scheduler) is diffusers.EulerDiscreteScheduler
    let_go(scheduler)
    assert type(scheduler) is diffusers.EulerDiscreteScheduler


def test_a_scheduler_that_knows_no_devices_stays_as_it_is():
    keep_on_host(own := type("Own", (), {"set_timesteps": lambda self, steps: steps})())
    assert own.set_timesteps(3) == 3
