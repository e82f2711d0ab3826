"""Engines in pipelines that somebody else has made: pictures, what diffusers does with them, refusals, the end."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
from weakref import ref

import factories
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.utils import is_accelerate_available
from PIL import Image

import sdtrt
from sdtrt.backends.onnxruntime.backend import OnnxRuntime
from sdtrt.common.errors import EngineError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.live import accelerate as accelerating
from sdtrt.live import swap
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.parts import parked, reading
from sdtrt.pipeline.parts.pixels import round_on_device
from sdtrt.pipeline.parts.reading import Reading, block_sums
from sdtrt.pipeline.parts.schedulers import keep_on_host
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
UNET_ALONE = ("unet",)
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
CALL = (torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32))  # of a UNet
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.fixture
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(cls=StableDiffusionPipeline, kind="sd1", **parts):
        return factories.live_pipeline(cls, kind, **{"tokenizer": tokenizer, **parts})

    return made


@pytest.fixture
def accelerate(engine_dir):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": engine_dir, "progress": False}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


def latents(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "latent"}
    given |= {} if "image" in options else {"height": 64, "width": 64}
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    """How much latents differ at most."""
    return float((found - expected).abs().max())


def pixels(pipe, **options):
    return np.asarray(latents(pipe, output_type="np", **options)) * 255


class Subclass(StableDiffusionPipeline):
    """Somebody's own pipeline."""


@pytest.mark.parametrize(
    ("cls", "kind"),
    [(StableDiffusionPipeline, "sd1"), (Subclass, "sd2"), (StableDiffusionXLPipeline, "sdxl")],
)
@pytest.mark.feature("Text to image", "sd1 sd2 sdxl", "onnxruntime")
def test_a_pipeline_made_in_memory_gives_its_pictures_in_engines_and_restored_to_the_last_bit(
    make, accelerate, cls, kind
):
    pipe = make(cls, kind)
    plain, picture = latents(pipe), pixels(pipe)
    attributes = {name: dict(module.__dict__) for name, module in modules_of(pipe).items()}
    assert accelerate(pipe) is pipe
    assert sdtrt.status(pipe)["unet"].is_in_engine
    assert sdtrt.status(pipe)["vae_decoder"].is_in_engine
    assert differ(latents(pipe), plain) <= TOLERANCE
    assert np.abs(pixels(pipe) - picture).max() <= 2
    scheduler, processor = type(pipe.scheduler), type(pipe.image_processor)
    keep_on_host(pipe.scheduler)  # as on a GPU
    round_on_device(pipe.image_processor)
    assert type(pipe.image_processor) is not processor
    assert differ(latents(pipe), plain) <= TOLERANCE
    sdtrt.restore(pipe)
    assert type(pipe.scheduler) is scheduler
    assert type(pipe.image_processor) is processor
    assert torch.equal(latents(pipe), plain)
    assert {name: dict(module.__dict__) for name, module in modules_of(pipe).items()} == attributes
    assert not sdtrt.status(pipe)["unet"].is_in_engine


def modules_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.feature("Image to image", "sd1", "onnxruntime")
@pytest.mark.feature("Inpainting", "sd1", "onnxruntime")
@pytest.mark.slow
def test_image_and_inpainting_pipelines_encode_in_an_engine(make, accelerate):
    pipe = make(StableDiffusionImg2ImgPipeline, vae=factories.small_vae())
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    inpaint.set_progress_bar_config(disable=True)
    options = {"image": NOISE, "strength": 0.9}
    masked = {**options, "mask_image": Image.new("L", (64, 64), 255)}
    plain, filled = latents(pipe, **options), latents(inpaint, **masked)
    accelerate(pipe)
    assert {name: part.is_in_engine for name, part in parts_of(pipe).items()} == dict.fromkeys(parts_of(pipe), True)
    assert differ(latents(pipe, **options), plain) <= TOLERANCE
    assert differ(latents(inpaint, **masked), filled) <= TOLERANCE
    two = latents(pipe, **{**options, "image": [NOISE, NOISE], "prompt": ["a", "b"]})
    assert len(two) == 2
    sdtrt.restore(inpaint)  # the same modules
    assert torch.equal(latents(pipe, **options), plain)


def moments(vae, image):
    with torch.no_grad():
        return vae.encode(image).latent_dist.parameters


