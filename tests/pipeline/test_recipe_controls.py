"""`--from FILE` takes back ControlNets, IP-Adapters and edits, with the pictures that they went by."""

from __future__ import annotations

from pathlib import Path

import factories
import ip_adapters
import numpy as np
import pytest
from PIL import Image
from test_controlnet import small_controlnet
from test_edits import editing_folder

from sdtrt.pipeline.inputs.images import Metadata, encode_image
from sdtrt.pipeline.recipes.reading import read_recipe
from sdtrt.specs import ControlSpec, ImagePromptSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SLOW = pytest.mark.slow
RUN = ("--backend", "torch", "--height", "64", "--width", "64", "--steps", "2", "--seed", "5")
WEB_UI = (
    "red\nSteps: 2, Sampler: DDIM, CFG scale: 4, Seed: 1, Size: 64x64, Eta DDIM: 0.5, RNG: CPU, "
    'ControlNet 0: "Module: canny, Model: canny [0123abcd], Weight: 0.8, Resize Mode: Crop and Resize, '
    'Threshold A: 100.0, Threshold B: 150, Guidance Start: 0.1, Guidance End: 1.0, Control Mode: Balanced", '
    'ControlNet 1: "Module: depth_midas, Model: lost [4567abcd], Weight: 1", '
    'ControlNet 2: "Module: ip-adapter-auto, Model: face [89abcdef], Weight: 0.6", Version: v1.10.1'
)


def drawn(path: Path, seed: int) -> Path:
    """A map of lines."""
    levels = np.random.default_rng(seed).integers(0, 2, (64, 64), dtype=np.uint8) * 255
    Image.fromarray(levels).convert("RGB").save(path)
    return path


def picture(path: str, **details) -> Path:
    """A picture of ours that says this of itself."""
    details = {"prompt": "a", "seed": 1, **details}
    Path(path).write_bytes(encode_image(Image.new("RGB", (8, 8)), "PNG", Metadata("a", details)))
    return Path(path)


def control(name: str, image: Path, **changes) -> dict[str, object]:
    """What our JSON says of a ControlNet."""
    facts = {"name": image.name, "sha256": factories.sha256_of(image)}
    usual = {"scale": 1.0, "start": 0.0, "end": 1.0, "preprocessor": None, "mode": None}
    return {"name": name, "fingerprint": "0", "image": facts, **usual, **changes}


def test_controlnets_of_ours_are_the_options_that_asked_for_them(folder):
    Path("canny.safetensors").touch()
    first, second = drawn(folder / "map.png", 0), drawn(folder / "other.png", 1)
    own = control("gone/canny.safetensors", first, scale=0.8, start=0.1, preprocessor="canny")
    options = read_recipe(picture("x.png", controlnets=[own, control("owner/depth", second)])).options
    names = ("controlnet", "control_image", "control_start", "control_end", "control_preprocessor")
    made = ControlSpec.parse_all(*(options.get(name, ()) for name in names))
    assert made == (
        ControlSpec("canny.safetensors", Path("map.png"), 0.8, 0.1, 1.0, "canny"),
        ControlSpec("owner/depth", Path("other.png"), preprocessor="none"),
    )
    assert "control_end" not in options
    assert read_recipe(picture("x.png", controlnets=[control("owner/union", first, mode=3)])).options == {
        **{"prompt": ["a"], "seed": 1, "num_images": 1},
        **{"controlnet": ["owner/union:1.0"], "control_image": [Path("map.png")], "control_mode": 3},
    }


def test_what_is_missing_of_them_is_said_by_name(folder, run):
    own = control("owner/canny", drawn(folder / "map.png", 0))
    (folder / "map.png").unlink()
    gone = control("/gone/depth.safetensors", drawn(folder / "other.png", 1))
    recipe = read_recipe(picture("x.png", controlnets=[own, gone, {"name": "odd"}]))
    assert [one.split(":")[0] for one in recipe.left] == [
        "ControlNet {'name'",
        "ControlNet /gone/depth.safetensors",
        "control_image map.png",
    ]
    assert recipe.options["controlnet"] == ["owner/canny:1.0"]
    code, _, err = run("txt2img", "--from", "x.png")
    assert (code, "was made from the control image map.png, and no file with its content is here" in err) == (2, True)
    assert "hint: name it: --control-image FILE" in err
    drawn(Path("new.png"), 2)
    code, _, err = run(
        "txt2img", "--from", "x.png", "-m", "nowhere", "--control-image", "new.png", "--backend", "torch"
    )
    assert "nowhere" in err, "what is typed stands in for it"
    adapters = [{"name": "face", "sha256": "0", "scale": 0.6, "image": own["image"]}]
    recipe = read_recipe(picture("y.png", ip_adapters=adapters))
    assert recipe.left[0] == "IP-Adapter face: no such file here or beside the picture, give --ip-adapter ID"
    assert "ip_adapter" not in recipe.options


def test_ip_adapters_of_ours_are_found_by_the_name_that_was_given(folder):
    image = drawn(folder / "a:b.png", 0)
    facts = {"sha256": "0", "scale": 0.6, "image": {"name": image.name, "sha256": factories.sha256_of(image)}}
    name = "h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
    told = picture("x.png", ip_adapters=[{"name": "ip-adapter_sd15", "file": name, **facts}])
    options = read_recipe(told).options
    assert options["ip_adapter"] == [name]
    assert [ImagePromptSpec.parse(one) for one in options["ip_image"]] == [ImagePromptSpec(Path("a:b.png"), 0.6)]
    Path("ip-adapter_sd15.safetensors").touch()
    assert read_recipe(told).options["ip_adapter"] == ["ip-adapter_sd15.safetensors"], "here rather than on the hub"


