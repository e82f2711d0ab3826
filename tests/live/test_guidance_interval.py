"""Guidance in a part of a run, on live pipelines, beside plain diffusers that does the same by hand with one seed.

Most run in Inductor's engines that PyTorch runs here (no compiler): those of a fixed number of rows, and no weights.
"""

from __future__ import annotations

import factories
import ip_adapters
import pytest
import test_controlnet
import torch
import torch_engines
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from test_accelerate import NOISE, TOLERANCE, differ, latents
from test_controlnet import MAP, MASK

import sdtrt
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.live.swap import swapped_of
from sdtrt.pipeline.opening import memory
from sdtrt.specs import GuidanceInterval

pytestmark = pytest.mark.usefixtures("on_the_cpu")
MIDDLE = GuidanceInterval(0.25, 0.75)
SIZE = {"height": 64, "width": 64}
SLOW = pytest.mark.slow
PIX2PIX = {"in_channels": 8}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def both(tokenizer, directory, monkeypatch):
    """Make a plain pipeline and the same one accelerated."""
    torch_engines.instead_of_inductor(monkeypatch)

    def made(cls=StableDiffusionPipeline, kind="sd1", parts=dict, scheduler=None, unet=None, **options):
        given = {"height": 64, "width": 64, "backend": "inductor", "engine_dir": directory.path, "progress": False}
        given |= {"components": ("unet",), "guidance_interval": MIDDLE}
        small = {**factories.SMALLEST[kind], **(unet or {})}
        plain, pipe = (
            factories.live_pipeline(
                cls, kind, **{"tokenizer": tokenizer, "unet": factories.small_unet(kind, **small), **parts()}
            )
            for _ in range(2)
        )
        for one in (plain, pipe) if scheduler else ():
            one.scheduler = scheduler.from_config(one.scheduler.config)
        return plain, sdtrt.accelerate(pipe, **{**given, **options})

    return made


def again(pipe, interval=None, **options):
    """Accelerate a pipeline once more, with another interval."""
    directory = swapped_of(pipe)["unet"].settings.directory.path
    given = {"backend": "inductor", "components": ("unet",), "engine_dir": directory, "progress": False}
    return sdtrt.accelerate(pipe, **SIZE, **given, guidance_interval=interval, **options)


def by_hand(pipe, guided, copies=2, group=1):
    """Have a plain pipeline's UNet give the prompt's part for all rows, but in the evaluations of these numbers."""
    forward, calls = type(pipe.unet).forward, []

    def call(*args, **kwargs):
        (noise,) = forward(pipe.unet, *args, **{**kwargs, "return_dict": False})
        calls.append(len(noise))
        return (noise if len(calls) - 1 in guided else torch.cat([noise.chunk(copies)[group]] * copies),)

    pipe.unet.forward = call
    return calls


def alike(found, expected):
    """Whether latents are equal up to rounding, which grows with them."""
    return differ(found, expected) <= TOLERANCE * max(1.0, float(expected.abs().max()))


def rows_of(pipe, part="unet"):
    """Watch how many rows each call of an engine has."""
    seen = []
    for one in swapped_of(pipe)[part].engines:
        run = one.session.run
        one.session.run = lambda feeds, run=run: (seen.append(len(feeds["sample"])), run(feeds))[1]
    return seen


def names(directory):
    return sorted(entry.name for entry in directory.entries("engine"))