def test_an_image_of_one_colour_is_encoded_as_well_as_fp32_can(make, accelerate):
    """A norm divides a group of one channel, which is a constant but for its edges, by about nothing: 1e-7 more or less
    in the image makes 5e-4 in the latents, in PyTorch as well. Models have groups of several channels.
    """
    grey = torch.full((1, 3, 64, 64), 1 / 255)
    grain = 1e-7 * torch.randn(grey.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for groups, tolerance in ((8, None), (2, TOLERANCE)):
        pipe = make(StableDiffusionImg2ImgPipeline, vae=factories.small_vae(norm_num_groups=groups))
        wide = copy.deepcopy(pipe.vae).double()
        truth = moments(wide, grey.double())
        accelerate(pipe, components=("vae_encoder",))
        found = moments(pipe.vae, grey)
        assert differ(found, truth) <= (tolerance or 10 * differ(moments(wide, grey.double() + grain), truth))


def parts_of(pipe):
    return {part.part: part for part in sdtrt.status(pipe).parts}


@pytest.fixture
def pipe(make, accelerate):
    return accelerate(make(), components=UNET_ALONE)


def test_modules_stay_diffusers_own_and_are_saved_with_their_weights(make, pipe, tmp_path):
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert pipe.device == torch.device("cpu")
    assert pipe.unet.dtype == torch.float32
    pipe.unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    original = make().unet.state_dict()
    assert all(torch.equal(tensor, original[name]) for name, tensor in again.state_dict().items())


def test_other_pipelines_of_the_same_modules_share_the_engines(pipe):
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert other.unet is pipe.unet
    assert sdtrt.status(other)["unet"].is_in_engine
    shared = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    assert torch.equal(latents(shared), latents(pipe))


def test_schedulers_and_callbacks_go_on(make, pipe):
    plain, steps = make(), []
    for one in (plain, pipe):
        one.scheduler = EulerDiscreteScheduler()
    seen = latents(pipe, callback_on_step_end=lambda pipe, step, time, tensors: steps.append(step) or {})
    assert steps == [0, 1]
    expected = latents(plain)  # in the hundreds, as Euler's scheduler has them with weights by chance
    assert differ(seen, expected) <= TOLERANCE * float(expected.abs().max())


def test_copies_and_pickles_run_in_pytorch_and_a_shallow_copy_shares_the_engine(make, pipe):
    plain = latents(make())
    assert torch.equal(latents(copy.deepcopy(pipe)), plain)
    pipe.unet = pickle.loads(pickle.dumps(unet := pipe.unet))
    assert torch.equal(latents(pipe), plain)
    pipe.unet = copy.copy(unet)
    assert not torch.equal(latents(pipe), plain)
    twice = copy.deepcopy(copy.deepcopy(unet))
    assert twice.forward.__self__ is twice


def test_one_thread_runs_at_a_time(pipe):
    arguments = [(torch.randn(2, 4, 8, 8), time, torch.randn(2, 77, 32)) for time in range(4)]
    with torch.no_grad():
        expected = [pipe.unet(*given).sample for given in arguments]
    found = {}

    def call(number):
        with torch.no_grad():
            found[number] = pipe.unet(*arguments[number]).sample

    factories.in_threads(call, [(number,) for number in range(4)])
    assert all(torch.equal(found[number], one) for number, one in enumerate(expected))


@pytest.mark.parametrize("how", ["load", "accelerate"])
def test_pipelines_of_one_set_of_engines_run_in_threads_with_schedulers_and_tokenizers_of_their_own(
    load, make, accelerate, how
):
    first = load() if how == "load" else accelerate(make(vae=factories.small_vae()))
    pipes = [first, *(StableDiffusionPipeline.from_pipe(first) for _ in range(2))]
    for pipe in pipes:
        pipe.scheduler = EulerDiscreteScheduler()  # steps are counted there: threads that share one disturb each other
        pipe.tokenizer = copy.deepcopy(first.tokenizer)  # it remembers between its calls how it pads
        pipe.set_progress_bar_config(disable=True)
    expected = pixels(first)
    found = {}

    def call(number):
        found[number] = [pixels(pipes[number]) for _ in range(3)]

    factories.in_threads(call, [(number,) for number in range(3)])
    assert all(np.array_equal(one, expected) for own in found.values() for one in own)
    assert len(found) == 3


def test_one_call_at_a_time_changes_the_modules_that_pipelines_share(make, accelerate, directory):
    first = make()
    pipes = [first, StableDiffusionPipeline(**first.components, requires_safety_checker=False), make()]
    plain = latents(make())
    options = {"components": UNET_ALONE, "engine_dir": directory.path}
    factories.in_threads(lambda number: accelerate(pipes[number], **options), [(number,) for number in range(3)])
    assert pipes[0].unet.forward is pipes[1].unet.forward
    assert len(directory.entries("engine")) == 1
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert differ(latents(pipe), plain) <= TOLERANCE


def set_another(unet):
    unet.conv_in.weight.data = unet.conv_in.weight.data * 1.5


def add_in_place(unet):
    unet.conv_in.weight.data.add_(0.5)  # as peft merges: neither address nor version tell


def set_one_number(unet):
    unet.mid_block.resnets[0].conv1.weight.data[3, 5, 1, 1] += 0.5  # as none that a look compares


def load_another(unet):
    unet.load_state_dict(factories.small_unet("sd1", seed=5, **factories.SMALLEST["sd1"]).state_dict())


def add_a_layer(unet):
    unet.conv_in = torch.nn.Sequential(unet.conv_in, torch.nn.Identity())


@pytest.mark.parametrize("change", [set_another, add_in_place, set_one_number, load_another, add_a_layer])
def test_weights_that_change_are_never_run_by_the_old_engine(make, accelerate, change):
    pipe = accelerate(make(), components=("unet", "vae_decoder"))
    pixels(pipe)
    change(pipe.unet)
    with pytest.raises(EngineError, match="the unet has other weights than its engine") as caught:
        pixels(pipe)
    assert "sdtrt.restore(pipe)" in caught.value.hint
    assert "sdtrt.accelerate(pipe)" in caught.value.hint
    assert not sdtrt.status(sdtrt.restore(pipe))["unet"].is_in_engine
    latents(pipe)


def move(unet):
    for parameter in unet.parameters():
        parameter.data = parameter.data.clone()


def lay_out_anew(unet):
    unet.to(memory_format=torch.channels_last)


def widen(unet):
    unet.to(torch.float64)


@pytest.mark.parametrize("change", [move, lay_out_anew, widen])
def test_weights_that_only_moved_are_the_same(pipe, change):
    before = pipe.unet(*CALL).sample
    change(pipe.unet)
    for _ in range(2):
        assert torch.equal(pipe.unet(*CALL).sample, before)
    pipe.unet.mid_block.resnets[0].conv1.weight.data[3, 5, 1, 1] += 0.5
    with pytest.raises(EngineError, match="the unet has other weights"):
        pipe.unet(*CALL[:2], CALL[2].clone())


def test_each_number_of_any_tensor_is_in_a_sum():
    def sums(tensor):
        return block_sums([tensor], [torch.float16])

    for count in (1, 3, 4, 511, 2048, 2051, 9000, 16385, 40961):
        tensor = torch.ones(count + 1, dtype=torch.float16)[1:]  # words don't begin where it does
        before = sums(tensor)
        for place in {0, count // 2, count - 1}:
            tensor.data[place] = 2
            assert not torch.equal(sums(tensor), before)
            tensor.data[place] = 1
        assert torch.equal(sums(tensor.float()), before)


def test_a_cast_that_changes_weights_is_refused(pipe):
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(EngineError, match="it was cast to bfloat16"):
        pipe.unet(*CALL)


def fuse_others(pipe):
    """Fuse projections, and give one of the fused layers other weights than those that it was made of."""
    pipe.unet.fuse_qkv_projections()
    torch.nn.init.zeros_(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_kv.weight)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda pipe: fuse_others(pipe), "Fused|fused"),
        (lambda pipe: pipe.unet.mid_block.register_forward_hook(print), "hooks on mid_block"),
    ],
)
def test_what_changes_results_without_weights_is_refused(make, accelerate, pipe, change, word):
    change(pipe)
    with pytest.raises(EngineError, match=word):
        latents(pipe)
    other = make()
    change(other)
    with pytest.raises(EngineError, match=word):
        accelerate(other)


