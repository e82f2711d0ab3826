"""`--from FILE`: pictures made anew from what their files tell, ours and web UIs'."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdtrt.common.errors import UsageError
from sdtrt.pipeline.inputs.images import Metadata, encode_image
from sdtrt.pipeline.recipes.reading import read_recipe, settle
from sdtrt.pipeline.recipes.samplers import scheduler_options
from sdtrt.specs import GenerateSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
WEB_UI = (
    "a (red:1.2) circle <lora:style:0.7> on blue<lora:lost:1>\nNegative prompt: ugly, <lora:style:0.2>green\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 7, Seed: 965400086, Size: 512x768, "
    "Model hash: 6ce0161689, Model: v1-5-pruned, VAE hash: 735e4c3a44, VAE: vae-ft.safetensors, Clip skip: 2, "
    'Denoising strength: 0.4, Mask blur: 4, TI hashes: "easyneg: c74b4e810b03", ENSD: 31337, RNG: CPU, '
    'Lora hashes: "style: 0123", Face restoration: CodeFormer, Version: v1.10.1'
)
TAKEN = {
    "prompt": ["a (red:1.2) circle  on blue"],
    "negative_prompt": "ugly, green",
    "prompt_syntax": "webui",
    "steps": 20,
    "scheduler": "dpm++",
    "timestep_spacing": "trailing",
    "guidance_scale": 7.0,
    "seed": 965400086,
    "width": 512,
    "height": 768,
    "strength": 0.4,
    "mask_blur": 4,
}


def picture(path: Path, **texts: str) -> Path:
    """A PNG with these texts."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_a_web_uis_text_is_the_settings_it_means(folder):
    recipe = read_recipe(picture(folder / "x.png", parameters=WEB_UI))
    assert recipe.options == TAKEN
    assert (recipe.model_title, recipe.model_hash, recipe.last_layer) == ("v1-5-pruned", "6ce0161689", 2)
    assert [one.split(":")[0] for one in recipe.left] == [
        *("ENSD", "Face restoration", "LoRA style", "LoRA lost", "LoRA style", "VAE vae-ft.safetensors"),
        "embedding easyneg",
    ]


def test_files_that_it_names_are_found_beside_the_picture_and_here(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for path in (other / "style.safetensors", folder / "vae-ft.safetensors", other / "easyneg.pt"):
        path.touch()
    (other / "v1-5-pruned.safetensors").touch()
    options = read_recipe(picture(other / "x.png", parameters=WEB_UI)).options
    assert options["lora"] == [f"{other}/style.safetensors:0.7", f"{other}/style.safetensors:0.2"]
    assert (options["vae"], options["embedding"]) == ("vae-ft.safetensors", [f"{other}/easyneg.pt:easyneg"])
    assert options["model"] == f"{other}/v1-5-pruned.safetensors"


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".txt"])
def test_other_files_carry_the_same_text(suffix, folder):
    import piexif
    from piexif.helper import UserComment

    path = folder / f"x{suffix}"
    if suffix == ".txt":
        path.write_text(WEB_UI)
    else:
        comment = {piexif.ExifIFD.UserComment: UserComment.dump(WEB_UI, encoding="unicode")}
        Image.new("RGB", (8, 8)).save(path, exif=piexif.dump({"Exif": comment}))
    assert read_recipe(path).options == TAKEN


@pytest.mark.parametrize(
    ("sampler", "schedule", "expected", "left"),
    [
        ("Euler a", "Automatic", {"scheduler": "euler-a", "timestep_spacing": "linspace"}, 0),
        ("Euler", None, {"scheduler": "euler", "timestep_spacing": "linspace"}, 0),
        ("DDIM", "Automatic", {"scheduler": "ddim"}, 0),
        ("PLMS", None, {"scheduler": "pndm"}, 0),
        ("Restart", "Karras", {}, 1),
        (None, None, {}, 0),
    ],
)
def test_samplers_are_schedulers(sampler, schedule, expected, left):
    options, unknown = scheduler_options(sampler, schedule)
    assert (options, len(unknown)) == (expected, left)


@pytest.mark.parametrize(
    ("sampler", "schedule"), [("DPM++ 2M Karras", None), ("DPM++ 2M", "Karras"), ("DPM++ 2M", "Automatic")]
)
def test_schedules_of_noise_levels_are_sigmas(sampler, schedule):
    options, left = scheduler_options(sampler, schedule)
    assert (options, left) == ({"scheduler": "dpm++", "sigmas": "karras"}, [])