@pytest.mark.feature("Guidance in a part of a run (`guidance_interval`)", "sd1", "inductor")
@pytest.mark.parametrize(
    ("scheduler", "guided", "rows"),
    [
        (DDIMScheduler, {1, 2}, [1, 2, 2, 1]),
        pytest.param(EulerAncestralDiscreteScheduler, {1, 2}, [1, 2, 2, 1], marks=SLOW),
        pytest.param(DPMSolverMultistepScheduler, {1, 2}, [1, 2, 2, 1], marks=SLOW),
        pytest.param(PNDMScheduler, {*range(4, 12)}, [1] * 4 + [2] * 8 + [1], marks=SLOW),  # with Runge-Kutta's steps
        pytest.param(HeunDiscreteScheduler, {2, 3, 4, 5}, [1, 1, 2, 2, 2, 2, 1], marks=SLOW),
    ],
)
def test_steps_outside_run_the_prompts_rows_alone_with_any_scheduler(both, scheduler, guided, rows):
    plain, pipe = both(scheduler=scheduler)
    seen, whole = rows_of(pipe), latents(plain, num_inference_steps=4)
    by_hand(plain, guided)
    expected = latents(plain, num_inference_steps=4)
    found = latents(pipe, num_inference_steps=4)
    assert alike(found, expected)
    assert differ(found, whole) > 100 * TOLERANCE  # it has an effect
    assert seen == rows
    assert torch.equal(latents(pipe, num_inference_steps=4), found)  # the same prompt once more
    assert seen == rows * 2


@SLOW
@pytest.mark.feature("Guidance in a part of a run (`guidance_interval`)", "sd1", "onnxruntime")
def test_an_engine_of_any_size_serves_both(both, engine_dir, capsys):
    plain, pipe = both(backend="onnxruntime", engine_dir=engine_dir, progress=True)
    assert "second engine" not in capsys.readouterr().err
    seen = rows_of(pipe)
    by_hand(plain, {1, 2})
    assert alike(latents(pipe, num_inference_steps=4), latents(plain, num_inference_steps=4))
    assert seen == [1, 2, 2, 1]
    assert len(sdtrt.status(pipe)["unet"].engines) == 1


@SLOW
def test_it_is_what_a_callback_makes_that_turns_guidance_off(both):
    """diffusers' own way, for the end of a run; the engine for one row serves those steps, too."""
    plain, pipe = both(guidance_interval=GuidanceInterval(0, 0.5))

    def turn_off(one, step, _timestep, tensors):
        if step == 1:
            one._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = {"num_inference_steps": 4, "guidance_scale": 5.0}
    called = {"callback_on_step_end": turn_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = latents(plain, **options, **called)
    seen = rows_of(pipe)
    assert alike(latents(pipe, **options), expected)
    assert alike(latents(pipe, **options, **called), expected)
    assert seen == [2, 2, 1, 1] * 2


@SLOW
def test_steps_inside_are_the_full_runs_as_long_as_their_inputs_are(both, tokenizer):
    _, pipe = both(guidance_interval=GuidanceInterval(0, 0.5))
    kept = {}

    def keep(name):
        return {
            "callback_on_step_end": lambda _pipe, step, _t, tensors: (
                kept.update({(name, step): tensors["latents"].clone()}) or {}
            )
        }

    latents(pipe, num_inference_steps=4, **keep("part"))
    again(pipe)
    latents(pipe, num_inference_steps=4, **keep("whole"))
    same = [torch.equal(kept["part", step], kept["whole", step]) for step in range(4)]
    assert same == [True, True, False, False]


def test_the_pair_has_one_copy_of_the_weights_serves_no_guidance_and_other_intervals_build_nothing(both, directory):
    plain, pipe = both()
    two, one = swapped_of(pipe)["unet"].engines
    views = [engine.session.weight_views() for engine in (two, one)]
    assert all(views[0][name].data_ptr() == view.data_ptr() for name, view in views[1].items())
    assert [engine.sizes for engine in sdtrt.status(pipe)["unet"].engines] == [
        f"batch {rows}-{rows}, 64-64 x 64-64 pixels" for rows in (2, 1)
    ]
    built = names(directory)
    assert alike(latents(pipe, guidance_scale=1.0), latents(plain, guidance_scale=1.0))
    for start, stop in ((0, 0.5), (0.5, 1), (0.1, 0.9), (0, 1)):
        again(pipe, GuidanceInterval(start, stop))
        latents(pipe, num_inference_steps=3)
    assert names(directory) == built
    assert alike(latents(pipe), latents(plain))


@SLOW
def test_a_second_engine_of_a_unet_that_stays_is_counted_by_the_memory_check(both, monkeypatch):
    _, pipe = both(guidance_interval=None)
    asked = []
    monkeypatch.setattr(memory, "check_memory", lambda _request, entries: asked.append(list(entries)))
    for options in ({}, {"cache_interval": 2}):
        for _ in range(2):
            again(pipe, MIDDLE, **options)
    shallow = {"unet_shallow", "unet_shallow_prompt_rows"}
    assert [set(names) for names in asked] == [{"unet_prompt_rows"}, set(), {"unet_prompt_rows", *shallow}, set()]


@SLOW
def test_the_whole_run_is_nothing_at_all_to_the_last_bit(both, directory):
    _, pipe = both(guidance_interval=None)
    before, built = latents(pipe), names(directory)
    assert len(swapped_of(pipe)["unet"].engines) == 1
    _, same = both(guidance_interval=GuidanceInterval(0.0, 1.0))
    assert len(swapped_of(same)["unet"].engines) == 1
    assert torch.equal(latents(same), before)
    assert names(directory) == built


@SLOW
def test_two_prompts_at_once_are_each_alone(both):
    _, pipe = both(batch_size=2)
    seen, texts = rows_of(pipe), ["a red circle", "a blue star"]
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 3)]
    given = {"num_inference_steps": 4, "height": 64, "width": 64, "output_type": "latent"}
    made = pipe(texts, generator=noise, **given).images
    assert seen == [2, 4, 4, 2]
    for text, one in zip(texts, made, strict=True):
        alone = pipe(text, generator=torch.Generator().manual_seed(3), **given).images
        assert alike(alone[0], one)