def test_accelerating_again_finds_or_adds_and_replaces(pipe, accelerate, engine_dir):
    forward = pipe.unet.forward
    accelerate(pipe, components=UNET_ALONE)
    assert pipe.unet.forward is forward
    accelerate(pipe, components=UNET_ALONE, on_miss="error", height=128)
    assert pipe.unet.forward is forward
    accelerate(pipe, components=("text_encoder",))
    assert "forward" not in pipe.unet.__dict__
    assert sdtrt.status(pipe)["text_encoder"].is_in_engine
    assert sdtrt.status(pipe)["unet"].reason == "not among the components of sdtrt.accelerate"


@pytest.fixture
def fixed_sizes(monkeypatch):
    """ONNX Runtime's engines serve the size alone that they are for, as TensorRT's do."""
    monkeypatch.setattr(OnnxRuntime, "takes_any_size", False)


@pytest.mark.usefixtures("fixed_sizes")
def test_a_call_of_another_size_goes_by_on_miss(make, accelerate, directory, capsys):
    pipe, other = make(), {"height": 64, "width": 64, "guidance_scale": 1.0}
    plain = latents(pipe, **other)
    options = {"components": UNET_ALONE, "engine_dir": directory.path, "progress": True}
    accelerate(pipe, **options, on_miss="error")
    latents(pipe)
    with pytest.raises(EngineError, match="no engine of the unet is open for batch 1") as caught:
        latents(pipe, **other)
    assert "on_miss" in caught.value.hint
    accelerate(pipe, **options, on_miss="torch")
    capsys.readouterr()
    assert torch.equal(latents(pipe, **other), plain)
    assert capsys.readouterr().err.count("PyTorch runs it") == 1
    accelerate(pipe, **options, on_miss="build")
    built = latents(pipe, **other)
    assert "building it (once)" in capsys.readouterr().err
    assert differ(built, plain) <= TOLERANCE
    assert len(sdtrt.status(pipe)["unet"].engines) == 2