@pytest.mark.parametrize(("layer", "is_sdxl", "skipped"), [(2, False, 1), (2, True, 0), (3, True, 1), (1, False, 0)])
def test_the_last_layer_is_counted_as_the_model_counts(layer, is_sdxl, skipped, tmp_path):
    class Model:
        pass

    Model.is_sdxl = is_sdxl
    text = tmp_path / "x.txt"
    text.write_text(WEB_UI.replace("Clip skip: 2", f"Clip skip: {layer}"))
    assert settle(GenerateSpec(("x",), recipe=read_recipe(text)), Model).clip_skip == skipped
    assert settle(GenerateSpec(("x",), clip_skip=4, recipe=read_recipe(text)), Model).clip_skip == 4


def test_values_of_other_kinds_are_said(tmp_path):
    text = tmp_path / "x.txt"
    text.write_text("a\nSteps: many, Sampler: Euler, CFG scale: inf, Seed: 1, Size: big, RNG: NV, Emphasis: None")
    recipe = read_recipe(text)
    assert recipe.options.keys() == {"prompt", "seed", "scheduler", "timestep_spacing"}
    assert [one.split(":")[0] for one in recipe.left] == ["Steps", "CFG scale", "Size", "RNG"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"3": {"class_type": "KSampler", "inputs": {}}}', "ComfyUI"),
        ("x.json", '{"nodes": [], "links": []}', "ComfyUI"),
        ("x.json", "{", "is no JSON"),
        ("x.json", "[1]", "no JSON that sdtrt wrote"),
        ("x.json", '{"versions": {"sdtrt": "1"}}', "names no prompt and seed"),
        ("x.txt", "a red circle", "no settings"),
        ("x.png", "not a picture", "can't be read"),
        ("y.png", None, "does not exist"),
    ],
)
def test_files_that_tell_nothing_are_refused(name, content, message, folder):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_recipe(Path(name))


def test_pictures_that_tell_nothing_are_refused(folder):
    with pytest.raises(UsageError, match="ComfyUI"):
        read_recipe(picture(folder / "x.png", prompt='{"3": {"class_type": "KSampler"}}', workflow="{}"))
    with pytest.raises(UsageError, match="carries no text"):
        read_recipe(picture(folder / "x.png"))


def test_a_json_of_ours_with_anything_in_it_is_read_or_said(folder):
    details = {"prompt": "a", "seed": 1, "steps": "x", "guidance_scale": True, "backend": "gone", "sampler": 1}
    Path("x.png").write_bytes(encode_image(Image.new("RGB", (8, 8)), "PNG", Metadata("a", details)))
    recipe = read_recipe(Path("x.png"))
    assert recipe.options == {"prompt": ["a"], "seed": 1, "num_images": 1}
    assert [one.split()[0] for one in recipe.left] == ["steps", "guidance_scale", "backend", "sampler:"]


def test_loras_and_embeddings_of_ours_are_found_by_the_name_that_was_given(folder):
    Path("loras").mkdir()
    for name in ("loras/style.safetensors", "moved.safetensors", "cat.pt"):
        Path(name).touch()
    given = ("loras/style.safetensors", "elsewhere/moved.safetensors", "owner/face", "gone.safetensors")
    loras = [{"name": Path(one).stem, "file": one, "weight": 0.5} for one in given]
    embeddings = [{"name": "cat", "file": "away/cat.pt", "token": "<cat>"}]
    details = {"prompt": "a", "seed": 1, "model": {"name": "tiny", "loras": loras}, "embeddings": embeddings}
    Path("x.png").write_bytes(encode_image(Image.new("RGB", (8, 8)), "PNG", Metadata("a", details)))
    recipe = read_recipe(Path("x.png"))
    assert recipe.options["lora"] == [
        *("loras/style.safetensors:0.5", "moved.safetensors:0.5", "owner/face:0.5"),
    ]
    assert recipe.options["embedding"] == ["cat.pt:<cat>"]
    assert [one.split(":")[0] for one in recipe.left] == ["LoRA gone"]


SMALL_RUN = ("--backend", "torch", "--height", "64", "--width", "64", "--steps", "2")