@pytest.mark.parametrize(
    ("cls", "options", "guided"),
    [
        (StableDiffusionImg2ImgPipeline, {"image": NOISE, "strength": 0.5, "num_inference_steps": 8}, {1, 2}),
        pytest.param(StableDiffusionInpaintPipeline, {"image": NOISE, "mask_image": MASK, **SIZE}, {1, 2}, marks=SLOW),
    ],
)
def test_a_run_from_an_image_is_what_really_runs(both, cls, options, guided):
    plain, pipe = both(cls)
    options = {"num_inference_steps": 4, **options}
    seen = rows_of(pipe)
    by_hand(plain, guided)
    assert alike(latents(pipe, **options), latents(plain, **options))
    assert seen == [1, 2, 2, 1]


@SLOW
def test_pipelines_of_the_same_modules_run_by_turns_and_each_counts_its_own_steps(both):
    plain, pipe = both()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = rows_of(pipe)

    def between(_pipe, step, _timestep, tensors):
        if step == 0:
            latents(other, image=NOISE, strength=0.5, num_inference_steps=8)
        return tensors

    found = latents(pipe, num_inference_steps=4, callback_on_step_end=between)
    assert seen == [1, *[1, 1, 2, 2, 2, 2, 1], 2, 2, 1]
    by_hand(plain, {1, 2})
    assert alike(found, latents(plain, num_inference_steps=4))


@SLOW
def test_interrupted_runs_and_other_steps_each_time_are_told_apart(both):
    _, pipe = both()
    seen = rows_of(pipe)

    def stop(one, step, _timestep, tensors):
        one._interrupt = step == 1
        return tensors

    latents(pipe, num_inference_steps=4, callback_on_step_end=stop)
    latents(pipe, num_inference_steps=8)
    assert seen == [1, 2, 1, 1, 2, 2, 2, 2, 1, 1]
    assert len(pipe.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32)).sample) == 2  # by itself: as it is
    assert seen[-1] == 2