@pytest.mark.usefixtures("fixed_sizes")
@pytest.mark.slow
def test_one_prompt_of_several_images_runs_in_an_encoder_for_as_many_prompts(make, accelerate, directory):
    pipe, options = make(StableDiffusionXLPipeline, "sdxl"), {"num_images_per_prompt": 2}
    plain, other = latents(pipe, **options), latents(pipe, prompt=["a circle", "a ring"])
    accelerate(pipe, batch_size=2, on_miss="error", engine_dir=directory.path)
    assert differ(latents(pipe, **options), plain) <= TOLERANCE
    assert differ(latents(pipe, prompt=["a circle", "a ring"]), other) <= TOLERANCE
    with pytest.raises(EngineError, match="no engine of the text_encoder is open for batch 3"):
        latents(pipe, prompt=["a", "b", "c"])


def test_an_engine_of_files_serves_the_pipeline_that_they_were_loaded_into(
    smallest, directory, accelerate, monkeypatch
):
    model = resolve_model(ModelSpec(str(smallest)))
    spec = BuildSpec(ExportSpec(model.spec, "text_encoder", "fp32"), "onnxruntime")
    entry = sdtrt.build(spec, engine_dir=directory.path, progress=False)
    pipe = StableDiffusionPipeline.from_pretrained(smallest, torch_dtype=torch.float32)
    accelerate(pipe, engine_dir=directory.path, components=("text_encoder",))
    assert sdtrt.status(pipe)["text_encoder"].engines[0].name == entry.name
    sdtrt.restore(pipe)
    older = {name: value for name, value in entry.info.items() if name != "weights_digest"}
    monkeypatch.setattr(EngineDirectory, "entries", lambda self, kind=None: [copy_of(entry, older)])
    accelerate(pipe, engine_dir=directory.path, components=("text_encoder",))
    assert sdtrt.status(pipe)["text_encoder"].engines[0].name == entry.name


def copy_of(entry, info):
    made = copy.copy(entry)
    object.__setattr__(made, "info", info)
    return made


@pytest.mark.feature("`clip_skip`", "sdxl", "onnxruntime")
def test_states_of_other_layers_come_from_pytorch(make, accelerate):
    pipe = make(StableDiffusionXLPipeline, "sdxl")
    plain = latents(pipe, clip_skip=1)
    accelerate(pipe, components=("text_encoder", "text_encoder_2"))
    assert differ(latents(pipe, clip_skip=1), plain) <= TOLERANCE


def test_arguments_without_an_input_are_refused_with_a_way_out(pipe):
    with pytest.raises(EngineError, match="cross_attention_kwargs") as caught:
        latents(pipe, cross_attention_kwargs={"mask": 1})
    assert "sdtrt.restore(pipe)" in caught.value.hint


class Kandinsky(StableDiffusionPipeline):
    pass


