"""Engines free of weights, as far as nothing has to be compiled: programs, weights, keys, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import factories
import pytest
import safetensors.torch
import torch
from diffusers import ControlNetModel

from sdtrt.backends import build as building
from sdtrt.backends import open as opening
from sdtrt.backends import registry
from sdtrt.backends.build import engine_key
from sdtrt.backends.inductor import build, worker
from sdtrt.backends.inductor.weights import (
    CONSTANTS_FILE,
    Constant,
    Weights,
    check_constants,
    check_sources,
    read_constants,
    read_fixed,
    write_constants,
    write_fixed,
)
from sdtrt.backends.open import open_session
from sdtrt.backends.session import Session
from sdtrt.common.console import QUIET
from sdtrt.common.errors import BuildError, EngineError, ModelError, UsageError
from sdtrt.engines.find import best_fit
from sdtrt.exports import computed
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.program import Recipe, export_program
from sdtrt.exports.tracing import reference
from sdtrt.models.architecture import Blueprint, architecture_of
from sdtrt.models.components import VAE_HALVES, contract_of, load_component, profile_of
from sdtrt.models.live import LiveModel
from sdtrt.models.resolve import resolve_model
from sdtrt.models.tensor_names import other_names, own_tensors
from sdtrt.pipeline.opening.engines import ensure_engines
from sdtrt.reports import doctor
from sdtrt.specs import BuildRequest, BuildSpec, ExportSpec, LoraSpec, ModelSpec, Profile, Range, Sizes
from sdtrt.specs.groups import controlnet_contract

CPU = torch.device("cpu")
SIZES = Sizes(2, 128, 128)
PROFILE = Profile.of(SIZES)
COMPONENTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one architecture."""
    folder = tmp_path_factory.mktemp("models")
    return [resolve_model(ModelSpec(str(factories.sd1_folder(folder / str(seed), seed=seed)))) for seed in (0, 1)]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return resolve_model(ModelSpec(str(factories.sdxl_folder(tmp_path_factory.mktemp("sdxl") / "model"))))


def program_of(model, component, profile=PROFILE, recipe=None):
    """A component's program, and the module's tensors before it was laid out."""
    module = load_component(model, component, torch.float32)
    tensors = {name: tensor.clone() for name, tensor in own_tensors(module.state_dict()).items()}
    contract = contract_of(model, component, "fp32")
    return export_program(module, contract, profile_of(component, profile), device=CPU, recipe=recipe), tensors


# ------------------------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("component", [pytest.param("unet", marks=pytest.mark.slow), *COMPONENTS[1:]])
def test_a_programs_weights_are_the_models_own_by_name(models, component):
    """Each of the component's tensors is in exactly one of the program's, where its sources say it is."""
    program, tensors = program_of(models[0], component)
    named = [name for names in program.sources.values() for name in names]
    own = {name for name in tensors if not name.startswith(other_names(component))}
    assert sorted(named) == sorted(own)
    for name, weight in program.weights.items():
        parts = [tensors[source] for source in program.sources[name]]
        assert torch.equal(weight, torch.cat(parts) if len(parts) > 1 else parts[0]), name


@pytest.mark.parametrize(
    "component", [pytest.param("unet", marks=pytest.mark.slow), "text_encoder", "text_encoder_2", "vae_decoder"]
)
def test_so_are_those_of_sdxl_and_the_program_computes_the_same(sdxl, component):
    program, tensors = program_of(sdxl, component)
    named = {name for names in program.sources.values() for name in names}
    assert named == {name for name in tensors if not name.startswith(other_names(component))}
    contract, module = contract_of(sdxl, component, "fp32"), load_component(sdxl, component, torch.float32)
    feeds = tuple(seeded_feeds(contract, profile_of(component, PROFILE).optimum).values())
    with torch.inference_mode():
        found, wanted = program.exported.module()(*feeds), reference(module, contract)(*feeds)
    pairs = [(found, wanted)] if isinstance(wanted, torch.Tensor) else zip(found, wanted, strict=True)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)