@SLOW
def test_guidance_rescale_and_embeddings_of_ones_own(both):
    plain, pipe = both()
    by_hand(plain, {1, 2})
    states = [torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    given = {"prompt": None, "prompt_embeds": states[0], "negative_prompt_embeds": states[1], "guidance_rescale": 0.7}
    one, other = (latents(each, num_inference_steps=4, **given) for each in (plain, pipe))
    assert alike(one, other)


@SLOW
@pytest.mark.feature("Guidance in a part of a run (`guidance_interval`)", "sdxl", "inductor")
def test_sdxl_and_the_schedule_that_a_refiner_shares(both):
    plain, pipe = both(StableDiffusionXLPipeline, "sdxl")
    by_hand(plain, {1, 2})  # of five steps, of which three run
    seen = rows_of(pipe)
    options = {"num_inference_steps": 5, "denoising_end": 0.6}
    expected = latents(plain, **options)
    assert alike(latents(pipe, **options), expected)
    assert seen == [1, 2, 2]
    refiner = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    latents(refiner, image=expected, num_inference_steps=5, denoising_start=0.6)
    assert seen[3:] == [1, 1]


@SLOW
@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (StableDiffusionInstructPix2PixPipeline, "sd1"),
        (StableDiffusionXLInstructPix2PixPipeline, "sdxl"),
    ],
)
def test_edits_run_the_first_third(both, cls, kind):
    plain, pipe = both(cls, kind, unet=PIX2PIX)
    options = {"image": NOISE, "image_guidance_scale": 1.5, "num_inference_steps": 4, "guidance_scale": 5.0}
    options |= {"height": 64, "width": 64} if kind == "sdxl" else {}
    whole = latents(plain, **options)
    by_hand(plain, {1, 2}, copies=3, group=0)
    seen = rows_of(pipe)
    expected, found = latents(plain, **options), latents(pipe, **options)
    assert alike(found, expected)
    assert differ(found, whole) > 100 * TOLERANCE
    assert seen == [1, 3, 3, 1]


def controlled():
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    return {"unet": unet, "controlnet": test_controlnet.small_controlnet(unet)}


@SLOW
@pytest.mark.parametrize("in_engine", [True, False])
def test_a_controlnet_runs_the_prompts_rows_alone_in_an_engine_and_whole_in_pytorch(both, in_engine, directory):
    components = ("unet", "controlnet") if in_engine else ("unet",)
    plain, pipe = both(StableDiffusionControlNetPipeline, parts=controlled, components=components)
    by_hand(plain, {1, 2})
    seen, built = [rows_of(pipe, part) for part in components], names(directory)
    for options in ({}, {"control_guidance_end": 0.5}, {"controlnet_conditioning_scale": 0.4}):
        given = {"image": MAP, "num_inference_steps": 4, "height": 64, "width": 64, **options}
        by_hand(plain, {1, 2})
        assert alike(latents(pipe, **given), latents(plain, **given)), options
    assert seen == [[1, 2, 2, 1] * 3] * len(components)
    assert names(directory) == built


def several():
    unet = factories.small_unet("sd1", **factories.SMALLEST["sd1"])
    return {"unet": unet, "controlnet": [test_controlnet.small_controlnet(unet, seed) for seed in (7, 8)]}


@SLOW
def test_each_of_several_controlnets_runs_the_prompts_rows_alone(both):
    plain, pipe = both(StableDiffusionControlNetPipeline, parts=several, components=("unet", "controlnet"))
    by_hand(plain, {1, 2})
    seen = [rows_of(pipe, part) for part in ("unet", "controlnet", "controlnet_2")]
    given = {"image": [MAP, NOISE], "num_inference_steps": 4, **SIZE}
    assert alike(latents(pipe, **given), latents(plain, **given))
    assert seen == [[1, 2, 2, 1]] * 3


@SLOW
def test_in_guess_mode_the_controlnet_has_the_prompts_rows_alone_in_all_steps(both):
    plain, pipe = both(StableDiffusionControlNetPipeline, parts=controlled, components=("unet", "controlnet"))
    by_hand(plain, {1, 2})
    seen = rows_of(pipe, "controlnet")
    given = {"image": MAP, "num_inference_steps": 4, "guess_mode": True, **SIZE}
    assert alike(latents(pipe, **given), latents(plain, **given))
    assert seen == [1, 1, 1, 1]


def adapted():
    with factories.seeded(5):
        adapter = T2IAdapter(channels=[32, 64])
    return {"adapter": adapter.eval().requires_grad_(False)}


