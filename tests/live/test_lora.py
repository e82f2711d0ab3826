"""Adapters of peft on live pipelines whose engines hold no weights: diffusers' own calls, against plain diffusers.

PyTorch runs the engines here (`torch_engines`); `test_accelerate_inductor` has compiled ones.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import factories
import pytest
import torch
import torch_engines
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import sdtrt
from sdtrt.common.errors import EngineError
from sdtrt.live import accelerate as accelerating
from sdtrt.live import merging, swap
from sdtrt.models import adapters

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
VISIBLE = 100 * TOLERANCE
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "proj_in", "ff.net.2", "conv1", "time_emb_proj"]
TEXT = ["q_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(autouse=True)
def _engines(monkeypatch):
    torch_engines.instead_of_inductor(monkeypatch)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Make a pipeline in memory, the same one each time."""

    def made(kind="sd1"):
        architecture = {
            **factories.SMALLEST[kind],
            "norm_num_groups": 8,
        }  # of a group of one channel, a norm hides biases
        cls = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
        return factories.live_pipeline(cls, kind, tokenizer, unet=factories.small_unet(kind, **architecture))

    return made


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture
def accelerate(directory):
    def call(pipe, **options):
        given = {"height": 64, "width": 64, "engine_dir": directory, "progress": False, "backend": "inductor"}
        return sdtrt.accelerate(pipe, **{**given, **options})

    return call


@pytest.fixture
def both(make, accelerate):
    """A plain pipeline and an accelerated one."""
    return make(), accelerate(make())


def latents(pipe, **options):
    given = {"prompt": "a red circle", "num_inference_steps": 1, "output_type": "latent", "height": 64, "width": 64}
    return pipe(**{**given, **options, "generator": torch.Generator().manual_seed(3)}).images


def differ(found, expected):
    return float((found - expected).abs().max())


def same(plain, pipe, **options):
    """Whether both give the same picture, to the tolerance; the accelerated one's latents."""
    found, expected = latents(pipe, **options), latents(plain, **options)
    assert differ(found, expected) <= TOLERANCE * max(1.0, float(expected.abs().max()))  # adapters by chance are large
    return found


def random_adapter(module, config, seed):
    """The tensors of an adapter by chance, as peft names them."""
    copied = copy.deepcopy(module).requires_grad_(False)
    inject_adapter_in_model(config, copied, adapter_name="made")
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(copied, adapter_name="made")
    return {name: 0.3 * torch.randn(one.shape, generator=generator) for name, one in state.items()}


@pytest.fixture(scope="module")
def lora(make, tmp_path_factory):
    """Write a LoRA file of a pipeline's parts with diffusers' own `save_lora_weights`; returns its folder."""
    folder = tmp_path_factory.mktemp("loras")

    def written(seed, kind="sd1", targets=ALL, encoders=True):
        path = folder / f"{kind}-{seed}-{len(targets)}-{encoders}"
        if not path.exists():
            pipe = make(kind)
            layers = {"unet_lora_layers": random_adapter(pipe.unet, LoraConfig(r=4, target_modules=targets), seed)}
            config = LoraConfig(r=2, target_modules=TEXT)
            for part in ("text_encoder", "text_encoder_2") if encoders else ():
                if (encoder := getattr(pipe, part, None)) is not None:
                    layers[f"{part}_lora_layers"] = random_adapter(encoder, config, seed)
            type(pipe).save_lora_weights(path, **layers)
        return str(path)

    return written


def each(*pipes):
    """Call a method of several pipelines."""

    class Calls:
        def __getattr__(self, name):
            return lambda *args, **kwargs: [getattr(pipe, name)(*args, **kwargs) for pipe in pipes]

    return Calls()


@pytest.fixture
def merges(monkeypatch):
    """The layers that are merged, by name, in the order in which they are."""
    names, merge = [], merging.merged
    monkeypatch.setattr(merging, "merged", lambda layer: names.append(layer.name) or merge(layer))
    return names