def test_pipelines_that_engines_do_not_serve_are_refused_by_name(make, accelerate):
    with pytest.raises(EngineError, match="str is no diffusers pipeline"):
        accelerate("a name")
    pipe = make(Kandinsky)
    pipe.controlnet = torch.nn.Identity()
    with pytest.raises(EngineError, match="Kandinsky has a controlnet") as caught:
        accelerate(pipe)
    assert "Stable Diffusion 1.x, 2.x and XL" in caught.value.hint
    pipe = make()
    pipe.text_encoder = torch.nn.Linear(1, 1)
    with pytest.raises(EngineError, match="the text_encoder of StableDiffusionPipeline is a Linear"):
        accelerate(pipe)
    pipe = make(StableDiffusionInpaintPipeline, unet=factories.small_unet("sd1", in_channels=8))
    with pytest.raises(EngineError, match="takes 8 channels"):
        accelerate(pipe)
    assert "controlnet" in StableDiffusionControlNetPipeline.__init__.__annotations__  # that pipelines have one
    pipe = make()
    pipe.adapter = torch.nn.Identity()
    with pytest.raises(EngineError, match="StableDiffusionPipeline has a adapter, whose part in the result no engine"):
        accelerate(pipe)


def test_a_unet_with_a_forward_of_its_own_is_refused(make, accelerate):
    class Own(UNet2DConditionModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    pipe = make(unet=Own(**factories.small_unet("sd1", **factories.SMALLEST["sd1"]).config))
    with pytest.raises(EngineError, match="a Own, has a forward of its own"):
        accelerate(pipe)


@pytest.mark.parametrize(
    "options",
    [
        {"height": 65},
        {"batch_size": 0},
        {"precision": "fp4"},
        {"components": ["tokenizer"]},
        {"on_miss": "wait"},
        {"backend": "torch"},
    ],
)
def test_requests_that_can_not_be_met_are_refused_before_anything_changes(make, accelerate, options):
    pipe = make()
    with pytest.raises((UsageError, EngineError)):
        accelerate(pipe, **options)
    assert "forward" not in pipe.unet.__dict__


def test_a_failure_leaves_the_pipeline_as_it_was(make, accelerate, monkeypatch):
    pipe = make()
    monkeypatch.setattr(swap, "open_session", lambda *_: (_ for _ in ()).throw(EngineError("no", hint="none")))
    with pytest.raises(EngineError, match="no"):
        accelerate(pipe, components=UNET_ALONE)
    assert "forward" not in pipe.unet.__dict__
    assert not swap.swapped_of(pipe)


def test_status_is_a_table(pipe):
    lines = str(sdtrt.status(pipe)).splitlines()
    assert lines[0] == "StableDiffusionPipeline"
    assert lines[1].split()[:2] == ["part", "runs"]
    assert any(line.startswith("unet ") and "onnxruntime" in line for line in lines)
    assert sdtrt.status(pipe)["unet"].reason == ""
    assert any(line.startswith("vae_encoder") and "this pipeline encodes no images" in line for line in lines)


def test_hooks_that_move_modules_are_refused(make, accelerate, pipe):
    pipe.unet._hf_hook = object()
    with pytest.raises(EngineError, match="got hooks"):
        latents(pipe)
    other = make()
    other.unet._hf_hook = object()
    with pytest.raises(EngineError, match="is moved by hooks"):
        accelerate(other)


@pytest.mark.skipif(not is_accelerate_available(), reason="diffusers can't run what it offloads without accelerate")
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_offloading_of_diffusers_is_refused(make, accelerate, pipe, level):
    options = {"onload_device": torch.device("cpu"), "offload_type": level}
    options |= {"num_blocks_per_group": 1} if level == "block_level" else {}
    pipe.unet.enable_group_offload(**options)
    with pytest.raises(EngineError, match="hooks"):
        latents(pipe)
    latents(sdtrt.restore(pipe))
    other = make()
    other.unet.enable_group_offload(**options)
    with pytest.raises(EngineError, match="hooks"):
        accelerate(other)


@pytest.mark.parametrize("layer", ["", "conv_in"])
def test_hooks_of_diffusers_are_refused(make, accelerate, pipe, layer):
    for one in (pipe, other := make()):
        HookRegistry.check_if_exists_or_initialize(one.unet.get_submodule(layer)).register_hook(ModelHook(), "own")
    with pytest.raises(EngineError, match="hooks"):
        latents(pipe)
    latents(sdtrt.restore(pipe))
    with pytest.raises(EngineError, match="hooks"):
        accelerate(other)


def test_training_is_refused_and_a_call_under_no_grad_is_not(pipe):
    pipe.unet.train().requires_grad_(True)
    latents(pipe)
    with pytest.raises(EngineError, match="the unet is in training mode") as caught:
        pipe.unet(*CALL)
    assert "sdtrt.restore(pipe)" in caught.value.hint
    pipe.unet.eval()
    pipe.unet(*CALL)


def test_a_gradient_is_refused_with_both_ways_out(pipe):
    with pytest.raises(EngineError, match="a gradient is wanted") as caught:
        pipe.unet(CALL[0].clone().requires_grad_(True), *CALL[1:])
    assert "torch.no_grad()" in caught.value.hint
    assert "sdtrt.restore(pipe)" in caught.value.hint


def test_a_pipeline_without_text_encoder_takes_embeddings(make, accelerate):
    pipe = make(text_encoder=None, tokenizer=None)
    options = {"prompt": None, "prompt_embeds": torch.ones(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)}
    plain = latents(pipe, **options)
    assert differ(latents(accelerate(pipe), **options), plain) <= TOLERANCE


def test_a_part_on_another_device_is_refused_with_the_way_back(pipe):
    pipe.unet.to("meta")
    with pytest.raises(EngineError, match="the unet is on meta by now, its engine on cpu") as caught:
        latents(pipe)
    assert "pipe.to('cpu')" in caught.value.hint


def test_an_engine_directory_that_can_not_be_written_leaves_the_pipeline_as_it_was(make, accelerate, tmp_path):
    (tmp_path / "file").write_text("")
    pipe = make()
    with pytest.raises(sdtrt.CacheError):
        accelerate(pipe, engine_dir=tmp_path / "file" / "engines")
    assert not swap.swapped_of(pipe)
    assert "forward" not in pipe.unet.__dict__


def test_lora_of_peft_is_refused_and_served_once_it_is_fused(make, accelerate, pipe):
    pytest.importorskip("peft")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    lora = {f"{name}A.weight": torch.ones(4, 64), f"{name}B.weight": torch.ones(64, 4)}
    plain = make()
    for one in (plain, pipe):
        one.load_lora_weights(dict(lora))
    with pytest.raises(EngineError, match="LoRA layers") as caught:
        latents(pipe)
    assert "pipe.fuse_lora(), then pipe.unload_lora_weights()" in caught.value.hint
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    with pytest.raises(EngineError, match="the unet has other weights"):
        latents(pipe)
    assert differ(latents(accelerate(pipe, components=UNET_ALONE)), latents(plain)) <= TOLERANCE


@pytest.fixture
def load(smallest, engine_dir):
    def call(**options):
        given = {"backend": "onnxruntime", "components": ["text_encoder", "unet"], "engine_dir": engine_dir}
        return sdtrt.load(str(smallest), height=64, width=64, progress=False, **{**given, **options})

    return call


def test_a_loaded_pipeline_is_open_until_it_is_closed(load):
    with contextlib.closing(load()) as pipe:
        assert latents(pipe).shape == (1, 4, 8, 8)
        assert sdtrt.status(pipe)["text_encoder"].is_in_engine
        copied = copy.copy(pipe)
        with pytest.raises(EngineError, match="it has no weights to go back to") as caught:
            sdtrt.restore(pipe)
        assert "pipe.close()" in caught.value.hint
        with pytest.raises(EngineError, match="an engine runs its unet already"):
            sdtrt.accelerate(pipe)
    pipe.close()
    for closed in (pipe, copied):
        with pytest.raises(EngineError, match="closed"):
            latents(closed)
        assert not sdtrt.status(closed)["text_encoder"].is_in_engine


def sessions_of(pipe):
    parts = swap.swapped_of(pipe).values()
    return [ref(one.session) for part in parts for one in part.engines] or [ref(pipe.unet.session)]


@pytest.mark.parametrize("how", ["load", "accelerate"])
def test_a_pipeline_that_is_dropped_takes_its_engines_along(load, make, accelerate, how):
    pipe = load() if how == "load" else accelerate(make())
    latents(pipe)
    kept = sessions_of(pipe)
    assert all(one() for one in kept)
    gc.collect()
    gc.disable()  # a GPU's memory does not wait for it
    try:
        del pipe
        assert not any(one() for one in kept)
    finally:
        gc.enable()


def test_what_fails_in_a_second_call_leaves_the_engines_of_the_first(make, accelerate, monkeypatch):
    pipe = accelerate(make(), components=UNET_ALONE)
    forward, before = pipe.unet.forward, latents(pipe)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerating, "ensure_engines", interrupt)
    for options in ({"components": ("unet", "text_encoder")}, {"components": ("vae_decoder",)}):
        with pytest.raises(KeyboardInterrupt):
            accelerate(pipe, **options)
        assert pipe.unet.forward is forward
        assert list(swap.swapped_of(pipe)) == ["unet"]
    assert torch.equal(latents(pipe), before)


