"""Deep caching in live pipelines, beside diffusers' own modules, one layer of which takes what an earlier step gave it.

PyTorch runs here what the backend `inductor` would compile: keys, entries, sessions and steps are the real ones.
"""

from __future__ import annotations

import factories
import pytest
import torch
import torch_engines
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from peft import LoraConfig
from test_controlnet import MAP, MASK, PICTURE, names, small_controlnet
from test_guidance_interval import by_hand, rows_of

import sdtrt
from sdtrt.backends.unchanged import same_memory
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.live.swap import swapped_of
from sdtrt.specs import DeepCaching, GuidanceInterval

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents of unit variance in fp32 on the CPU
VISIBLE = 10 * TOLERANCE
STEPS = 12
PIPELINES = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The engine directory of all these tests."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


def small_unet(kind):
    """One whose norms amplify no rounding, as those of groups of one channel do."""
    return factories.small_unet(kind, **factories.SMALLEST[kind], norm_num_groups=8)


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(cls=None, kind="sd1", **parts):
        given = {"tokenizer": tokenizer, "unet": small_unet(kind), **parts}
        return factories.live_pipeline(cls or PIPELINES[kind], kind, **given)

    return made


@pytest.fixture
def accelerate(directory, monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)

    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory.path, "progress": False, "components": ("unet",)}
        return sdtrt.accelerate(pipe, **{**given, "backend": "inductor", "cache_interval": 3, **options})

    return call


class Reference:
    """Diffusers' own UNet, whose layer at the deep feature's place takes over what it was given in a whole step.

    Args:
        whole: says of each evaluation of a run whether it is a whole step.
        depth: of the layers on the way up, counted from the end.
    """

    def __init__(self, unet, whole=lambda step: step % 3 == 0, depth=1):
        skips = [unet.conv_in.out_channels]  # channels of each skip connection
        for block in unet.down_blocks:
            count = len(block.resnets) + (block.downsamplers is not None)
            skips += [block.resnets[-1].out_channels] * count
        layer = [layer for block in unet.up_blocks for layer in block.resnets][-depth]
        self.channels = layer.in_channels - skips[depth - 1]
        self.whole, self.step, self.kept = whole, 0, None
        self.remove = layer.register_forward_pre_hook(self.join).remove

    def join(self, layer, args):
        """Put the kept feature in the place of what comes from below, or keep that."""
        hidden, *rest = args
        if self.whole(self.step):
            self.kept = hidden[:, : self.channels].clone()
        self.step += 1
        return torch.cat([self.kept, hidden[:, self.channels :]], dim=1), *rest


def run(pipe, **options):
    """Latents of a run; those of the seed 3."""
    sized = {} if "image" in options else {"height": 64, "width": 64}
    given = {"prompt": "a red circle", "output_type": "latent", "num_inference_steps": STEPS, **sized}
    given |= {"guidance_scale": 2.0}
    return pipe(**{"generator": torch.Generator().manual_seed(3), **given, **options}).images


def differ(found, expected):
    """How much latents differ at most, for latents of unit variance."""
    return float((found - expected).abs().max() / expected.std())


def shallow_of(pipe):
    """The session of the shallow steps, and that of the whole ones."""
    (opened,) = swapped_of(pipe)["unet"].engines
    return opened.shallow, opened.session


RUNS = [
    ("sd1", PNDMScheduler(skip_prk_steps=True), None),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            ("sd1", DPMSolverMultistepScheduler(), 3),
            ("sd1", HeunDiscreteScheduler(), 1),
            ("sdxl", EulerDiscreteScheduler(), None),
        )
    ),
]


@pytest.mark.parametrize(("kind", "scheduler", "depth"), RUNS)
def test_a_run_is_that_of_diffusers_modules_with_the_deep_feature_kept(make, accelerate, kind, scheduler, depth):
    own = type(scheduler)
    plain, pipe = (make(kind=kind, scheduler=own.from_config(scheduler.config)) for _ in range(2))
    exact = run(plain)
    accelerate(pipe, cache_depth=depth)
    Reference(plain.unet, depth=depth or {"sd1": 1, "sdxl": 2}[kind])
    cached = run(plain)
    assert differ(cached, exact) > VISIBLE, "what is kept would not be told from what is computed"
    first = run(pipe)
    assert differ(first, cached) <= TOLERANCE
    assert torch.equal(run(pipe), first)


@pytest.mark.slow
def test_the_schedule_is_chosen_by_name_and_another_interval_builds_nothing(make, accelerate, tmp_path):
    directory = EngineDirectory(tmp_path / "engines")
    plain, pipe = make(), accelerate(make(), engine_dir=directory.path)
    built = names(directory)
    accelerate(pipe, cache_interval=4, cache_schedule="middle", engine_dir=directory.path)
    whole = DeepCaching(4, None, "middle").whole_steps(STEPS)
    Reference(plain.unet, whole=lambda step: step in whole)
    assert differ(run(pipe), run(plain)) <= TOLERANCE
    assert names(directory) == built
    accelerate(pipe, cache_depth=2, engine_dir=directory.path)
    assert len(names(directory) - built) == 2


