"""Requests to images: seeds, schedulers, files, and diffusers' own pipelines as the reference."""

from __future__ import annotations

import json
import random
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
import transformers
from factories import SMALL, sd1_folder, sd1_single_file, sdxl_folder, sha256_of, tampered_engine, unet_engine
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtrt.backends.onnxruntime.session import OnnxRuntimeSession
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import EngineError, MemoryShortage, OutputError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.engines.keys import EngineKey, parse_key
from sdtrt.models import loading, resolve
from sdtrt.models.components import sizes_of
from sdtrt.models.weights import read_tensors
from sdtrt.pipeline.inputs import prompts as prompt_checks
from sdtrt.pipeline.inputs.images import read_metadata, read_parameters
from sdtrt.pipeline.opening import engines
from sdtrt.pipeline.runs import saving, settings
from sdtrt.pipeline.runs.generate import generate
from sdtrt.pipeline.runs.jobs import Job, Jobs
from sdtrt.specs import SCHEDULERS, GenerateSpec, ModelSpec, NoiseSpec, Profile, Range, Sizes

pytestmark = pytest.mark.usefixtures("on_the_cpu")
# Of CLIP's text encoder, whose modules lie one level deeper before transformers 5.
LAST_NORM = "final_layer_norm" if int(transformers.__version__.split(".")[0]) >= 5 else "text_model.final_layer_norm"


class Recorder(Console):
    """A console that remembers what it was told."""

    def __init__(self):
        super().__init__(quiet=True)
        self.notes, self.warnings, self.bars = [], [], []

    def note(self, text):
        self.notes.append(text)

    def warn(self, text):
        self.warnings.append(text)

    @contextmanager
    def bar(self, name, total):
        entry = {"name": name, "total": total, "done": 0}
        self.bars.append(entry)

        def advance():
            entry["done"] += 1

        yield advance


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return sd1_folder(tmp_path_factory.mktemp("models") / "sd1", **SMALL)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl", layers_per_block=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def spec(sd1, tmp_path):
    return GenerateSpec(
        ("red on blue",), ModelSpec(str(sd1)), backend="torch", steps=3, seed=5, output=tmp_path / "out"
    )


@pytest.fixture
def init_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    path = tmp_path / "init.png"
    Image.fromarray(pixels).save(path)
    return path