@pytest.fixture
def no_build(monkeypatch):
    """From here on a build fails the test."""

    def begin():
        monkeypatch.setattr(accelerating, "ensure_engines", pytest.fail)
        monkeypatch.setattr(swap, "ensure_engines", pytest.fail)

    return begin


def test_a_lora_is_in_the_next_picture_and_gone_in_another(both, lora, no_build):
    no_build()
    plain, pipe = both
    calls, bare = each(plain, pipe), latents(pipe)
    calls.load_lora_weights(lora(1))
    assert differ(shown := same(plain, pipe), bare) > VISIBLE
    assert differ(same(plain, pipe, cross_attention_kwargs={"scale": 0.4}), shown) > VISIBLE
    calls.disable_lora()
    assert torch.equal(same(plain, pipe), bare)
    calls.enable_lora()
    calls.fuse_lora()
    calls.disable_lora()
    assert differ(same(plain, pipe), bare) <= TOLERANCE, "peft takes out what was fused and is switched off"
    calls.enable_lora()
    calls.fuse_lora()
    calls.unload_lora_weights()
    assert differ(same(plain, pipe), shown) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.feature("LoRA, on a live pipeline", "sd1 sdxl", "inductor")
def test_diffusers_calls_have_their_effect_in_the_next_picture(make, accelerate, lora, no_build, kind):
    plain, pipe = make(kind), accelerate(make(kind))
    no_build()
    calls, bare = each(plain, pipe), latents(pipe)
    pictures = [same(plain, pipe)]
    assert torch.equal(bare, pictures[0])

    def shows(**options):
        pictures.append(same(plain, pipe, **options))
        assert differ(pictures[-1], pictures[-2]) > VISIBLE

    calls.load_lora_weights(lora(1, kind), adapter_name="one")
    shows()
    calls.load_lora_weights(lora(2, kind), adapter_name="two")
    shows()
    calls.set_adapters(["one", "two"], [0.5, -0.7])
    shows()
    calls.set_adapters("one", {"unet": {"down": 0.2, "mid": 1.5, "up": {"block_0": 0.4}}, "text_encoder": 0.3})
    shows()
    shows(cross_attention_kwargs={"scale": 0.4})
    shows()
    assert torch.equal(pictures[-1], pictures[-3])
    calls.disable_lora()
    assert torch.equal(same(plain, pipe), bare)
    calls.enable_lora()
    calls.delete_adapters("one")
    calls.set_adapters("two")
    same(plain, pipe)
    calls.fuse_lora(lora_scale=0.6)
    shows()
    calls.unfuse_lora()
    same(plain, pipe)  # with the scale of the fusion, which diffusers leaves in the layers
    calls.set_adapters("two")
    shows()
    calls.unload_lora_weights()
    assert differ(same(plain, pipe), bare) <= TOLERANCE, "what diffusers fused and took out again is rounded"
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain))


def test_from_a_to_b_and_back_is_the_same_to_the_last_bit(both, lora):
    _, pipe = both
    bare, seen = latents(pipe), {}
    for seed in (1, 2, 1):
        pipe.load_lora_weights(lora(seed, encoders=False))
        found = latents(pipe)
        assert torch.equal(seen.setdefault(seed, found), found)
        pipe.unload_lora_weights()
        assert torch.equal(latents(pipe), bare)
    for seed in (1, 2):
        pipe.load_lora_weights(lora(seed, encoders=False), adapter_name=f"of_{seed}")
    for seed in (1, 2, 1):
        pipe.set_adapters(f"of_{seed}")
        assert torch.equal(latents(pipe), seen[seed])
    assert torch.equal(latents(pipe, cross_attention_kwargs={"scale": 0.0}), bare)