@pytest.mark.slow
def test_projections_are_fused_and_convolutions_lie_channels_last(models):
    program, _ = program_of(models[0], "unet")
    joined = {name: sources for name, sources in program.sources.items() if len(sources) > 1}
    assert {len(sources) for sources in joined.values()} == {2, 3}
    assert not any(".to_k." in name or ".to_v." in name for name in program.sources), "nothing is kept twice"
    weight = program.weights["unet.conv_in.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    plain, _ = program_of(models[0], "unet", recipe=Recipe(fused_projections=False, channels_last=False))
    assert all(len(sources) == 1 for sources in plain.sources.values())
    assert all(weight.is_contiguous() for weight in plain.weights.values())


@pytest.mark.parametrize(
    "component", ["vae_decoder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("unet", "vae_encoder"))]
)
def test_a_program_may_take_ranges_of_sizes(models, component):
    """And computes there what the module computes."""
    profile = Profile(Range(1, 2, 4), Range(72, 128, 192), Range(72, 128, 192), Range.of(77))
    program, _ = program_of(models[0], component, profile)
    module = load_component(models[0], component, torch.float32)
    contract = contract_of(models[0], component, "fp32")
    ran = program.exported.module()
    batch = 1 if component == "vae_encoder" else 2
    for sizes in (Sizes(batch, 72, 192), Sizes(batch, 128, 128), Sizes(1, 88, 104)):
        feeds = tuple(seeded_feeds(contract, sizes).values())
        with torch.inference_mode():
            assert torch.allclose(ran(*feeds), reference(module, contract)(*feeds), atol=1e-4), sizes


def test_a_causal_mask_is_no_weight_of_the_model(models):
    program, _ = program_of(models[0], "text_encoder")
    assert "mask" in program.fixed
    assert "mask" not in program.sources


# -------------------------------------------------------------------------------------------------------- weights


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "conv.weight": torch.randn(8, 4, 3, 3, generator=generator).to(memory_format=torch.channels_last),
        "conv.bias": torch.randn(8, generator=generator),
        "attn.to_qkv.weight": torch.randn(12, 4, generator=generator),
        "mask": torch.randn(3, 3, generator=generator),
    }


SOURCES = {
    "conv.weight": ("conv.weight",),
    "conv.bias": ("conv.bias",),
    "attn.to_qkv.weight": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
}


def constants():
    return tuple(Constant.of(name, tensor, SOURCES.get(name, ())) for name, tensor in tensors().items())


def of_model(seed=1):
    """The tensors of a model, by its own names."""
    generator = torch.Generator().manual_seed(seed)
    found = {"conv.weight": torch.randn(8, 4, 3, 3, generator=generator)}
    found |= {name: torch.randn(4, 4, generator=generator) for name in SOURCES["attn.to_qkv.weight"]}
    return found | {"conv.bias": torch.randn(8, generator=generator)}


def test_right_tensors_pass():
    check_constants(constants(), tensors())
    check_sources(constants(), of_model())


def test_the_stride_of_an_axis_of_one_element_is_never_used():
    one = torch.randn(8, 4, 1, 1)
    check_constants([Constant.of("x", one)], {"x": one.to(memory_format=torch.channels_last)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"conv.bias": t["conv.bias"].half()}, "conv.bias: dtype float16 instead of float32"),
        (lambda t: t | {"conv.bias": t["conv.bias"][:4]}, r"conv.bias: shape \(4,\)"),
        (lambda t: t | {"conv.weight": t["conv.weight"].contiguous()}, "conv.weight: strides"),
        (lambda t: t | {"conv.bias": t["conv.bias"].to("meta")}, "conv.bias: device meta instead of cpu"),
        (lambda t: t | {"conv.bias": torch.randn(9)[1:]}, "address no multiple"),
        (lambda t: {name: one for name, one in t.items() if name != "conv.bias"}, r"1 are missing \(conv.bias\)"),
        (lambda t: t | {"other": torch.zeros(1)}, r"1 are not the engine's \(other\)"),
    ],
    ids=["dtype", "shape", "layout", "device", "address", "missing", "unknown"],
)
def test_what_a_package_would_misread_is_refused(change, message):
    with pytest.raises(EngineError, match=message) as caught:
        check_constants(constants(), change(tensors()))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"conv.bias": t["conv.bias"].half()}, r"conv.bias: float16 \[8\] instead of float32 \[8\]"),
        (lambda t: t | {"attn.to_k.weight": torch.zeros(5, 4)}, r"attn.to_k.weight: float32 \[5, 4\]"),
        (lambda t: {name: one for name, one in t.items() if name != "attn.to_v.weight"}, "attn.to_v.weight"),
        (lambda t: t | {"lora.weight": torch.zeros(1)}, r"1 are unknown to it \(lora.weight\)"),
    ],
    ids=["dtype", "shape", "missing", "unknown"],
)
def test_a_model_that_does_not_fit_changes_nothing(change, message):
    weights = Weights(constants(), tensors(), CPU)
    weights.fill(of_model())
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    with pytest.raises(EngineError, match=message):
        weights.fill(change(of_model(seed=2)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors.items())


def test_weights_stay_where_they_are_and_their_parts_are_views():
    """Packages and graphs have their addresses; who writes to a view changes what is computed with."""
    weights = Weights(constants(), tensors(), CPU)
    weights.check()
    places = {name: tensor.data_ptr() for name, tensor in weights.tensors.items()}
    for seed in (1, 2):
        given = of_model(seed)
        weights.fill(given)
        joined = torch.cat([given[name] for name in SOURCES["attn.to_qkv.weight"]])
        assert torch.equal(weights.tensors["attn.to_qkv.weight"], joined)
        assert torch.equal(weights.tensors["conv.weight"], given["conv.weight"])
    assert {name: tensor.data_ptr() for name, tensor in weights.tensors.items()} == places
    weights.check()
    views = weights.views()
    assert set(views) == set(of_model())
    views["attn.to_k.weight"].fill_(7)
    assert torch.equal(weights.tensors["attn.to_qkv.weight"][4:8], torch.full((4, 4), 7.0))
    assert weights.size_bytes == sum(tensor.nbytes for tensor in tensors().values())


def test_what_is_shared_before_it_was_asked_for_takes_no_memory(monkeypatch):
    first, made, new = Weights(constants(), tensors(), CPU), [], Constant.new
    first.fill(of_model())
    monkeypatch.setattr(Constant, "new", lambda one, device: made.append(one.name) or new(one, device))
    otherwise = [replace(one, strides=(1, 12)) if one.name == "attn.to_qkv.weight" else one for one in constants()]
    second = Weights(otherwise, tensors(), CPU)
    second.share(first)
    assert sorted(made) == ["attn.to_qkv.weight", "mask"]  # what lies otherwise, and the engine's own
    assert torch.equal(second.tensors["mask"], tensors()["mask"])
    second.follow(first.views())
    assert torch.equal(second.tensors["attn.to_qkv.weight"], first.tensors["attn.to_qkv.weight"])
    first.views()["conv.weight"].fill_(7)
    assert torch.equal(second.views()["conv.weight"], torch.full_like(first.views()["conv.weight"], 7.0))


def test_weights_in_another_precision_are_cast_and_looked_at_where_the_engine_has_them():
    """A mask, which is the engine's own, may well be infinite."""
    half = tuple(replace(one, dtype="float16") for one in constants())
    weights = Weights(half, tensors() | {"mask": torch.full((3, 3), -torch.inf)}, CPU)
    given = of_model()
    with pytest.raises(EngineError, match="float32"):
        weights.fill(given)
    weights.fill(given, casts=True)
    assert all(torch.equal(view, given[name].half()) for name, view in weights.views().items())
    assert weights.are_finite()
    for value in (1e6, torch.nan):
        weights.fill(given | {"attn.to_k.weight": torch.full((4, 4), value)}, casts=True)
        assert not weights.are_finite()


class Taking(Session):
    """A session that takes stored weights, and says of them what it is told to say."""

    def __init__(self, contract, finite):
        self.contract, self.finite, self.module = contract, finite, None

    def take_stored(self, tensors):
        self.taken = tensors
        return self.finite

    def set_weights(self, weights):
        self.module = weights


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_session_gets_what_is_stored(models, component):
    session = Taking(contract_of(models[0], component, "fp16"), finite=True)
    opening._give_weights(session, models[0])
    wanted = load_component(models[0], component, torch.float32).state_dict()
    assert session.taken.keys() == wanted.keys()
    assert all(torch.equal(tensor.float(), wanted[name]) for name, tensor in session.taken.items())
    assert session.module is None


def test_a_session_gets_a_part_that_loras_change_with_them_merged(models, tmp_path):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = load_component(models[0], "unet", torch.float32).get_submodule(layer).weight
    ones = {"A": torch.ones(1, plain.shape[1]), "B": torch.ones(plain.shape[0], 1)}
    file = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({f"unet.{layer}.lora_{name}.weight": one for name, one in ones.items()}, file)
    model = resolve_model(replace(models[0].spec, loras=(LoraSpec(str(file)),)))
    session = Taking(contract_of(model, "unet", "fp32"), finite=True)
    opening._give_weights(session, model)
    torch.testing.assert_close(session.module.get_submodule(layer).weight, plain + 1)
    session = Taking(contract_of(model, "vae_decoder", "fp32"), finite=True)
    opening._give_weights(session, model)
    assert session.module is None, "no LoRA changes that part"


def test_a_number_that_is_not_finite_there_is_named_by_who_reads_the_file(models, tmp_path):
    folder = Path(shutil.copytree(models[0].source, tmp_path / "model"))
    (file,) = folder.glob("unet/*.safetensors")
    stored = safetensors.torch.load_file(file)
    large = torch.full(stored["conv_in.bias"].shape, 1e6)
    safetensors.torch.save_file(stored | {"conv_in.bias": large}, file)
    model = resolve_model(ModelSpec(str(folder)))
    session = Taking(contract_of(model, "unet", "fp16"), finite=False)
    with pytest.raises(ModelError, match=r"conv_in\.bias of the unet .* does not fit into float16"):
        opening._give_weights(session, model)
    opening._give_weights(session, models[0])
    assert isinstance(session.module, torch.nn.Module), "it is not the numbers that are stored"


def test_what_was_made_in_inference_mode_can_be_written_to_outside():
    with torch.inference_mode():
        weights = Weights(constants(), tensors(), CPU)
    weights.fill(of_model())


def test_the_list_of_constants_comes_back_as_it_was_written(tmp_path):
    write_constants(tmp_path, constants())
    assert read_constants(tmp_path / CONSTANTS_FILE) == constants()
    write_fixed(tmp_path, {"mask": tensors()["mask"]})
    fixed = read_fixed(tmp_path / "engine.pt2.safetensors", constants())
    assert list(fixed) == ["mask"]
    assert torch.equal(fixed["mask"], tensors()["mask"])
    (tmp_path / CONSTANTS_FILE).write_text(json.dumps([{"name": "x"}]))
    with pytest.raises(EngineError, match="no list of a package's weights"):
        read_constants(tmp_path / CONSTANTS_FILE)
    with pytest.raises(EngineError, match="mask is missing from its entry"):
        Weights(constants(), {}, CPU)


def test_an_engine_with_weights_inside_takes_no_others(models):
    class Holding(Session):
        contract = contract_of(models[0], "unet", "fp32")

    with pytest.raises(EngineError, match="holds its weights") as caught:
        Holding().set_weights({})
    assert "inductor" in caught.value.hint


# ------------------------------------------------------------------------------------------------------------ keys


def spec_of(model, component="unet", precision="fp32", profile=PROFILE):
    return BuildSpec(ExportSpec(model.spec, component, precision), "inductor", (profile_of(component, profile),))


def key_of(model, spec, directory):
    """An engine's key, as it is written."""
    return engine_key(model, spec, directory).to_json()


@pytest.mark.parametrize("component", COMPONENTS)
def test_two_checkpoints_have_one_key(models, directory, component):
    one, two = (key_of(model, spec_of(model, component), directory) for model in models)
    assert one == two
    text = json.dumps(one)
    assert models[0].fingerprint("unet", factories.sha256_of) not in text


def test_what_fine_tunes_differ_in_is_not_in_the_key(models, directory, tmp_path):
    """Where they came from, the size they were trained at, what a class takes anyway; not what the UNet is built of."""
    folder = tmp_path / "model"
    shutil.copytree(Path(models[0].spec.name), folder)
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    before = key_of(models[0], spec_of(models[0]), directory)

    def key_with(**values):
        file.write_text(json.dumps({**config, **values}))
        model = resolve_model(ModelSpec(str(folder)))
        return key_of(model, spec_of(model), directory)

    assert key_with(_name_or_path="elsewhere", sample_size=96, _diffusers_version="0.6.0") == before
    assert key_with(act_fn="silu", dropout=0.0) == before
    assert key_with(act_fn="gelu") != before
    assert key_with(norm_eps=1e-6) != before
    assert "sample_size" not in architecture_of(models[0], "unet")["values"]


def test_sizes_precision_and_versions_are_in_the_key(models, directory, monkeypatch):
    model = models[0]
    keys = [
        key_of(model, spec_of(model), directory),
        key_of(model, spec_of(model, precision="bf16"), directory),
        key_of(model, spec_of(model, profile=Profile.of(replace(SIZES, height=64))), directory),
    ]
    monkeypatch.setitem(build.OPTIONS, "conv_1x1_as_mm", False)
    keys.append(key_of(model, spec_of(model), directory))
    monkeypatch.setattr("sdtrt.common.host.library_version", lambda name: "9.9")
    keys.append(key_of(model, spec_of(model), directory))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 5


def test_an_engine_serves_every_checkpoint_and_no_other_version(models, directory, monkeypatch):
    backend = registry.get("inductor")
    key = key_of(models[0], spec_of(models[0]), directory)
    entry = directory.obtain("engine", key, lambda folder: {})

    def found(model):
        there = directory.entries("engine")
        return best_fit(model, backend.runs_here(), "fp32", SIZES, directory, "unet", there, backend.weights_inside)

    assert found(models[0]) == found(models[1]) == entry
    monkeypatch.setattr("sdtrt.common.host.library_version", lambda name: "9.9")
    assert found(models[1]) is None
    assert registry.is_foreign(entry)


@pytest.mark.parametrize("change", [{"host": {"processor": "another"}}, {"backend_version": "1.0"}, {"format": 0}])
def test_a_package_of_another_machine_is_never_opened(models, directory, change):
    """PyTorch would warn, and run it."""
    key = key_of(models[0], spec_of(models[0]), directory)
    entry = directory.obtain("engine", {**key, **change}, lambda folder: {})
    with pytest.raises(EngineError, match="another machine or version"):
        open_session(entry, CPU, None, models[0])


def test_vaes_of_either_family_have_one_engine_in_fp16_and_it_is_found(models, sdxl, directory):
    """SDXL's asks for fp32 (`force_upcast`), which this backend does without; others build it as it asks."""
    spec = spec_of(sdxl, "vae_decoder", "fp16")
    key = key_of(sdxl, spec, directory)
    assert key["options"]["recipe"]["stream_scale"] == 64
    assert key_of(models[0], spec_of(models[0], "vae_decoder", "fp16"), directory) == key
    entry = directory.obtain("engine", key, lambda folder: {})
    assert factories.find_engine(sdxl, "inductor", "fp16", spec.profiles[0].optimum, directory, "vae_decoder") == entry
    wanted = factories.engines_wanted(sdxl, "inductor", "fp16", SIZES, ("vae_decoder",), images=1)
    assert ensure_engines(wanted, directory, allow_build=False) == {"vae_decoder": entry}
    for name, precision in (("inductor", "fp16"), ("tensorrt", "fp32"), ("onnxruntime", "fp32"), ("torch", "fp32")):
        assert registry.get(name).precision_of(sdxl, "vae_encoder", "fp16") == precision
    assert registry.get("inductor").precision_of(sdxl, "vae_encoder", "fp32") == "fp32"


def test_a_build_of_sdxls_vae_is_in_what_was_asked_for(sdxl, directory, monkeypatch):
    common = BuildSpec(ExportSpec(sdxl.spec, "vae_decoder", "fp16"), "inductor", ())
    asked = BuildRequest(common, VAE_HALVES, "fp16")
    built = []
    monkeypatch.setattr(building, "build_engine", lambda model, spec, *_: built.append(spec))
    building.build_all(asked, directory)
    assert [(spec.export.component, spec.export.precision) for spec in built] == [(one, "fp16") for one in VAE_HALVES]


# -------------------------------------------------------------------------------------------------------- requests


def live_model(**parts):
    modules = {"unet": factories.small_unet("sd1"), "text_encoder": factories.small_text_encoder(), **parts}
    return LiveModel(ModelSpec("APipeline"), modules | {"vae": factories.small_vae()})


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_a_live_module_is_built_by_its_blueprint(part):
    """Which has its layers, and weights that are the same in each process."""
    model = live_model()
    blueprint = Blueprint(**json.loads(json.dumps(asdict(Blueprint.of(model, part)))))
    state = torch.random.get_rng_state()
    one, two = (blueprint.with_seeded_weights(torch.float16).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    wanted = model.modules[part].state_dict()
    assert {name: tensor.shape for name, tensor in one.items()} == {name: one.shape for name, one in wanted.items()}
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_a_live_pipeline_has_the_key_of_its_files(models, directory, tmp_path):
    unet = load_component(models[0], "unet", torch.float32)
    encoder = load_component(models[0], "text_encoder", torch.float32)
    live = LiveModel(ModelSpec("APipeline"), {"unet": unet, "text_encoder": encoder})
    for component in ("unet", "text_encoder"):
        spec = replace(spec_of(models[0]), export=replace(spec_of(models[0]).export, component=component))
        assert engine_key(live, spec, directory) == engine_key(models[0], spec, directory)


def test_auto_takes_it_only_where_its_engines_are_there():
    assert "inductor" in registry.names()
    assert "inductor" in [backend.name for backend in registry.candidates("auto")], "its engines may be there"
    assert not registry.get("inductor").is_automatic("cpu"), "where they are not, a CPU gets none built unasked"
    assert registry.get("inductor").is_automatic("cuda")
    assert not registry.get("inductor").weights_inside
    assert registry.get("onnxruntime").weights_inside


def test_without_a_compiler_it_says_so(models, directory, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    problem = registry.get("inductor").why_not()
    assert "no C++ compiler /nowhere/c++" in problem.message
    assert "apt install g++" in problem.hint
    (finding,) = (one for one in doctor.diagnose(directory).findings if one.name == "inductor")
    assert (finding.state, finding.mend) == ("optional", problem.hint)
    assert problem.message in finding.detail
    assert "inductor" not in doctor.diagnose(directory).backends
    contract = contract_of(models[0], "unet", "fp32")
    request = build.Request(spec_of(models[0]).export, PROFILE, contract, directory.path, "cpu")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build.build_package(request, QUIET)


def test_without_setuptools_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # any program that is there
    monkeypatch.setitem(sys.modules, "setuptools", None)
    problem = registry.get("inductor").why_not()
    assert "setuptools is not installed" in problem.message
    assert problem.hint == "pip install setuptools"


@pytest.mark.parametrize("component", ["unet", "controlnet"])
def test_the_reference_of_a_check_is_computed_a_few_rows_at_a_time(models, component, monkeypatch):
    """PyTorch's own fp32 is wrong at many rows of a large picture at once, on an H200."""
    model = models[0]
    contract = contract_of(model, "unet", "fp32")
    module = load_component(model, "unet", torch.float32)
    if component == "controlnet":
        module = ControlNetModel.from_unet(module)
        contract = controlnet_contract(module.config, "fp32")
    feeds, seen = seeded_feeds(contract, Sizes(5, 64, 64)), []
    whole = reference(module, contract)
    expected = whole(*feeds.values())

    def spied(*args):
        call = reference(*args)
        return lambda *inputs: seen.append([len(one) for one in inputs]) or call(*inputs)

    monkeypatch.setattr(computed, "reference", spied)
    request = build.Request(spec_of(model).export, PROFILE, contract, Path("nowhere"), "cpu")
    found = worker._reference(module, request)(feeds)
    assert [max(one[:-1]) for one in seen] == [2, 2, 1]
    wanted = (expected,) if isinstance(expected, torch.Tensor) else expected
    for spec, one in zip(contract.outputs, wanted, strict=True):
        torch.testing.assert_close(found[spec.name], one.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": ()}, "one profile, got 0"),
        ({"profiles": (PROFILE, Profile.of(Sizes(1, 64, 64)))}, "one profile, got 2"),
        ({"optimization_level": 3}, "no optimization level"),
        ({"version_compatible": True}, "version compatibility"),
        ({"compute_capability": (8, 9)}, "compute capability"),
    ],
)
def test_what_it_does_not_build_is_refused(models, options, message):
    spec = replace(spec_of(models[0]), **options)
    with pytest.raises(UsageError, match=message):
        registry.get("inductor").check(spec)


def test_a_request_comes_through_the_pipe_as_it_was(models, tmp_path):
    request = build.Request(spec_of(models[0]).export, PROFILE, contract_of(models[0], "unet", "fp32"), tmp_path, "cpu")
    for one in (request, replace(request, blueprint=Blueprint.of(live_model(), "unet"))):
        assert build.Request.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_users_environment_changes_no_engine_and_no_folder_of_theirs_is_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("CXX", "g++-13")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/bin/ptxas")
    environment = build._environment(tmp_path)
    assert "TORCHINDUCTOR_FREEZING" not in environment
    assert (environment["CXX"], environment["TRITON_PTXAS_PATH"]) == ("g++-13", "/usr/bin/ptxas")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR"):
        assert Path(environment[name]).is_relative_to(tmp_path)


def test_the_recipe_of_the_key_is_the_recipe(models):
    """With what is otherwise for a VAE, as its stream's scale in fp16; other components' keys say nothing of it."""
    for component, precision, scale in (("unet", "fp16", 1), ("vae_decoder", "fp32", 1), ("vae_encoder", "fp16", 64)):
        spec = spec_of(models[0], component, precision)
        recipe = registry.get("inductor").options_key(spec)["recipe"]
        assert recipe == build.recipe_of(spec.export)
        own = build.VAE_RECIPE if component.startswith("vae") else {}
        nothing = {"quantised": "", "kept": ()}
        assert asdict(Recipe(**recipe)) == {**build.RECIPE, **own, "stream_scale": scale, **nothing}
        assert not recipe.keys() & nothing.keys()
        assert ("stream_scale" in recipe) == (scale != 1)