@pytest.fixture
def parking(monkeypatch):
    """Weights leave a GPU that is not there: they are float64 meanwhile, which no layer takes beside float32."""
    monkeypatch.setattr(parked, "is_on_gpu", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(parked, "to_host", lambda data: data.double())
    monkeypatch.setattr(parked, "to_device", lambda data, device: data.float())


def dtypes(module):
    return {parameter.dtype for parameter in module.parameters()}


LAYERS = {
    "vae.decoder": lambda pipe: pipe.vae.decoder(torch.ones(1, 4, 8, 8)),
    "vae.encoder": lambda pipe: pipe.vae.encoder(torch.ones(1, 3, 64, 64)),
    "vae.quant_conv": lambda pipe: pipe.vae.quant_conv(torch.ones(1, 8, 8, 8)),
    "vae.post_quant_conv": lambda pipe: pipe.vae.post_quant_conv(torch.ones(1, 4, 8, 8)),
    "unet.conv_in": lambda pipe: pipe.unet.conv_in(torch.ones(1, 4, 8, 8)),
    "unet.conv_out": lambda pipe: pipe.unet.conv_out(torch.ones(1, 32, 8, 8)),
    "text_encoder": lambda pipe: pipe.text_encoder.get_input_embeddings()(torch.ones(1, 77, dtype=torch.int64)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.usefixtures("parking")
@pytest.mark.slow
def test_a_layer_that_is_called_by_itself_has_its_weights_back(make, accelerate, directory, layer, capsys):
    pipe = make(StableDiffusionImg2ImgPipeline, vae=factories.small_vae())
    call = LAYERS[layer]
    plain, picture = call(pipe), latents(pipe, image=NOISE)
    accelerate(pipe, progress=True)
    assert torch.float64 in dtypes(pipe.unet) & dtypes(pipe.text_encoder) & dtypes(pipe.vae)
    copied = copy.deepcopy(pipe)
    capsys.readouterr()
    assert torch.equal(call(pipe), plain)
    assert torch.equal(call(pipe), plain)
    assert capsys.readouterr().err.count("a layer is called by itself") <= 1  # a first one stays
    assert differ(latents(pipe, image=NOISE), picture) <= TOLERANCE
    assert torch.equal(call(copied), plain)
    assert torch.equal(latents(pickle.loads(pickle.dumps(copied)), image=NOISE), picture)
    assert torch.equal(latents(copied, image=NOISE), picture)
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe, image=NOISE), picture)
    assert not any(one._forward_pre_hooks for part in modules_of(pipe).values() for one in part.modules())


@pytest.mark.usefixtures("parking")
def test_weights_come_back_under_whatever_names_they_have_by_then(make, accelerate):
    pipe = accelerate(make(), components=UNET_ALONE)
    held = pipe.unet.conv_out
    pipe.unet.conv_out = torch.nn.Sequential(held)  # as peft wraps layers
    with pytest.raises(EngineError, match="it has other layers"):
        latents(pipe)
    sdtrt.restore(pipe)
    assert dtypes(pipe.unet) == {torch.float32}


@pytest.fixture
def gate(monkeypatch):
    """Readings of weights go on when it is open, or when they are to stop."""
    opened, read = threading.Event(), reading._read_host

    def wait(pairs, sums, failures, stop):
        while not (opened.wait(0.01) or stop.is_set()):
            pass
        read(pairs, sums, failures, stop)

    monkeypatch.setattr(reading, "_read_host", wait)
    monkeypatch.setattr(reading, "thread_count", lambda: 1)
    yield opened
    opened.set()


def readers():
    return [thread for thread in threading.enumerate() if thread.name == reading.THREAD]


def test_no_step_waits_for_a_reading_and_no_picture_leaves_without(make, accelerate, gate):
    gate.set()
    pipe, steps = accelerate(make()), []
    pixels(pipe)
    assert not readers()
    gate.clear()
    set_one_number(pipe.unet)

    def at_step(pipe, step, time, tensors):
        steps.append(len(readers()))
        if step == 3:
            gate.set()
        return {}

    with pytest.raises(EngineError, match="the unet has other weights than its engine"):
        pixels(pipe, num_inference_steps=4, callback_on_step_end=at_step)
    assert steps == [2, 2, 2, 2]  # the text encoder's and the unet's: each part has one at a time
    assert not readers()


def test_what_a_reading_found_of_latents_is_raised_before_the_next_picture(make, accelerate, gate):
    gate.set()
    pipe, steps = accelerate(make(), components=UNET_ALONE), []
    gate.clear()
    set_one_number(pipe.unet)
    latents(pipe)
    gate.set()
    with pytest.raises(EngineError, match="the unet has other weights than its engine"):
        latents(pipe, callback_on_step_end=lambda pipe, step, time, tensors: steps.append(step) or {})
    assert not steps


def test_what_changes_during_a_reading_is_found_by_the_one_that_follows(make, accelerate, gate):
    gate.set()
    pipe = accelerate(make(), components=("text_encoder",))
    watch = swap.swapped_of(pipe)["text_encoder"].watch
    encoded = pipe.encode_prompt("a", "cpu", 1, False)
    watch.settle(pipe.text_encoder)
    gate.clear()
    for _ in range(3):
        assert torch.equal(pipe.encode_prompt("a", "cpu", 1, False)[0], encoded[0])
    (first,) = readers()
    gate.set()
    first.join()
    layer = pipe.text_encoder.get_submodule(next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("fc1")))
    layer.weight.data[3, 5] += 0.5
    with pytest.raises(EngineError, match="the text_encoder has other weights"):
        watch.settle(pipe.text_encoder)
    assert not readers()