def test_base_weights_are_kept_beside_the_engines_and_come_back_into_their_memory(both, lora):
    _, pipe = both
    views = swap.swapped_of(pipe)["unet"].engines[0].session.weight_views()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {key: one.clone() for key, one in pipe.unet.state_dict().items()}
    weight = pipe.unet.get_submodule(name).weight
    assert weight.data_ptr() == views[f"{name}.weight"].data_ptr()
    pipe.load_lora_weights(lora(1))
    latents(pipe)
    assert pipe.unet.get_submodule(name).base_layer.weight is weight
    assert weight.data_ptr() != views[f"{name}.weight"].data_ptr()
    assert not torch.equal(weight, views[f"{name}.weight"])
    own = adapters.own_state(pipe.unet)
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], one) for key, one in state.items())
    pipe.unload_lora_weights()
    latents(pipe)
    assert weight.data_ptr() == views[f"{name}.weight"].data_ptr()
    assert all(torch.equal(one, state[key]) for key, one in pipe.unet.state_dict().items())


def test_many_changes_leave_nothing_behind(both, lora):
    """Neither adapters that are gone, nor other numbers in the base weights or in the first picture."""
    _, pipe = both
    bound = swap.swapped_of(pipe)["unet"].bound
    pipe.load_lora_weights(lora(1, encoders=False), adapter_name="one")
    pipe.load_lora_weights(lora(2, encoders=False), adapter_name="two")
    first, words = latents(pipe), ("two", "one")
    for number in range(40):
        pipe.unet.set_adapters([words[number % 2]], [0.1 * (number % 7)])
        bound.copy(pipe.unet)
    pipe.set_adapters("two", 1.0)
    assert torch.equal(latents(pipe), first)
    place = weakref.ref(pipe.unet.conv_in), weakref.ref(next(iter(adapters.adapters_of(pipe.unet))))
    pipe.unload_lora_weights()
    latents(pipe)
    gc.collect()
    assert place[0]() is not None
    assert place[1]() is None
    assert bound._merging._looks._views == []


def test_only_what_has_changed_is_merged(both, lora, merges):
    _, pipe = both
    pipe.load_lora_weights(lora(1, encoders=False), adapter_name="one")
    latents(pipe)
    count = len(adapters.wrapped_layers(pipe.unet))
    assert len(merges) == len(set(merges)) == count > 20
    latents(pipe)
    pipe.set_adapters("one", 1.0)
    latents(pipe)
    assert len(merges) == count, "nothing has changed"
    pipe.set_adapters("one", {"unet": {"mid": 0.5}})
    latents(pipe)
    assert len(set(merges[count:])) == len(merges[count:]) < count
    assert {name.split(".")[0] for name in merges[count:]} == {"mid_block"}


def test_adapters_that_are_there_before_and_sizes_that_come_later(make, accelerate, lora):
    plain, pipe = make(), make()
    calls = each(plain, pipe)
    calls.load_lora_weights(lora(1))
    accelerate(pipe)
    same(plain, pipe)
    accelerate(pipe, width=128)
    same(plain, pipe, width=128)
    calls.set_adapters("default_0", 0.3)
    same(plain, pipe, width=128)
    same(plain, pipe)
    same(plain, pipe, width=192)  # opened at the call
    sdtrt.restore(pipe)
    assert torch.equal(latents(pipe), latents(plain)), "the adapters are still there"
    calls.unload_lora_weights()
    assert torch.equal(latents(pipe), latents(make()))


def test_pytorch_runs_the_adapters_where_no_engine_does(both, accelerate, lora):
    plain, pipe = both
    each(plain, pipe).load_lora_weights(lora(1))
    accelerate(pipe, on_miss="torch")
    for options in ({}, {"cross_attention_kwargs": {"scale": 0.5}}):
        same(plain, pipe, width=128, **options)


