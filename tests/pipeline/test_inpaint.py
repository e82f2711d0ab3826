"""Inpainting, with UNets of 4 and of 9 channels, beside diffusers' own pipelines; masks, read and refused."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import factories
import numpy as np
import pytest
import torch
from PIL import Image

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import EngineError, ModelError, UsageError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs import masks
from sdtrt.pipeline.inputs.images import read_init_image, read_metadata, read_parameters
from sdtrt.pipeline.runs.generate import generate
from sdtrt.reports.verify import verify
from sdtrt.specs import BuildSpec, ExportSpec, GenerateSpec, ModelSpec, VerifySpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
TOLERANCE = 1e-4  # of latents in fp32 on the CPU
LEVELS = 2  # of 255
BOX = (16, 8, 48, 40)  # that the mask covers: left, upper, right, lower


@pytest.fixture(scope="session")
def model_of(tmp_path_factory, smallest):
    """The folder of a model of a kind, with a UNet of so many channels."""
    made = {("sd1", 4): smallest}

    def find(kind, channels):
        if (kind, channels) not in made:
            path = tmp_path_factory.mktemp("models") / f"{kind}-{channels}"
            if channels == 9:
                made[kind, channels] = factories.inpainting_folder(path, kind)
            else:
                write = factories.sdxl_folder if kind == "sdxl" else factories.sd1_folder
                unet = {**factories.UNET_CONFIGS[kind], **factories.SMALLEST[kind]}
                made[kind, channels] = write(path, **unet)
        return made[kind, channels]

    return find


@pytest.fixture
def files(tmp_path):
    """An init image and its mask."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((80, 64), Image.Resampling.BICUBIC).save(tmp_path / "init.png")
    mask = Image.new("L", (80, 64))
    mask.paste(255, BOX)
    mask.save(tmp_path / "mask.png")
    return tmp_path / "init.png", tmp_path / "mask.png"


@pytest.fixture
def spec(files, tmp_path):
    init, mask = files
    return GenerateSpec(
        ("red on blue",), backend="torch", steps=3, seed=5, init_image=init, mask=mask, output=tmp_path / "out"
    )


def own_pipeline(folder):
    """The untouched pipeline, loaded by diffusers itself."""
    cls = diffusers.AutoPipelineForInpainting
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(files, **options):
    init, mask = (Image.open(file) for file in files)
    given = {"image": init, "mask_image": mask, "height": 64, "width": 80, "strength": 0.8}
    given |= {"num_inference_steps": 3, "guidance_scale": 7.5, "generator": torch.Generator().manual_seed(5)}
    return {"prompt": "red on blue", **given, **options}


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def picture(spec, directory):
    return pixels_of(generate(spec, directory, QUIET).images[0].path)


SLOW = pytest.mark.slow
MODELS = [
    pytest.param("sd1", 4, id="sd1-4"),
    pytest.param("sd1", 9, id="sd1-9"),
    pytest.param("sd2", 4, id="sd2-4", marks=SLOW),
    pytest.param("sd2", 9, id="sd2-9", marks=SLOW),
    pytest.param("sdxl", 4, id="sdxl-4", marks=SLOW),
    pytest.param("sdxl", 9, id="sdxl-9", marks=SLOW),
]


@pytest.mark.parametrize(("kind", "channels"), [*MODELS[:5], ("sdxl", 9)])
@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_it_is_the_picture_of_diffusers_own_pipeline(kind, channels, strength, model_of, files, spec, directory):
    folder = model_of(kind, channels)
    expected = own_pipeline(folder)(**arguments(files, strength=strength)).images[0]
    found = picture(replace(spec, model=ModelSpec(str(folder)), strength=strength), directory)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(("kind", "channels"), MODELS)