@SLOW
def test_t2i_adapters_have_their_effect_in_all_steps(both):
    plain, pipe = both(StableDiffusionAdapterPipeline, parts=adapted)
    by_hand(plain, {1, 2})
    seen, given = rows_of(pipe), {"image": MAP, "num_inference_steps": 4, **SIZE}
    assert alike(latents(pipe, **given), latents(plain, **given))
    assert differ(latents(pipe, **given, adapter_conditioning_scale=0.0), latents(plain, **given)) > 100 * TOLERANCE
    assert seen == [1, 2, 2, 1] * 2


@SLOW
def test_two_ip_adapters_have_as_many_scales_as_there_are_rows(both, tmp_path):
    plain, pipe = both()
    files = [ip_adapters.write(tmp_path / str(seed), plain.unet, seed=seed) for seed in (0, 1)]
    for one in (plain, pipe):
        ip_adapters.load(one, *files, scale=[0.6, 0.3])
    by_hand(plain, {1, 2})
    given = {"ip_adapter_image": [NOISE, MAP], "num_inference_steps": 4}
    expected = latents(plain, **given)
    assert alike(latents(pipe, **given), expected)
    seen = rows_of(pipe)
    assert alike(latents(pipe, **given), expected)
    assert seen == [1, 2, 2, 1]
    pipe.set_ip_adapter_scale([0.0, 0.0])
    assert differ(latents(pipe, **given), expected) > 10 * TOLERANCE


@SLOW
def test_changed_weights_are_in_both_engines_and_pytorch_runs_no_more_rows(both):
    plain, pipe = both(on_miss="torch")
    latents(pipe, num_inference_steps=4)
    for one in (plain, pipe):
        with torch.no_grad():
            one.unet.conv_out.weight.mul_(1.5)
            one.unet.conv_in.weight.data = one.unet.conv_in.weight.data * 0.5
    by_hand(plain, {1, 2})
    assert alike(latents(pipe, num_inference_steps=4), latents(plain, num_inference_steps=4))
    seen = rows_of(pipe)
    for one in (plain, pipe):
        one.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)  # which PyTorch runs
    by_hand(plain, {1, 2})
    assert alike(latents(pipe, num_inference_steps=4), latents(plain, num_inference_steps=4))
    assert seen == []
    sdtrt.restore(pipe)
    assert differ(latents(pipe, num_inference_steps=4), latents(plain, num_inference_steps=4)) > 100 * TOLERANCE


@SLOW
def test_a_call_of_another_size_has_both_its_engines_before_it_begins(both, directory):
    _, pipe = both()
    built, during = names(directory), []
    options = {"height": 72, "width": 64, "num_inference_steps": 4}
    latents(pipe, **options, callback_on_step_end=lambda *_: during.append(len(names(directory))) or {})
    assert during == [len(built) + 2] * 4


@SLOW
def test_what_has_rows_of_another_meaning_is_refused_by_name(both):
    with pytest.raises(EngineError, match="which rows of StableDiffusionPAGPipeline are the prompt's") as caught:
        both(StableDiffusionPAGPipeline)
    assert "leave it out for this pipeline" in caught.value.hint

    class Own(StableDiffusionPipeline):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Another(Own):
        def __call__(self, *_args, **_kwargs):
            return self.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32))

    _, pipe = both(Own)
    seen = rows_of(pipe)
    latents(pipe, num_inference_steps=2)
    assert seen == [2, 1]  # int(0.25 * 2) is 0
    with pytest.raises(EngineError, match="which rows of Another are the prompt's"):
        Another(**pipe.components, requires_safety_checker=False)()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": False}, "guidance_interval 0.25:0.75 is about guidance, and guidance=False"),
        ({"components": ("text_encoder",)}, "guidance_interval 0.25:0.75 is about the unet, which is not among"),
    ],
)
def test_an_interval_of_nothing_is_refused(both, options, words):
    with pytest.raises(UsageError, match=words):
        both(**options)