@pytest.mark.slow
def test_a_seed_gives_the_same_picture_in_any_batch(make, accelerate):
    pipe, seeds = accelerate(make(), batch_size=1), (3, 4)
    alone = [run(pipe, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    both = run(pipe, prompt=["a red circle"] * 2, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    assert differ(both, torch.cat(alone)) <= TOLERANCE


@pytest.mark.slow
def test_an_interval_of_one_is_nothing_to_the_last_bit_and_few_steps_are_whole(make, accelerate, capsys):
    plain, pipe = accelerate(make(), cache_interval=1), accelerate(make(), progress=True)
    assert shallow_of(plain)[0] is None
    short = {"num_inference_steps": 9}
    assert differ(run(pipe, **short), run(plain, **short)) <= TOLERANCE
    assert "deep caching: off, as 9 steps are fewer than 10" in " ".join(capsys.readouterr().err.split())
    accelerate(pipe, cache_interval=1)
    assert torch.equal(run(pipe), run(plain))


def test_both_programs_compute_with_the_same_tensors_and_take_what_is_written_into_them(make, accelerate):
    plain, pipe = make(), accelerate(make())
    shallow, whole = shallow_of(pipe)
    views = whole.weight_views()
    assert all(same_memory(tensor, views[name]) for name, tensor in shallow.weight_views().items())
    for one in (plain, pipe):
        with torch.no_grad():
            one.unet.up_blocks[-1].resnets[-1].conv1.weight.mul_(1.5)
            one.unet.mid_block.resnets[0].conv1.weight.mul_(1.5)
    Reference(plain.unet)
    assert differ(run(pipe), run(plain)) <= TOLERANCE


class InterruptError(Exception):
    """Ends a run in its middle."""


def test_what_is_kept_is_dropped_with_its_run(make, accelerate):
    pipe = accelerate(make(StableDiffusionImg2ImgPipeline))
    given = {"image": PICTURE, "num_inference_steps": 20, "prompt_embeds": torch.randn(1, 77, 32), "prompt": None}
    given |= {"guidance_scale": 1.0}  # so that the conditioning is the same tensor in both calls

    def interrupt(pipe, step, timestep, tensors):
        if step == 4:
            raise InterruptError
        return {}

    fresh = run(pipe, **given, strength=0.6)
    for strength in (1.0, 0.6):
        with pytest.raises(InterruptError):
            run(pipe, **given, strength=strength, callback_on_step_end=interrupt)
        assert torch.equal(run(pipe, **given, strength=0.6), fresh)


@pytest.mark.slow
def test_what_is_kept_is_dropped_where_rows_the_prompt_or_adapters_change(make, accelerate):
    def change(step, act):
        return {"callback_on_step_end": lambda pipe, at, _, tensors: act(pipe, tensors) if at == step else {}}

    def unguided(pipe, tensors):
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    def prompted(pipe, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)}

    for act in (unguided, prompted):
        plain, pipe = make(), accelerate(make())
        options = {**change(3, act), "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        Reference(plain.unet, whole=lambda step: step % 3 == 0 or step == 4)
        assert differ(run(pipe, **options), run(plain, **options)) <= TOLERANCE, act


@pytest.mark.slow
def test_another_scale_of_a_lora_in_the_middle_of_a_run_drops_what_is_kept(make, accelerate):
    def adapted(pipe):
        with factories.seeded(5):
            pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v", "conv1"]))
        return pipe

    def rescale(pipe, step, timestep, tensors):
        if step == 3:
            pipe.unet.set_adapters("default", 0.2)
        return {}

    plain, pipe = adapted(make()), adapted(accelerate(make()))
    Reference(plain.unet, whole=lambda step: step % 3 == 0 or step == 4)
    found, expected = (run(one, callback_on_step_end=rescale) for one in (pipe, plain))
    assert differ(found, expected) <= TOLERANCE


@pytest.mark.slow
def test_guidance_in_a_part_of_the_run_and_deep_features_go_together(make, accelerate):
    plain, pipe = make(), accelerate(make(), cache_interval=2, guidance_interval=GuidanceInterval(0.25, 0.75))
    Reference(plain.unet, whole=lambda step: step % 2 == 0 or step in (3, 9))  # the rows are others there
    by_hand(plain, guided=set(range(3, 9)))
    rows = rows_of(pipe)
    assert differ(run(pipe), run(plain)) <= TOLERANCE
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1], "of the whole steps"


@pytest.mark.slow
def test_a_controlnet_counts_in_all_steps(make, accelerate):
    def controlled():
        unet = small_unet("sd1")
        return make(StableDiffusionControlNetPipeline, unet=unet, controlnet=small_controlnet(unet))

    plain, pipe = controlled(), accelerate(controlled())
    Reference(plain.unet)
    assert differ(run(pipe, image=MAP), run(plain, image=MAP)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_a_run_that_starts_from_an_image_counts_its_own_steps(make, accelerate, cls):
    plain, pipe = make(cls), accelerate(make(cls))
    Reference(plain.unet)
    masked = {"mask_image": MASK} if cls is StableDiffusionInpaintPipeline else {}
    options = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 20, **masked}
    assert differ(run(pipe, **options), run(plain, **options)) <= TOLERANCE


def test_what_does_not_go_together_is_refused_by_name(make, accelerate):
    with pytest.raises(UsageError, match="cache_interval=3 needs an engine of the unet") as caught:
        accelerate(make(), components=("vae_decoder",))
    assert "components=['unet']" in caught.value.hint
    with pytest.raises(UsageError, match="cache-depth 4 is none of this model: its unet has 4 skip") as caught:
        accelerate(make(), cache_depth=4)
    assert "--cache-depth 1 to 3" in caught.value.hint
    adapter = T2IAdapter(in_channels=3, channels=(32, 64), num_res_blocks=1, downscale_factor=8)
    with pytest.raises(UsageError, match="deep caching and a T2I-Adapter don't go together") as caught:
        accelerate(make(StableDiffusionAdapterPipeline, adapter=adapter))
    assert "leave cache_interval out" in caught.value.hint
    pipe = accelerate(make())
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    with pytest.raises(UsageError, match="deep caching and FreeU don't go together"):
        run(pipe)