@pytest.mark.parametrize("how", ["restore", "drop"])
def test_a_reading_ends_with_the_engines_and_keeps_no_pipeline(make, accelerate, gate, how):
    gate.set()
    pipe = accelerate(make())
    gate.clear()
    latents(pipe)
    module, threads = ref(pipe.unet), readers()
    assert threads
    if how == "restore":
        sdtrt.restore(pipe)
        assert not readers()
        return
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert module() is None
    finally:
        gc.enable()
    for thread in threads:
        thread.join(10)
    assert not readers()


@pytest.mark.usefixtures("parking")
def test_a_reading_stops_while_weights_come_back_and_begins_anew(make, accelerate, gate, directory):
    gate.set()
    pipe = accelerate(make(), components=UNET_ALONE, engine_dir=directory.path)
    gate.clear()
    latents(pipe)
    (first,) = readers()
    pipe.unet.conv_out(torch.ones(1, 32, 8, 8))
    (second,) = readers()
    assert second is not first
    gate.set()
    watch = swap.swapped_of(pipe)["unet"].watch
    watch.settle(pipe.unet)
    set_one_number(pipe.unet)
    pipe.unet(*CALL)
    with pytest.raises(EngineError, match="the unet has other weights"):
        watch.settle(pipe.unet)


@pytest.mark.parametrize("count", [1, 3])
def test_threads_share_a_reading(monkeypatch, count):
    tensors = [torch.full((1000 * number,), number, dtype=torch.float16) for number in range(1, 60)]
    expected = [block_sums([tensor], [torch.float16]) for tensor in tensors]
    monkeypatch.setattr(reading, "thread_count", lambda: count)
    assert torch.equal(block_sums(tensors, [torch.float16] * len(tensors)), torch.cat(expected))