@pytest.mark.feature("Inpainting", "sd1 sd2 sdxl", "onnxruntime")
@pytest.mark.feature("Inpainting models (9 channels)", "sd1 sd2 sdxl", "onnxruntime")
@pytest.mark.slow
def test_engines_give_the_latents_and_the_picture_of_diffusers_own_pipeline(
    kind, channels, model_of, files, spec, engine_dir
):
    folder = model_of(kind, channels)
    plain = own_pipeline(folder)
    given = {"height": 64, "width": 80, "task": "inpaint", "backend": "onnxruntime", "engine_dir": engine_dir}
    pipe = sdtrt.load(str(folder), **given, progress=False)
    assert type(pipe) is type(plain)
    latents = [one(**arguments(files), output_type="latent").images for one in (plain, pipe)]
    assert float((latents[1] - latents[0]).abs().max()) <= TOLERANCE
    report = generate(
        replace(spec, model=ModelSpec(str(folder)), backend="onnxruntime"), EngineDirectory(engine_dir), QUIET
    )
    assert {"unet", "vae_encoder", "vae_decoder"} <= set(report.engines)
    expected = np.asarray(plain(**arguments(files)).images[0]).astype(int)
    assert np.abs(pixels_of(report.images[0].path) - expected).max() <= LEVELS


@pytest.mark.parametrize(("kind", "channels"), [MODELS[0], MODELS[1], MODELS[5]])
def test_a_live_inpainting_pipeline_is_accelerated(kind, channels, model_of, files, engine_dir):
    pipe = own_pipeline(model_of(kind, channels))
    plain = pipe(**arguments(files), output_type="latent").images
    sdtrt.accelerate(pipe, height=64, width=80, engine_dir=engine_dir, progress=False)
    assert all(sdtrt.status(pipe)[name].is_in_engine for name in ("unet", "vae_encoder", "vae_decoder"))
    found = pipe(**arguments(files), output_type="latent").images
    assert float((found - plain).abs().max()) <= TOLERANCE
    sdtrt.restore(pipe)
    assert torch.equal(pipe(**arguments(files), output_type="latent").images, plain)


@pytest.mark.parametrize("channels", [4, 9])
def test_the_masked_part_alone_is_made_and_the_rest_stays_as_it_is(channels, model_of, files, spec, directory):
    folder = model_of("sd1", channels)
    blurred = Image.open(files[1])
    blurred = own_pipeline(folder).mask_processor.blur(blurred, blur_factor=3)
    expected = own_pipeline(folder)(
        **arguments(files, mask_image=blurred, padding_mask_crop=4, height=48, width=64)
    ).images[0]
    found = picture(
        replace(spec, model=ModelSpec(str(folder)), mask_blur=3, padding_crop=4, height=48, width=64), directory
    )
    np.testing.assert_array_equal(found, np.asarray(expected))
    untouched = np.asarray(blurred) == 0
    assert untouched.any()
    np.testing.assert_array_equal(found[untouched], pixels_of(files[0])[untouched])


def test_a_cropped_part_is_made_at_the_models_own_size(spec, model_of, directory):
    spec = replace(spec, model=ModelSpec(str(model_of("sd1", 4))), padding_crop=8, steps=2)
    path = generate(spec, directory, QUIET).images[0].path
    with Image.open(path) as image:
        assert image.size == (80, 64)
    fields = read_parameters(path).fields
    own_height, own_width = resolve_model(spec.model).default_size()
    assert fields["Size"] == f"{own_width}x{own_height}"
    assert (fields["Inpaint area"], fields["Masked area padding"]) == ("Only masked", "8")


@pytest.mark.parametrize("channels", [4, 9])
def test_images_made_at_once_are_those_made_alone(channels, spec, model_of, directory):
    spec = replace(spec, model=ModelSpec(str(model_of("sd1", channels))), num_images=3)
    alone = generate(spec, directory, QUIET).images
    together = generate(replace(spec, batch_size=2), directory, QUIET).images
    for one, other in zip(alone, together, strict=True):
        assert one.seed == other.seed
        assert np.abs(pixels_of(one.path) - pixels_of(other.path)).max() <= LEVELS
    assert len({pixels_of(image.path).tobytes() for image in alone}) == 3