def pixels_of(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_ours_is_made_anew_to_the_last_bit(smallest, run, folder):
    words = ("-m", str(smallest), "-p", "red (on) blue", "-n", "green", "--cfg-scale", "4", *SMALL_RUN)
    assert run("txt2img", *words, "-o", "first.png")[0] == 0
    code, _, err = run("txt2img", "--from", "first.png", "-o", "again.png")
    assert code == 0, err
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


@pytest.mark.slow
def test_all_of_it_is_taken_and_what_is_typed_wins(sd1, run, folder):
    Image.new("RGB", (64, 64), "navy").save("init.png")
    words = ("--sampler", "euler", "--timestep-spacing", "trailing", "-n", "green", "--cfg-scale", "4", "--seed", "9")
    options = ("-m", str(sd1), "--strength", "0.6", "--clip-skip", "1", *words, *SMALL_RUN)
    assert run("img2img", "-p", "red (on) blue", "-i", "init.png", *options, "-o", "first.png")[0] == 0
    code, _, err = run("img2img", "--from", "first.png", "-o", "again.png")
    assert code == 0, err
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()
    assert "warning" not in err
    code, _, err = run("txt2img", "a star", "--from", "first.png", "--seed", "3", "-o", "other.png")
    assert code == 0, err
    assert "strength: 0.6 (sdtrt txt2img has no such option)" in err
    told = json.loads(Image.open("other.png").text["sdtrt"])
    assert (told["prompt"], told["seed"], told["guidance_scale"], told["clip_skip"]) == ("a star", 3, 4, 1)
    Image.new("RGB", (64, 64), "red").save("init.png")
    code, _, err = run("img2img", "--from", "first.png", "-o", "third.png")
    assert (code, "--init-image" in err) == (2, True), "the file of that name is another one by now"
    code, _, err = run("img2img", "--from", "first.png", "-i", "init.png", "-o", "third.png")
    assert (code, "was made from another init image" in err) == (0, True)


@pytest.mark.slow
def test_a_report_on_several_pictures_makes_all_of_them(sd1, run, folder):
    words = ("-m", str(sd1), "-p", "red", "-p", "blue", "--num-images", "2", "--seed", "4", *SMALL_RUN)
    code, out, _ = run("txt2img", *words, "-o", "first", "--json")
    assert code == 0
    Path("report.json").write_text(out)
    code, out, err = run("txt2img", "--from", "report.json", "-o", "again", "--json")
    assert code == 0, err
    paths = [one["path"] for one in json.loads(out)["images"]]
    assert len(paths) == 4
    assert all(np.array_equal(pixels_of(path), pixels_of(path.replace("again", "first"))) for path in paths)


@pytest.mark.slow
def test_a_web_uis_picture_wants_its_model_and_tells_of_another(sd1, run, folder):
    text = "red\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 1, Size: 64x64, Model hash: 0123456789, Model: dream"
    picture(folder / "x.png", parameters=text)
    code, _, err = run("txt2img", "--from", "x.png")
    assert (code, "made with the model dream" in err) == (2, True)
    assert "hint: name it: --model FOLDER/dream.safetensors" in err
    code, _, err = run("txt2img", "--from", "x.png", "-m", str(sd1), "--backend", "torch", "-o", "a.png")
    assert code == 0, err
    assert "names the model dream; whether" in err
    assert "not taken from x.png: RNG: GPU" in err
    words = ("-p", "red", "--seed", "1", "--cfg-scale", "4", "--sampler", "euler", "--timestep-spacing", "linspace")
    assert run("txt2img", "-m", str(sd1), *words, *SMALL_RUN, "--prompt-syntax", "webui", "-o", "b.png")[0] == 0
    assert np.array_equal(pixels_of("a.png"), pixels_of("b.png"))


@pytest.mark.slow
@pytest.mark.feature("A picture anew (`--from FILE`)", "sd1", "onnxruntime")
def test_engines_make_it_anew_and_build_nothing(smallest, run, folder):
    words = ("-m", str(smallest), "-p", "red", "--seed", "4", "--height", "64", "--width", "64", "--steps", "2")
    options = ("--component", "unet", "--backend", "onnxruntime")
    assert run("txt2img", *words, *options, "-o", "first.png")[0] == 0
    code, _, err = run("txt2img", "--from", "first.png", "-o", "again.png", "--no-build")
    assert code == 0, err
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


@pytest.mark.slow
def test_a_checkpoints_hash_is_checked(run, folder):
    file = factories.sd1_single_file(folder / "dream.safetensors", **factories.SMALL)
    config = factories.sd1_folder(folder / "config", **factories.SMALL)
    digest = factories.sha256_of(file)[:10]
    for number, (hashed, differs) in enumerate(((digest, False), ("0123456789", True))):
        text = f"red\nSteps: 2, Sampler: Euler, CFG scale: 4, Seed: 1, Size: 64x64, Model hash: {hashed}, Model: dream"
        picture(folder / "x.png", parameters=text)
        options = ("--backend", "torch", "--config", str(config), "-o", f"{number}.png")
        code, _, err = run("txt2img", "--from", "x.png", *options)
        assert code == 0, err
        assert ("is another model" in err) is differs