def test_a_reading_does_without_a_thread_and_hands_on_what_fails(monkeypatch):
    tensors, dtypes = [torch.ones(5000), torch.ones(3)], [torch.float32] * 2
    expected = block_sums(tensors, dtypes)

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        one = Reading(tensors, dtypes)
        assert one.is_done
        assert torch.equal(one.wait(), expected)
        one.stop()
    monkeypatch.setattr(reading, "_blocks", lambda *_: torch.empty(1 << 60))
    with pytest.raises(RuntimeError):
        Reading(tensors, dtypes).wait()


class Event:
    """A GPU's, which is there once it is waited for."""

    done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_a_reading_of_a_gpus_tensors_is_that_of_the_hosts(monkeypatch):
    tensors = [torch.randn(5000), torch.randn(3, dtype=torch.float64), torch.randn(70, 70), torch.randn(2, 3, 5, 5)]
    dtypes = [tensor.dtype for tensor in tensors]
    expected, event = block_sums(tensors, dtypes), Event()
    monkeypatch.setattr(reading, "is_on_gpu", lambda tensor: tensor.ndim < 3 and tensor.dtype == torch.float32)
    monkeypatch.setattr(reading, "_copy_soon", lambda numbers: (numbers.clone(), event))
    one = Reading(tensors, dtypes)
    one._join()
    assert not one.is_done
    assert torch.equal(one.wait(), expected)
    assert one.is_done


def test_a_compiled_unet_runs_the_engine(pipe):
    expected, unet = latents(pipe), pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    assert torch.equal(latents(pipe), expected)
    assert sdtrt.status(pipe)["unet"].is_in_engine
    sdtrt.restore(pipe)
    assert "forward" not in unet.__dict__