def test_a_web_uis_controlnets_are_taken_where_their_files_are(folder, run):
    Path("canny.safetensors").touch()
    Path("x.txt").write_text(WEB_UI)
    recipe = read_recipe(Path("x.txt"))
    assert {name: one for name, one in recipe.options.items() if name.startswith("control")} == {
        "controlnet": ["canny.safetensors:0.8"],
        "control_start": [0.1],
        "control_preprocessor": ["canny"],
    }
    assert recipe.options["eta"] == 0.5
    assert [one.partition(" (")[0] for one in recipe.left] == [
        "ControlNet 0: Resize Mode Crop and Resize",
        "ControlNet 0: Threshold B 150",
        "ControlNet 1 lost: no such file here or beside the picture, give --controlnet FILE:SCALE",
        "ControlNet 2: Module: ip-adapter-auto, Model: face [89abcdef], Weight: 0.6",
    ]
    code, _, err = run("txt2img", "--from", "x.txt", "-m", "tiny")
    assert (code, "from 1 control image, which its text does not name" in err) == (2, True)


@pytest.mark.parametrize(
    ("fields", "options", "left"),
    [
        ("Sampler: DDIM, Eta DDIM: 0.5", {"eta": 0.5}, 0),
        ("Sampler: TCD, Eta: 0.3", {"eta": 0.3}, 0),
        ("Sampler: Euler a, Eta: 0.5", {}, 1),
        ("Sampler: LCM, Image CFG scale: 1.2, Denoising strength: 1", {"edit": True, "image_guidance_scale": 1.2}, 0),
        ("Sampler: LCM, Image CFG scale: 1.2, Denoising strength: 0.7", {"edit": True, "image_guidance_scale": 1.2}, 1),
    ],
)
def test_web_uis_numbers_of_edits_and_noise(fields, options, left, tmp_path):
    (tmp_path / "x.txt").write_text(f"red\nSteps: 2, CFG scale: 4, Seed: 1, RNG: CPU, {fields}")
    recipe = read_recipe(tmp_path / "x.txt")
    found = {name: recipe.options[name] for name in ("eta", "edit", "image_guidance_scale") if name in recipe.options}
    assert (found, len(recipe.left)) == (options, left)


def made_anew(run, command: str, *words: str) -> None:
    """Hold a picture of a command against the one that `--from` makes of it."""
    code, _, err = run(command, "-p", "red", *words, *RUN, "-o", "first.png", "--overwrite")
    assert code == 0, err
    code, _, err = run(command, "--from", "first.png", "-o", "again.png", "--overwrite")
    assert code == 0, err
    assert "warning" not in err
    assert Path("first.png").read_bytes() == Path("again.png").read_bytes()


@SLOW
def test_a_picture_by_two_controlnets_is_made_anew(smallest, run, folder):
    unet, words = factories.small_unet("sd1", **factories.SMALLEST["sd1"]), []
    for number in (0, 1):
        small_controlnet(unet, seed=7 + number).half().save_pretrained(folder / f"net-{number}")
        drawn(folder / f"{number}.png", number)
        words += ["--controlnet", f"net-{number}:0.{7 + number}", "--control-image", f"{number}.png"]
    noise = ("--scheduler", "ddim", "--eta", "0.5", "--control-start", "0", "--control-start", "0.5")
    made_anew(run, "txt2img", "-m", str(smallest), *words, *noise)
    made_anew(run, "img2img", "-m", str(smallest), *words, "-i", "0.png", "--scheduler", "DPM++ 2M Karras")
    drawn(folder / "new.png", 5)
    code, _, err = run("img2img", "--from", "first.png", "-o", "other.png", "--control-image", "0.png")
    assert (code, "2 ControlNets and 1 control image were given" in err) == (2, True)
    code, _, err = run(
        *("img2img", "--from", "first.png", "-o", "other.png"),
        *("--control-image", "0.png", "--control-image", "new.png"),
    )
    assert code == 0, err
    assert err.count("was made from another control image") == 1
    code, _, err = run(
        *("img2img", "--from", "first.png", "-o", "third.png"),
        *("--controlnet", "net-1", "--control-image", "0.png"),
    )
    assert code == 0, err
    assert "was made with another ControlNet net-0" in err


@SLOW
def test_a_picture_by_pictures_is_made_anew(smallest, run, folder):
    adapter = ip_adapters.write(folder, factories.small_unet("sd1", **factories.SMALLEST["sd1"]))
    drawn(folder / "one.png", 3)
    name = str(adapter.relative_to(folder))
    made_anew(run, "txt2img", "-m", str(smallest), "--ip-adapter", name, "--ip-image", "one.png:0.6")


@SLOW
def test_an_edit_is_made_anew(run, folder):
    model = editing_folder(folder / "model", "sd1")
    drawn(folder / "one.png", 3)
    made_anew(run, "img2img", "-m", str(model), "-i", "one.png", "--edit", "--image-guidance-scale", "1.25")
    code, _, err = run("txt2img", "--from", "first.png", "-o", "other.png")
    assert code != 0
    assert "edits images as a text says" in err