def test_a_change_in_the_middle_of_a_picture_counts_from_the_next_step(both, lora):
    plain, pipe = both
    each(plain, pipe).load_lora_weights(lora(1), adapter_name="one")

    def fade(one, step, time, tensors):
        one.set_adapters("one", 1.0 - 0.4 * (step + 1))
        return tensors

    found = same(plain, pipe, callback_on_step_end=fade, num_inference_steps=3)
    each(plain, pipe).set_adapters("one", 1.0)
    assert differ(found, same(plain, pipe, num_inference_steps=3)) > VISIBLE


def test_loras_that_come_and_go_in_the_middle_of_a_picture_count_from_the_next_step(both, lora):
    plain, pipe = both
    bare = latents(pipe, num_inference_steps=3)

    def load(one, step, time, tensors):
        if step == 0:
            one.load_lora_weights(lora(1, encoders=False), adapter_name="late")
        return tensors

    def unload(one, step, time, tensors):
        one.unload_lora_weights()
        return tensors

    for change in (load, unload):
        found = same(plain, pipe, callback_on_step_end=change, num_inference_steps=3)
        assert differ(found, bare) > VISIBLE
    assert torch.equal(same(plain, pipe, num_inference_steps=3), bare)


@pytest.mark.parametrize("rank", [None, 8], ids=["as it is", "padded"])
def test_hotswapping_is_followed_though_neither_address_nor_version_tells(both, lora, rank):
    plain, pipe = both
    calls = each(plain, pipe)
    if rank is not None:
        calls.enable_lora_hotswap(target_rank=rank)  # scales are tensors then
    calls.load_lora_weights(lora(1, targets=ATTENTION, encoders=False), adapter_name="one")
    before = same(plain, pipe, cross_attention_kwargs={"scale": 0.7})
    calls.load_lora_weights(lora(2, targets=ATTENTION, encoders=False), adapter_name="one", hotswap=True)
    assert differ(same(plain, pipe, cross_attention_kwargs={"scale": 0.7}), before) > VISIBLE


def test_base_weights_may_change_under_an_adapter(both, make, lora):
    plain, pipe = both
    each(plain, pipe).load_lora_weights(lora(1, encoders=False))
    before = same(plain, pipe)
    for unet in (plain.unet, pipe.unet):
        with torch.no_grad():
            for name, one in unet.named_parameters():
                if name.endswith("base_layer.weight"):
                    one.mul_(1.5)
    assert differ(same(plain, pipe), before) > VISIBLE


CONFIGS = {
    "loha": LoHaConfig(r=4, target_modules=ALL),
    "lokr": LoKrConfig(r=4, target_modules=ALL),
    "dora": LoraConfig(r=4, target_modules=ALL, use_dora=True),
    "biases": LoraConfig(r=4, target_modules=["to_out.0", "conv1"], lora_bias=True),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=3, target_modules=ALL, use_rslora=True),
}


def add(pipe, configs):
    """Put adapters by chance around a UNet's layers, all of them active."""
    for number, config in enumerate(configs):
        inject_adapter_in_model(config, pipe.unet, adapter_name=f"of_{number}")
    generator = torch.Generator().manual_seed(0)
    for name, one in pipe.unet.named_parameters():
        if any(word in name for word in ("lora_A", "lora_B", "hada_", "lokr_")):
            one.data.normal_(0, 0.2, generator=generator)
    for layer in pipe.unet.modules():
        if adapters.is_adapter(layer):
            layer.set_adapter([f"of_{number}" for number in range(len(configs))])


@pytest.mark.parametrize(
    "configs",
    [*((one,) for one in CONFIGS), ("loha", "lokr"), ("dora", "rank-stabilised")],
    ids=lambda names: "+".join(names),
)
def test_all_that_peft_can_merge_is_merged(both, configs):
    plain, pipe = both
    bare = latents(pipe)
    for one in both:
        add(one, [copy.deepcopy(CONFIGS[name]) for name in configs])
    assert differ(same(plain, pipe), bare) > VISIBLE
    for one in both:
        for layer in one.unet.modules():
            if adapters.is_adapter(layer):
                layer.enable_adapters(False)
    assert torch.equal(same(plain, pipe), bare)