def test_an_image_says_how_it_was_inpainted(spec, model_of, directory, files):
    spec = replace(spec, model=ModelSpec(str(model_of("sd1", 9))), mask_blur=2, steps=2)
    path = generate(spec, directory, QUIET).images[0].path
    details, fields = read_metadata(path).details, read_parameters(path).fields
    assert details["mask"] == {"name": "mask.png", "sha256": factories.sha256_of(files[1])}
    assert (details["mask_blur"], details["padding_crop"], details["strength"]) == (2, None, 0.8)
    assert (fields["Denoising strength"], fields["Mask blur"], fields["Size"]) == ("0.8", "2", "80x64")
    assert "Inpaint area" not in fields
    again = replace(spec, mask_blur=details["mask_blur"], strength=details["strength"])
    assert generate(again, directory, QUIET).images[0].path.read_bytes() == path.read_bytes()


def test_a_checkpoint_for_inpainting_in_one_file(spec, model_of, directory, tmp_path):
    unet = {**factories.SMALLEST["sd1"], "in_channels": 9}
    file = factories.sd1_single_file(tmp_path / "inpaint.safetensors", **unet)
    spec = replace(spec, steps=2)
    folder = str(model_of("sd1", 9))
    one = picture(replace(spec, model=ModelSpec(str(file), config=folder)), directory)
    np.testing.assert_array_equal(one, picture(replace(spec, model=ModelSpec(folder)), directory))


# What an engine of such a UNet takes


def test_a_unet_of_nine_channels_is_exported_built_and_inspected(model_of, engine_dir):
    model = ModelSpec(str(model_of("sd1", 9)))
    assert resolve_model(model).is_inpainting
    entry = sdtrt.build(
        BuildSpec(ExportSpec(model, precision="fp32"), "onnxruntime"), engine_dir=engine_dir, progress=False
    )
    with sdtrt.open_session(entry) as session:
        (sample,) = (one for one in session.inputs if one.name == "sample")
        assert sample.dims[1] == 9
        assert session.outputs[0].dims[1] == 4


@pytest.mark.slow
def test_an_engine_of_nine_channels_is_verified_on_an_inpainted_image(model_of, engine_dir, tmp_path):
    image = GenerateSpec(
        ("red",), ModelSpec(str(model_of("sd1", 9))), backend="onnxruntime", steps=2, height=64, width=80
    )
    report = verify(VerifySpec(image, output=tmp_path), EngineDirectory(engine_dir), QUIET)
    report.raise_on_failure()
    assert report.settings["strength"] == 0.8


# What is refused


def test_a_model_for_inpainting_makes_no_images_without_a_mask(spec, model_of, directory):
    spec = replace(spec, model=ModelSpec(str(model_of("sd1", 9))), mask=None)
    for wrong in (spec, replace(spec, init_image=None)):
        with pytest.raises(UsageError, match="is a model for inpainting") as caught:
            generate(wrong, directory, QUIET)
        assert "sdtrt inpaint --init-image FILE --mask FILE" in caught.value.hint
    with pytest.raises(UsageError, match="is a model for inpainting"):
        sdtrt.load(str(model_of("sd1", 9)), backend="torch", progress=False)
    with pytest.raises(UsageError, match="unknown task"):
        sdtrt.load("tiny", task="edit")


def test_pipelines_without_a_mask_are_not_accelerated_with_nine_channels(model_of, engine_dir):
    pipe = own_pipeline(model_of("sd1", 9))
    image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(EngineError, match="takes 9 channels and gives 4"):
        sdtrt.accelerate(image, height=64, width=80, engine_dir=engine_dir, progress=False)