def made(spec, directory, console=QUIET):
    """The report's paths."""
    return [image.path for image in generate(spec, directory, console).images]


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def own_pipeline(folder, *, img2img=False):
    """The untouched pipeline, loaded by diffusers itself."""
    cls = diffusers.AutoPipelineForImage2Image if img2img else diffusers.AutoPipelineForText2Image
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# The same picture as diffusers' own


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_txt2img_is_the_picture_of_diffusers_own_pipeline(kind, spec, directory, request):
    folder = request.getfixturevalue(kind)
    spec = replace(spec, model=ModelSpec(str(folder)), negative_prompt="green", height=72, width=88)
    expected = own_pipeline(folder)(
        "red on blue",
        negative_prompt="green",
        num_inference_steps=3,
        guidance_scale=7.5,
        height=72,
        width=88,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(pixels_of(made(spec, directory)[0]), np.asarray(expected))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_img2img_is_the_picture_of_diffusers_own_pipeline(kind, spec, directory, init_image, request):
    folder = request.getfixturevalue(kind)
    spec = replace(spec, model=ModelSpec(str(folder)), init_image=init_image, strength=0.7, height=64, width=96)
    expected = own_pipeline(folder, img2img=True)(
        "red on blue",
        image=Image.open(init_image).convert("RGB").resize((96, 64), Image.Resampling.LANCZOS),
        strength=0.7,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    np.testing.assert_array_equal(pixels_of(made(spec, directory)[0]), np.asarray(expected))


@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
def test_an_engine_gives_the_picture_of_the_native_pipeline(img2img, spec, directory, init_image):
    spec = replace(spec, init_image=init_image if img2img else None)
    native = pixels_of(made(spec, directory)[0])
    swapped = pixels_of(made(replace(spec, backend="onnxruntime"), directory)[0])
    assert native.std() > 1
    assert np.abs(native - swapped).max() <= 1


SLOW_IMG2IMG = pytest.param(True, marks=pytest.mark.slow)

# What a pipeline asks of PyTorch, by the components that engines run.
LEFT_TO_PYTORCH = [
    pytest.param((), False, [], marks=pytest.mark.slow),
    ((), True, []),
    (("unet",), False, ["text_encoder", "vae"]),
    (("text_encoder", "vae_decoder"), False, ["unet"]),
    pytest.param(("unet", "text_encoder", "vae_decoder"), True, ["vae"], marks=pytest.mark.slow),
    (("unet", "text_encoder", "vae_encoder"), True, ["vae"]),
]


@pytest.mark.parametrize(("components", "img2img", "rest"), LEFT_TO_PYTORCH)
def test_what_engines_replace_is_not_loaded(components, img2img, rest, spec, directory, init_image, monkeypatch):
    """Not a tensor of it is read; and the picture is that of the native pipeline, whatever engines run."""
    spec = replace(spec, init_image=init_image if img2img else None)
    expected = pixels_of(made(spec, directory)[0])
    spec = replace(spec, backend="onnxruntime", components=components)
    made(spec, directory)  # builds what is missing
    read = []
    real = read_tensors

    def watch(path, names):
        read.append(path.parent.name)
        return real(path, names)

    monkeypatch.setattr(loading, "read_tensors", watch)
    report = generate(spec, directory, QUIET)
    assert sorted(read) == rest
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= 1
    used = set(components or ("unet", "text_encoder", "vae_decoder", "vae_encoder"))
    assert set(report.engines) == used - (set() if img2img else {"vae_encoder"})
    assert len({engine["digest"] for engine in report.engines.values()}) == len(report.engines)


@pytest.mark.parametrize("img2img", [False, SLOW_IMG2IMG], ids=["txt2img", "img2img"])
def test_both_of_sdxls_text_encoders_run_in_engines(img2img, spec, sdxl, directory, init_image):
    init = init_image if img2img else None
    spec = replace(spec, model=ModelSpec(str(sdxl)), negative_prompt="green", init_image=init, height=64, width=88)
    native = pixels_of(made(spec, directory)[0])
    every = ("text_encoder", "text_encoder_2", "vae_decoder", "vae_encoder")
    swapped = pixels_of(made(replace(spec, backend="onnxruntime", components=every), directory)[0])
    assert native.std() > 1
    assert np.abs(native - swapped).max() <= 1


def test_a_component_that_the_model_has_not_is_a_usage_error(spec, directory):
    spec = replace(spec, backend="onnxruntime", components=("text_encoder_2",))
    with pytest.raises(UsageError, match="has no text_encoder_2") as caught:
        generate(spec, directory, QUIET)
    assert "text_encoder, unet, vae_decoder, vae_encoder" in caught.value.hint
    with pytest.raises(UsageError, match="no engines"):
        generate(replace(spec, backend="torch"), directory, QUIET)
    with pytest.raises(UsageError, match="vae_decodr"):
        replace(spec, components=("vae_decodr",))


def test_a_missing_engine_is_not_built_against_the_users_will(spec, tmp_path):
    with pytest.raises(EngineError, match="no onnxruntime") as caught:
        generate(replace(spec, backend="onnxruntime", allow_build=False), EngineDirectory(tmp_path / "engines"), QUIET)
    assert caught.value.hint.startswith("sdtrt build ")
    assert not (tmp_path / "engines").exists()
    assert not (tmp_path / "out").exists()


def test_the_native_pipeline_runs_in_the_precision_asked_for(spec, directory):
    report = generate(replace(spec, precision="bf16"), directory, QUIET)
    full = pixels_of(made(spec, directory)[0])
    assert report.settings["precision"] == "bf16"
    assert 0 < np.abs(pixels_of(report.images[0].path) - full).mean() < 8


# Seeds


def test_images_of_a_prompt_count_up_and_each_prompt_starts_again(spec, directory):
    report = generate(replace(spec, prompts=("red", "blue"), num_images=2), directory, QUIET)
    assert [(image.prompt, image.seed) for image in report.images] == [
        ("red", 5),
        ("red", 6),
        ("blue", 5),
        ("blue", 6),
    ]
    assert len({image.path.read_bytes() for image in report.images}) == 4


def test_tens_of_millions_of_images_take_no_memory_before_they_are_made(spec, directory, monkeypatch):
    def full(self, image, metadata, *, prompt, seed):
        raise OutputError(f"no room for {prompt} {seed}", hint="none")

    monkeypatch.setattr(saving.OutputPlan, "save", full)
    prompts = tuple(f"picture {number}" for number in range(500))
    monkeypatch.setattr(prompt_checks, "_warn_truncated", lambda *_: None)  # of each prompt, in seconds
    tracemalloc.start()
    try:
        with pytest.raises(OutputError, match="picture 0 5"):
            generate(replace(spec, prompts=prompts, num_images=100_000, steps=1, height=64, width=64), directory, QUIET)
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()


def test_jobs_go_through_each_prompts_seeds():
    jobs = Jobs(("a", "b"), 3, 7)
    assert len(jobs) == 6
    assert jobs.batch(0, 9) == [Job(prompt, seed) for prompt in "ab" for seed in (7, 8, 9)]
    assert jobs.batch(2, 2) == [Job("a", 9), Job("b", 7)]
    assert jobs.batch(5, 4) == [Job("b", 9)]


# Those that draw noise of their own, and those that remember steps or take two; the others are as one of them.
DISTINCT = ("pndm", "euler-a", "lcm", "heun")


@pytest.mark.parametrize(
    "scheduler", [pytest.param(name, marks=[pytest.mark.slow] * (name not in DISTINCT)) for name in SCHEDULERS]
)
def test_a_seed_gives_the_same_image_whatever_the_batch(scheduler, spec, directory):
    spec = replace(spec, scheduler=scheduler)
    batch = made(replace(spec, prompts=("blue", "red on blue"), num_images=2), directory)
    alone = made(replace(spec, seed=6, output=spec.output / "alone"), directory)
    assert batch[3].read_bytes() == alone[0].read_bytes()


@pytest.mark.parametrize(
    ("img2img", "scheduler"),
    [
        pytest.param(img2img, name, marks=[pytest.mark.slow] * (img2img != (name in ("euler-a", "heun"))))
        for img2img in (False, True)
        for name in DISTINCT
    ],
    ids=lambda value: value if isinstance(value, str) else ("txt2img", "img2img")[value],
)
def test_images_made_at_once_are_those_made_alone(img2img, scheduler, spec, directory, init_image):
    spec = replace(spec, prompts=("blue", "red on blue"), num_images=2, negative_prompt="green", scheduler=scheduler)
    spec = replace(spec, init_image=init_image if img2img else None)
    alone = generate(spec, directory, QUIET).images
    report = generate(replace(spec, batch_size=3), directory, QUIET)
    assert [(image.prompt, image.seed) for image in report.images] == [(image.prompt, image.seed) for image in alone]
    assert report.settings["batch_size"] == 3
    for one, other in zip(alone, report.images, strict=True):
        assert np.abs(pixels_of(one.path) - pixels_of(other.path)).max() <= 1
    assert len({pixels_of(image.path).tobytes() for image in alone}) == 4


def test_an_engine_makes_batches_too(spec, directory):
    spec = replace(spec, num_images=3, guidance_scale=1.0)
    native = made(spec, directory)
    swapped = made(replace(spec, backend="onnxruntime", batch_size=2), directory)
    for one, other in zip(native, swapped, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1


def test_components_that_leave_nothing_to_engines_are_refused(spec, directory):
    with pytest.raises(UsageError, match="--component vae_encoder leaves no engine to run"):
        generate(replace(spec, backend="onnxruntime", components=("vae_encoder",)), directory, QUIET)


def test_what_pytorch_runs_beside_engines_is_said(spec, directory):
    console = Recorder()
    generate(replace(spec, backend="onnxruntime", components=("unet", "vae_encoder")), directory, console)
    assert "vae_encoder: not called without an init image" in console.notes
    assert "text_encoder, vae_decoder: in PyTorch, in fp32" in console.notes


def test_images_of_a_batch_are_encoded_one_by_one_as_their_engine_expects(spec, directory, init_image, monkeypatch):
    """diffusers encodes an image for each generator; an engine of one size must be built for that."""
    spec = replace(spec, backend="onnxruntime", num_images=2, batch_size=2, init_image=init_image)
    made(spec, directory)  # builds what is missing, and runs that at other sizes
    sizes, real = [], OnnxRuntimeSession.run

    def note(session, feeds):
        sizes.append((session.contract.component, next(iter(feeds.values())).shape[0]))
        return real(session, feeds)

    monkeypatch.setattr(OnnxRuntimeSession, "run", note)
    made(spec, directory)
    called = {count for name, count in sizes if name == "vae_encoder"}
    assert called == {sizes_of("vae_encoder", Sizes(4, 64, 64), images=2).batch}


def key_for_images(images, entry):
    """An entry's key, as that of an engine which makes exactly so many images at once."""
    key = parse_key(entry.kind, entry.key)
    if not isinstance(key, EngineKey):
        return key
    rows, pixels = 2 * images if key.component == "unet" else images, Range(8, 64, 512)
    return replace(key, profiles=(Profile(Range(rows, rows, rows), pixels, pixels, Range(1, 77, 77)),))


def test_an_engine_for_full_batches_only_gets_full_batches(spec, directory, monkeypatch):
    """As TensorRT's are, built for exactly the batch that is asked for."""
    spec = replace(spec, backend="onnxruntime", num_images=3)
    expected = made(spec, directory)
    rows, real = [], OnnxRuntimeSession.run

    def note(session, feeds):
        if session.contract.component == "unet":
            rows.append(feeds["sample"].shape[0])
        return real(session, feeds)

    monkeypatch.setattr(OnnxRuntimeSession, "run", note)
    with monkeypatch.context() as patched:
        patched.setattr(Entry, "parsed_key", property(partial(key_for_images, 2)))
        filled = made(replace(spec, batch_size=2), directory)
    assert set(rows) == {4}
    assert len(filled) == 3
    for one, other in zip(expected, filled, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1
    rows.clear()
    made(replace(spec, batch_size=2), directory)
    assert set(rows) == {4, 2}


def test_a_batch_has_no_more_images_than_were_asked_for(spec, directory):
    console = Recorder()
    report = generate(replace(spec, num_images=2, batch_size=8), directory, console)
    assert report.settings["batch_size"] == 2
    assert [bar["name"] for bar in console.bars] == ["images 1 to 2 of 2, seeds 5, 6"]
    assert [note.split(":")[0] for note in console.notes[-2:]] == ["image 1 of 2, seed 5", "image 2 of 2, seed 6"]
    with pytest.raises(UsageError, match="batch size"):
        replace(spec, batch_size=0)


def test_two_runs_with_one_seed_give_identical_files(spec, directory):
    one, two = made(spec, directory)[0], made(spec, directory)[0]
    assert one != two
    assert one.read_bytes() == two.read_bytes()


def test_without_a_seed_it_is_random_and_told(spec, directory):
    console = Recorder()
    report = generate(replace(spec, seed=None), directory, console)
    seed = report.images[0].seed
    assert 0 <= seed < 2**32
    assert any(f"seed {seed}" in note for note in console.notes)
    assert generate(replace(spec, seed=None), directory, QUIET).images[0].seed != seed
    again = made(replace(spec, seed=seed), directory)[0]
    assert again.read_bytes() == report.images[0].path.read_bytes()


def test_global_random_state_neither_matters_nor_changes(spec, directory):
    torch.manual_seed(1)
    random.seed(1)
    one = made(spec, directory)[0]
    before = torch.random.get_rng_state()
    two = made(spec, directory)[0]
    assert one.read_bytes() == two.read_bytes()
    assert torch.equal(before, torch.random.get_rng_state())


# What images and reports say


def test_an_image_says_how_to_make_it_again(spec, directory, init_image):
    spec = replace(
        spec,
        prompts=("red, on\nblue",),
        negative_prompt="green: no",
        scheduler="dpm++",
        guidance_scale=4.25,
        init_image=init_image,
        strength=0.75,
    )
    path = made(spec, directory)[0]
    details = read_metadata(path).details
    assert details["init_image"]["sha256"] == sha256_of(init_image)
    again = GenerateSpec(
        prompts=(details["prompt"],),
        model=ModelSpec(details["model"]["name"]),
        backend=details["backend"],
        precision=details["precision"],
        negative_prompt=details["negative_prompt"],
        steps=details["steps"],
        guidance_scale=details["guidance_scale"],
        height=details["height"],
        width=details["width"],
        seed=details["seed"],
        scheduler=details["scheduler"]["name"],
        init_image=init_image,
        strength=details["strength"],
        output=spec.output,
    )
    assert made(again, directory)[0].read_bytes() == path.read_bytes()


def test_an_image_has_the_parameters_that_web_uis_read(spec, directory, init_image):
    parsed = read_parameters(made(replace(spec, negative_prompt="green"), directory)[0])
    assert (parsed.prompt, parsed.negative_prompt) == ("red on blue", "green")
    wanted = {"Steps": "3", "Sampler": "PLMS", "CFG scale": "7.5", "Seed": "5", "Size": "64x64", "Model": "sd1"}
    assert wanted.items() <= parsed.fields.items()
    assert parsed.fields["Version"].startswith("sdtrt ")
    assert "Denoising strength" not in parsed.fields
    parsed = read_parameters(made(replace(spec, init_image=init_image, scheduler="euler-a"), directory)[0])
    wanted = {"Sampler": "Euler a", "Schedule type": "DDIM", "Denoising strength": "0.8", "Size": "64x40", "RNG": "CPU"}
    assert wanted.items() <= parsed.fields.items()


def test_web_uis_are_told_what_they_would_take_otherwise(spec, directory):
    assert read_parameters(made(spec, directory)[0]).fields["RNG"] == "CPU", "their own noise is a GPU's"
    for prompt, emphasis in (("red on blue", None), ("(red:1.3)", "None"), ("a [dog]", "None")):
        path = made(replace(spec, prompts=(prompt,), steps=1), directory)[0]
        assert read_parameters(path).fields.get("Emphasis") == emphasis, "brackets are text here"


def test_the_report_is_plain_data_with_everything(spec, directory):
    data = generate(replace(spec, backend="onnxruntime", num_images=2), directory, QUIET).to_json()
    data = json.loads(json.dumps(data))
    assert [image["seed"] for image in data["images"]] == [5, 6]
    assert set(data["images"][0]) == {"path", "seed", "prompt", "negative_prompt", "width", "height"}
    assert data["model"]["name"] == str(spec.model.name)
    assert (data["backend"], data["precision"], data["steps"]) == ("onnxruntime", "fp32", 3)
    assert data["scheduler"] == {
        "name": None,
        "class": "PNDMScheduler",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    }
    assert (data["guidance_scale"], data["strength"], data["init_image"]) == (7.5, None, None)
    assert list(data["engines"]) == ["text_encoder", "unet", "vae_decoder"]
    assert data["engines"]["unet"] == data["engine"]
    assert directory.named(data["engine"]["name"]).digest == data["engine"]["digest"]
    assert data["versions"]["diffusers"] == diffusers.__version__
    assert len(data["seconds"]["generate"]) == 2


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_images_say_which_weights_on_which_device(backend, spec, directory):
    facts = read_metadata(made(replace(spec, backend=backend), directory)[0]).details
    model = resolve.resolve_model(spec.model)
    for part in ("unet", "text_encoder", "vae"):
        assert facts["model"][part] == model.fingerprint(part, directory.file_digest)
    assert facts["device"] == "cpu"


def test_both_text_encoders_are_fingerprinted(spec, sdxl, directory):
    facts = generate(replace(spec, model=ModelSpec(str(sdxl))), directory, QUIET).settings["model"]
    fingerprints = {facts[part] for part in ("unet", "text_encoder", "text_encoder_2", "vae")}
    assert len(fingerprints) == 4


@pytest.mark.parametrize("how", ["markers", "options"])
def test_a_v_prediction_checkpoint_makes_the_picture_of_diffusers_own_pipeline(how, spec, sd1, tmp_path, capsys):
    path = sd1_single_file(tmp_path / "one.safetensors", **SMALL)
    noise = NoiseSpec("v_prediction", "trailing", True)
    if how == "markers":
        save_file({**load_file(path), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
        noise = NoiseSpec()
    model = ModelSpec(str(path), config=str(sd1))
    asked = replace(spec, model=model, scheduler="euler", noise=noise, height=64, width=64)
    report = generate(asked, EngineDirectory(tmp_path / "engines"), Console())
    pipe = own_pipeline(sd1)
    known = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **known)
    generator = torch.Generator().manual_seed(5)
    own = pipe("red on blue", num_inference_steps=3, generator=generator, height=64, width=64).images[0]
    assert np.abs(pixels_of(report.images[0].path) - np.asarray(own).astype(int)).max() <= 1
    assert known.items() <= report.settings["scheduler"].items()
    assert read_parameters(report.images[0].path).fields["Noise Schedule"] == "Zero Terminal SNR"
    said = capsys.readouterr().err
    sources = ("the checkpoint's key v_pred", "the checkpoint's key ztsnr", "needs the last one")
    if how == "options":
        sources = ("--prediction-type", "--zero-snr", "--timestep-spacing")
    assert said.count("noise: ") == 1
    assert all(source in said for source in sources)


def test_a_single_file_has_the_hash_that_web_uis_show(spec, sd1, tmp_path, directory):
    path = sd1_single_file(tmp_path / "one.safetensors", **SMALL)
    made_path = made(replace(spec, model=ModelSpec(str(path), config=str(sd1))), directory)[0]
    assert read_parameters(made_path).fields["Model hash"] == sha256_of(path)[:10]


def test_the_device_of_a_gpu_is_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Some RTX {device}")
    assert settings.device_name(torch.device("cuda")) == "Some RTX cuda"


def test_the_torch_backend_has_no_engine(spec, directory):
    assert generate(spec, directory, QUIET).to_json()["engine"] is None


# Sizes


def test_img2img_takes_the_size_of_its_image_and_says_so(spec, directory, init_image):
    console = Recorder()
    image = generate(replace(spec, init_image=init_image), directory, console).images[0]
    assert (image.width, image.height) == (64, 40)
    assert any("70x45 to 64x40" in note for note in console.notes)
    assert Image.open(image.path).size == (64, 40)


def test_a_size_far_above_the_models_own_is_warned_of(spec, directory):
    console = Recorder()
    image = generate(replace(spec, height=72, width=256), directory, console).images[0]
    assert (image.width, image.height) == (256, 72)
    assert any("64x64" in warning for warning in console.warnings)


# Progress


@pytest.mark.parametrize(
    ("scheduler", "img2img", "calls"),
    [("pndm", False, 5), ("heun", False, 7), ("euler", False, 4), ("ddim", True, 2), ("heun", True, 3)],
)
def test_the_bar_has_one_step_for_each_unet_call(scheduler, img2img, calls, spec, directory, init_image):
    console = Recorder()
    spec = replace(spec, scheduler=scheduler, steps=4, init_image=init_image if img2img else None, strength=0.5)
    generate(spec, directory, console)
    assert [(bar["total"], bar["done"]) for bar in console.bars] == [(calls, calls)]


def test_a_quiet_run_says_nothing(spec, directory, capfd):
    generate(replace(spec, scheduler="lcm"), directory, QUIET)
    assert capfd.readouterr() == ("", "")


# Prompts


@pytest.mark.parametrize("prompt", ["", "🦊", "  ", "a\x00b\x1b[31m\r\n", "кот", "x" * 3000], ids=ascii)
def test_any_prompt_makes_an_image(prompt, spec, directory):
    path = made(replace(spec, prompts=(prompt,)), directory)[0]
    assert read_metadata(path).details["prompt"] == prompt
    assert path.parent == spec.output


def test_the_part_of_a_prompt_that_is_ignored_is_named(spec, directory):
    console = Recorder()
    words = " ".join(["blue"] * 75 + ["on", "red"])
    generate(replace(spec, prompts=(words, words)), directory, console)
    assert len(console.warnings) == 1
    assert "77 tokens" in console.warnings[0]
    assert console.warnings[0].startswith("the prompt is longer")
    assert console.warnings[0].endswith("'on red'")
    console = Recorder()
    generate(replace(spec, prompts=("red", words), negative_prompt=f"{words} blue", steps=1), directory, console)
    assert [warning.split(" is longer")[0] for warning in console.warnings] == ["prompt 2 of 2", "the negative prompt"]
    assert console.warnings[1].endswith("'on red blue'")
    console = Recorder()
    generate(replace(spec, prompts=(" ".join(["blue"] * 75),)), directory, console)
    assert console.warnings == []


def test_web_uis_syntax_is_said_once_to_be_taken_literally(spec, directory):
    console = Recorder()
    prompts = ("a (red:1.3) circle", "(blue:0.5)", "a red BREAK blue")
    generate(replace(spec, prompts=prompts, negative_prompt="<lora:some:0.8>", steps=1), directory, console)
    assert len(console.warnings) == 1
    assert "(red:1.3)" in console.warnings[0]
    assert "literally" in console.warnings[0]
    console = Recorder()
    generate(replace(spec, prompts=("(a dog)",), steps=1), directory, console)
    assert console.warnings == []


def test_a_prompt_that_is_no_text_is_a_usage_error(spec):
    with pytest.raises(UsageError, match="UTF-8"):
        replace(spec, prompts=("caf\udce9",))


def test_a_negative_prompt_without_guidance_is_warned_of(spec, directory):
    console = Recorder()
    generate(replace(spec, negative_prompt="green", guidance_scale=1.0), directory, console)
    assert "negative prompt" in console.warnings[0]


def test_guidance_and_negative_prompt_matter(spec, directory):
    plain = made(spec, directory)[0]
    for change in ({"guidance_scale": 1.0}, {"negative_prompt": "green"}, {"scheduler": "euler"}):
        assert not np.array_equal(pixels_of(made(replace(spec, **change), directory)[0]), pixels_of(plain))


# Failures


def test_a_wrong_output_is_found_before_the_model_is_looked_for(spec, directory):
    spec.output.write_text("a file")
    with pytest.raises(OutputError):
        generate(replace(spec, model=ModelSpec("no/such/model/anywhere")), directory, QUIET)


def test_a_wrong_init_image_is_found_before_the_model_is_looked_for(spec, directory, tmp_path):
    wrong = replace(spec, model=ModelSpec("no/such/model/anywhere"), init_image=tmp_path / "none.png")
    with pytest.raises(UsageError, match="does not exist"):
        generate(wrong, directory, QUIET)


def test_too_many_steps_are_refused_before_an_engine_is_built(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "build_engine", lambda *_, **__: pytest.fail("built"))
    request = replace(spec, backend="onnxruntime", scheduler="lcm", steps=51)
    with pytest.raises(UsageError, match="at most 50 steps, got 51"):
        generate(request, EngineDirectory(tmp_path / "engines"), QUIET)


def test_tensorrt_without_a_gpu_is_a_clear_error(spec, directory):
    with pytest.raises(EngineError, match="GPU") as caught:
        generate(replace(spec, backend="tensorrt"), directory, QUIET)
    assert "sdtrt doctor" in caught.value.hint


def test_a_unet_that_overflows_is_an_error_with_the_step_and_no_image(spec, directory, monkeypatch):
    real = loading.load_unet

    def damaged(model, dtype):
        unet = real(model, dtype)
        calls = iter(range(10))
        unet.conv_out.register_forward_hook(lambda _m, _i, output: output * (1e38 if next(calls) >= 1 else 1.0) * 1e9)
        return unet

    monkeypatch.setattr(loading, "load_unet", damaged)
    with pytest.raises(EngineError, match="denoising step 2 of 4") as caught:
        generate(spec, directory, QUIET)
    assert "--scheduler" in caught.value.hint
    assert not spec.output.exists()


def test_an_engine_with_a_nan_weight_is_an_error_with_the_step_and_no_image(spec, sd1, tmp_path):
    directory = EngineDirectory(tmp_path / "engines")
    spec = replace(spec, backend="onnxruntime")
    generate(replace(spec, steps=1, output=tmp_path / "before"), directory, QUIET)
    (entry,) = [entry for entry in directory.entries("engine") if entry.key["component"] == "unet"]

    def spoil(weight):
        weight.flat[0] = np.nan

    tampered_engine(directory, entry, spoil)
    with pytest.raises(EngineError, match=r"unet at denoising step 1 of 4 .*\(onnxruntime, fp32\)") as caught:
        generate(replace(spec, allow_build=False), directory, QUIET)
    assert "sdtrt verify" in caught.value.hint
    assert not spec.output.exists()


@pytest.mark.parametrize("source", ["text_encoder", "vae_encoder", "vae_decoder"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_part_that_overflows_is_named_and_makes_no_image(source, value, spec, directory, init_image, monkeypatch):
    real = loading.load_parts

    def spoil(_module, _inputs, output):
        output[(0,) * output.ndim] = float(value)  # one pixel, which clamping would hide if it is infinite
        return output

    def damaged(model, names, dtype):
        parts = real(model, names, dtype)
        if "vae" in parts:
            vae = parts["vae"]
            layers = {"vae_encoder": vae.encoder.conv_out, "vae_decoder": vae.decoder.conv_out}
            layers["text_encoder"] = dict(parts["text_encoder"].named_modules())[LAST_NORM]
            layers[source].register_forward_hook(spoil)
        return parts

    monkeypatch.setattr(loading, "load_parts", damaged)
    with pytest.raises(EngineError, match=f"{source} gave values that are not finite") as caught:
        generate(replace(spec, precision="bf16", init_image=init_image, height=64, width=64), directory, QUIET)
    assert caught.value.hint == "use --precision fp32"
    assert not spec.output.exists()


@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("text_encoder", "encoder.layers.1"),
        ("text_encoder_2", "encoder.layers.1"),
        ("text_encoder_2", "text_projection"),  # the pooled text alone
    ],
)
def test_each_of_sdxls_text_encoders_is_named_by_itself(part, layer, spec, sdxl, directory, monkeypatch):
    real = loading.load_parts

    def damaged(model, names, dtype):
        parts = real(model, names, dtype)
        if part in parts:
            (found,) = (module for name, module in parts[part].named_modules() if name.endswith(layer))
            found.register_forward_hook(lambda _m, _i, output: _with_a_nan(output))
        return parts

    monkeypatch.setattr(loading, "load_parts", damaged)
    with pytest.raises(EngineError) as caught:
        generate(replace(spec, model=ModelSpec(str(sdxl)), height=64, width=64), directory, QUIET)
    assert caught.value.message.startswith(f"{part} gave values that are not finite (torch, fp32)")
    assert not spec.output.exists()


def _with_a_nan(output):
    """A layer's output (transformers 4 gives tuples) with one value spoilt."""
    tensor = output[0] if isinstance(output, tuple) else output
    tensor[(0,) * tensor.ndim] = float("nan")
    return output


@pytest.fixture(scope="module", params=[True, False], ids=["upcast", "not upcast"])
def overflowing_vae(request, tmp_path_factory):
    """An SDXL folder whose VAE leaves fp16 on the way in and out, as SDXL's does; its output is as before."""
    folder = sdxl_folder(tmp_path_factory.mktemp("models") / "sdxl", layers_per_block=1)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": request.param}))
    weights = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name in ("encoder.conv_in", "decoder.conv_in"):  # what follows is normalised
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = (weights[f"{name}.{kind}"].float() * 2e5).half()
    save_file(weights, folder / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder, request.param


@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
def test_sdxls_vae_is_computed_in_fp32(overflowing_vae, img2img, spec, directory, init_image, tmp_path):
    folder, upcast = overflowing_vae
    spec = replace(spec, model=ModelSpec(str(folder)), height=64, width=64, steps=2)
    if img2img:
        spec = replace(spec, init_image=init_image)
    half = replace(spec, precision="fp16")
    if not upcast:
        with pytest.raises(EngineError, match="vae_encoder" if img2img else "vae_decoder") as caught:
            generate(half, directory, QUIET)
        assert caught.value.hint == "use --precision fp32"
        return
    (path,) = made(half, directory)
    (expected,) = made(replace(spec, precision="fp32", output=tmp_path / "fp32"), directory)
    assert np.abs(pixels_of(path) - pixels_of(expected)).mean() < 2


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
    ids=["gpu", "cpu"],
)
def test_too_little_memory_is_a_clear_error(error, spec, directory, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", fail)
    with pytest.raises(EngineError, match="out of memory at 64x64") as caught:
        generate(spec, directory, QUIET)
    assert "--height" in caught.value.hint


def test_too_little_memory_in_onnx_runtime_is_a_clear_error(spec, directory, monkeypatch):
    import onnxruntime

    def fail(*_, **__):
        raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("Failed to allocate memory for requested buffer")

    spec = replace(spec, backend="onnxruntime")
    generate(spec, directory, QUIET)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    with pytest.raises(EngineError, match="out of memory at 64x64") as caught:
        generate(spec, directory, QUIET)
    assert "--height" in caught.value.hint


@pytest.fixture
def unet_rows(monkeypatch):
    """The UNet's rows in ONNX Runtime, call by call: more than `unet_rows.most` are more than there is memory for."""

    class Rows(list):
        most = 4

    rows, real = Rows(), OnnxRuntimeSession.run

    def run(session, feeds):
        if session.contract.component == "unet":
            rows.append(feeds["sample"].shape[0])
            if rows[-1] > rows.most:
                raise MemoryError("ONNX Runtime has too little memory")
        return real(session, feeds)

    monkeypatch.setattr(OnnxRuntimeSession, "run", run)
    return rows


def test_a_batch_that_is_too_large_goes_on_in_smaller_ones(spec, directory, unet_rows, tmp_path):
    spec = replace(spec, backend="onnxruntime", num_images=7)
    expected = made(replace(spec, output=tmp_path / "alone"), directory)
    unet_rows.clear()
    console = Recorder()
    report = generate(replace(spec, batch_size=5), directory, console)
    assert unet_rows[0] == 10
    assert set(unet_rows[1:-4]) == {4}
    assert set(unet_rows[-4:]) == {2}  # one image; PNDM has one call more than steps
    (warning,) = [text for text in console.warnings if "memory" in text]
    assert warning == "out of memory at 64x64 pixels, 5 at once, with onnxruntime in fp32: going on with --batch-size 2"
    assert [image.seed for image in report.images] == [5, 6, 7, 8, 9, 10, 11]
    for one, image in zip(expected, report.images, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(image.path)).max() <= 1
        assert read_metadata(image.path).details["batch_size"] == 2


def test_images_that_are_done_stay_when_not_even_one_more_fits(spec, directory, unet_rows):
    class Shrinking(Recorder):
        def note(self, text):
            unet_rows.most = 1  # once an image is there

    console = Shrinking()
    with pytest.raises(MemoryShortage, match="out of memory at 64x64 pixels with") as caught:
        generate(replace(spec, backend="onnxruntime", num_images=6, batch_size=2), directory, console)
    assert caught.value.hint == "use a smaller --height and --width"
    assert len(list(spec.output.iterdir())) == 2
    assert [text.split(": ")[1] for text in console.warnings] == ["going on with --batch-size 1"]


def test_the_last_images_are_not_tried_in_batches_that_they_do_not_fill(spec, directory, unet_rows):
    class Shrinking(Recorder):
        def note(self, text):
            unet_rows.most = 1

    console = Shrinking()
    unet_rows.most = 8
    with pytest.raises(MemoryShortage):
        generate(replace(spec, backend="onnxruntime", num_images=5, batch_size=4), directory, console)
    assert console.warnings == []
    assert unet_rows[-1] == 2


def test_an_engine_for_one_batch_alone_says_which_batch_to_ask_for(spec, directory, unet_rows, monkeypatch):
    """As TensorRT's are, built for exactly the batch that is asked for."""
    spec = replace(spec, backend="onnxruntime", num_images=6, batch_size=4)
    unet_engine(resolve.resolve_model(spec.model), "onnxruntime", "fp32", Sizes(2, 64, 64), directory)
    monkeypatch.setattr(Entry, "parsed_key", property(partial(key_for_images, 4)))
    with pytest.raises(MemoryShortage, match="out of memory at 64x64 pixels, 4 at once") as caught:
        generate(spec, directory, QUIET)
    assert caught.value.hint == "use --batch-size 2: it gets engines of its own, these don't take so few"


def test_pytorchs_batches_get_smaller_too(spec, directory, monkeypatch):
    real = diffusers.UNet2DConditionModel.forward

    def forward(unet, sample, *args, **kwargs):
        if len(sample) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return real(unet, sample, *args, **kwargs)

    expected = [path.read_bytes() for path in made(replace(spec, num_images=3), directory)]
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", forward)
    console = Recorder()
    paths = made(replace(spec, num_images=3, batch_size=3, overwrite=True), directory, console)
    assert [path.read_bytes() for path in paths] == expected  # one at a time: the same to the last byte
    assert [text.split(": ")[1] for text in console.warnings] == ["going on with --batch-size 1"]


def test_a_bug_keeps_its_traceback(spec, directory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        generate(spec, directory, QUIET)


def test_an_interrupt_keeps_the_images_that_are_done(spec, directory):
    class Impatient(Recorder):
        @contextmanager
        def bar(self, name, total):
            with super().bar(name, total) as advance:

                def interrupt():
                    advance()
                    if len(self.bars) == 2:
                        raise KeyboardInterrupt

                yield interrupt

    with pytest.raises(KeyboardInterrupt):
        generate(replace(spec, num_images=3), directory, Impatient())
    assert [path.name for path in spec.output.iterdir()] == ["red-on-blue-5.png"]
    assert pixels_of(spec.output / "red-on-blue-5.png").shape == (64, 64, 3)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("img2img", [False, True], ids=["txt2img", "img2img"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_native_pipeline_on_a_gpu_makes_the_picture_of_the_cpu(
    kind, img2img, spec, directory, init_image, monkeypatch, request
):
    folder = request.getfixturevalue(kind)
    spec = replace(spec, model=ModelSpec(str(folder)), init_image=init_image if img2img else None, num_images=2)
    report = generate(spec, directory, QUIET)
    assert report.settings["precision"] == "fp16"
    alone = made(replace(spec, seed=6, num_images=1), directory)[0]
    np.testing.assert_array_equal(pixels_of(report.images[1].path), pixels_of(alone))
    # Random weights and guidance make much of a rounding error, so pictures are compared in fp32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_gpu = pixels_of(made(replace(spec, precision="fp32"), directory)[0])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = pixels_of(made(spec, directory)[0])
    assert np.abs(on_gpu - on_cpu).mean() < 4