def test_what_peft_can_not_merge_is_refused_by_name(both):
    _, pipe = both
    bare = latents(pipe)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], lora_bias=True), pipe.unet, adapter_name="biased")
    with pytest.raises(EngineError, match=r"peft can't merge the adapter biased into .*to_q.*has no bias") as caught:
        latents(pipe)
    assert "delete_adapters" in caught.value.hint
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), bare)


def test_layers_that_peft_replaces_are_refused_by_name(both):
    _, pipe = both
    config = LoraConfig(r=4, target_modules=["to_q"], modules_to_save=["conv_in"])
    inject_adapter_in_model(config, pipe.unet, adapter_name="wide")
    with pytest.raises(EngineError, match="ModulesToSaveWrapper"):
        latents(pipe)


def test_a_scale_without_adapters_changes_nothing_and_other_arguments_are_refused(both):
    plain, pipe = both
    assert torch.equal(same(plain, pipe, cross_attention_kwargs={"scale": 0.3}), latents(pipe))
    with pytest.raises(EngineError, match="no input for cross_attention_kwargs"):
        latents(pipe, cross_attention_kwargs={"scale": 0.3, "gligen": {}})


def test_copies_and_other_pipelines_of_the_modules_have_adapters_too(both, lora):
    plain, pipe = both
    each(plain, pipe).load_lora_weights(lora(1))
    expected = latents(plain)
    copied = copy.deepcopy(pipe)
    assert torch.equal(latents(copied), expected), "a copy runs in PyTorch"
    assert (
        differ(latents(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)), expected)
        <= TOLERANCE
    )


@pytest.mark.feature("LoRA, on a live pipeline", "sd1 sd2 sdxl", "onnxruntime", error="the unet has LoRA layers")
def test_engines_with_weights_refuse_adapters_and_name_both_ways_out(make, accelerate, lora, directory):
    pipe = make()
    pipe.load_lora_weights(lora(1, encoders=False))
    with pytest.raises(EngineError, match="the unet has LoRA layers") as caught:
        accelerate(pipe, backend="onnxruntime", components=("unet",))
    for words in ('backend="inductor"', "pipe.fuse_lora(), then pipe.unload_lora_weights()", "sdtrt.restore(pipe)"):
        assert words in caught.value.hint
    assert not swap.swapped_of(pipe)
    plain = make()
    plain.load_lora_weights(lora(1, encoders=False))
    same(plain, accelerate(pipe))


def kohya(folder, path):
    """A LoRA in kohya's names, alphas and all, of the tensors of diffusers' file."""
    from safetensors.torch import load_file

    prefixes = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}
    tensors = {}
    for name, one in load_file(f"{folder}/pytorch_lora_weights.safetensors").items():
        prefix = next(one for one in prefixes if name.startswith(one))
        layer, _, kind = name.removeprefix(prefix).partition(
            ".lora_" if ".lora_A" in name or ".lora_B" in name else ".lora."
        )
        layer = layer.replace("_lora", "").replace("processor.", "")
        if prefix == "text_encoder." and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        new = prefixes[prefix] + layer.replace(".", "_")
        tensors[f"{new}.{'lora_down' if kind[0] in 'Ad' else 'lora_up'}.weight"] = one
        tensors[f"{new}.alpha"] = torch.tensor(1.5)
    save_file(tensors, path)
    return str(path)


def test_kohyas_names_and_alphas(both, lora, tmp_path):
    plain, pipe = both
    calls = each(plain, pipe)
    calls.load_lora_weights(lora(1, targets=ATTENTION))
    first = same(plain, pipe)
    calls.unload_lora_weights()
    calls.load_lora_weights(kohya(lora(1, targets=ATTENTION), tmp_path / "kohya.safetensors"))
    scaled = same(plain, pipe)
    assert differ(scaled, first) > VISIBLE, "alpha is less than the rank"