def test_another_vae_has_to_fit_a_model_for_inpainting(model_of, tmp_path):
    vae = factories.vae_folder(tmp_path / "vae", factories.small_vae(latent_channels=8))
    with pytest.raises(ModelError, match=r"takes 9 channels where the vae .* makes 8"):
        resolve_model(ModelSpec(str(model_of("sd1", 9)), vae=str(vae)))


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda mask: mask.resize((64, 64)), r"mask\.png is 64x64, where init image .* is 80x64", "80x64"),
        (lambda mask: mask.point(lambda level: 0), "covers nothing: none of its pixels is white", "paint white"),
        (lambda mask: mask.point(lambda level: level // 3), "covers nothing", "paint white"),
    ],
    ids=["size", "black", "grey"],
)
def test_a_wrong_mask_is_found_before_the_model_is_looked_for(change, message, hint, spec, files, directory):
    change(Image.open(files[1])).save(files[1])
    with pytest.raises(UsageError, match=message) as caught:
        generate(replace(spec, model=ModelSpec("no/such/model/anywhere")), directory, QUIET)
    assert hint in caught.value.hint


def test_a_mask_that_is_no_image_is_called_a_mask(spec, files, directory):
    files[1].write_text("no picture")
    with pytest.raises(UsageError, match=r"^mask .* is in no image format") as caught:
        generate(spec, directory, QUIET)
    assert caught.value.hint == "give --mask a PNG, JPEG or WebP file"


def test_a_mask_that_covers_too_little_is_refused(spec, files, model_of, directory):
    spec = replace(spec, model=ModelSpec(str(model_of("sd1", 4))))
    mask = Image.new("L", (80, 64))
    mask.paste(255, (17, 9, 20, 12))
    mask.save(files[1])
    with pytest.raises(UsageError, match="at 80x64 it covers none of the model's latents") as caught:
        generate(spec, directory, QUIET)
    assert "--padding-crop 32" in caught.value.hint
    with pytest.raises(UsageError, match=r"mask-blur 30 leaves nothing of mask"):
        generate(replace(spec, mask_blur=30), directory, QUIET)
    generate(replace(spec, padding_crop=2, steps=2), directory, QUIET)


def test_a_part_that_is_too_long_for_its_size_is_refused(tmp_path):
    Image.new("RGB", (80, 1)).save(tmp_path / "init.png")
    Image.new("L", (80, 1), 255).save(tmp_path / "mask.png")
    init = read_init_image(tmp_path / "init.png")
    mask = masks.read_mask(tmp_path / "mask.png", init)
    with pytest.raises(
        UsageError, match="the part of 80x1 pixels that the mask covers is too long to be made at 64x64"
    ):
        masks.fit(init, mask, (64, 64), 0, 8)
    assert masks.fit(init, mask, (64, 80), 0, 8).image.size == (80, 64)


def test_a_mask_is_upright_and_white_where_it_is_transparent(files, tmp_path):
    init = read_init_image(files[0])
    turned = Image.open(files[1]).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    assert masks.read_mask(tmp_path / "turned.png", init).pixels.getbbox() == BOX
    clear = Image.new("RGBA", (80, 64), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), BOX)
    clear.save(tmp_path / "clear.png")
    assert masks.read_mask(tmp_path / "clear.png", init).pixels.getbbox() == BOX


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": None, "mask_blur": 4}, "mask-blur 4 is about a mask, and there is none"),
        ({"mask": None, "padding_crop": 0}, "padding-crop 0 is about a mask, and there is none"),
        ({"init_image": None}, r"mask .*mask\.png covers no init image"),
        ({"mask_blur": -1}, "mask-blur must be from 0 to 512 pixels, got -1"),
        ({"mask_blur": 513}, "mask-blur must be from 0 to 512 pixels, got 513"),
        ({"padding_crop": -8}, "padding-crop must be from 0 to 16384 pixels, got -8"),
    ],
)
def test_requests_that_say_nothing_of_use_about_a_mask(spec, options, message):
    with pytest.raises(UsageError, match=message):
        replace(spec, **options)
