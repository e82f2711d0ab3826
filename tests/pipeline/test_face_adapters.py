"""IP-Adapters for faces (FaceID) on the command line: an embedding of a file in, the picture of plain diffusers out."""

from __future__ import annotations

import json

import factories
import ip_adapters
import numpy as np
import pytest
import safetensors.torch
import torch
import torch_engines
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

import sdtrt
from sdtrt.common.console import QUIET
from sdtrt.common.errors import ModelError, UsageError
from sdtrt.models.loading import check_ip_adapters, check_loras, load_unet
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.inputs.ip_images import check_ip_images, read_ip_images
from sdtrt.specs import GenerateSpec, ImagePromptSpec, ModelSpec

pytestmark = pytest.mark.usefixtures("on_the_cpu")
LEVELS, SIZE = 2, {"height": 64, "width": 64}
BIN = "ip-adapter-faceid_sd15.bin"


def unet_of(kind):
    return factories.small_unet(kind, **factories.SMALLEST[kind])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, adapters for it in the files that people have, a picture, and embeddings of faces."""
    root = tmp_path_factory.mktemp("faces")
    factories.sd1_folder(root / "model", **factories.SMALLEST["sd1"])
    ip_adapters.write_face(root / BIN, unet_of("sd1"), seed=4)
    ip_adapters.write_face(root / "bare.safetensors", unet_of("sd1"), seed=4, lora=False)
    ip_adapters.write(root, unet_of("sd1"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(root / "one.png")
    for name, seed in (("face", 0), ("other", 1)):
        np.save(root / f"{name}.npy", face(seed).numpy())
    return root


def face(seed):
    made = torch.randn(ip_adapters.FACE_WIDTH, generator=torch.Generator().manual_seed(seed))
    return made / made.norm()


def as_in_diffusers_guide(one):
    return torch.cat([torch.zeros(1, 1, 1, len(one)), one[None, None, None]])


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def drawn(pipe, **options):
    made = pipe("a red circle", generator=torch.Generator().manual_seed(7), **options).images[0]
    return np.asarray(made, dtype=int)


def plain(folder, *names, cls=StableDiffusionPipeline, model="model", **options):
    parts = {} if "XL" in cls.__name__ else {"safety_checker": None, "requires_safety_checker": False}
    pipe = cls.from_pretrained(folder / model, torch_dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=list(names), image_encoder_folder=None, **options)
    return pipe


@pytest.mark.parametrize(("kind", "backend"), [("sd1", "torch"), ("sd1", "inductor"), ("sdxl", "inductor")])
@pytest.mark.feature("IP-Adapter for faces (FaceID), `--ip-embeds`", "sd1 sdxl", "inductor")
@pytest.mark.slow
def test_a_face_makes_the_picture_of_plain_diffusers(folder, tmp_path, run, monkeypatch, kind, backend):
    """PyTorch computes in the place of an engine without weights, which the facade gives what it gives an engine."""
    torch_engines.instead_of_inductor(monkeypatch)
    place, cls = folder, StableDiffusionPipeline
    if kind == "sdxl":
        place, cls = tmp_path / "xl", StableDiffusionXLPipeline
        factories.sdxl_folder(place / "model", **factories.SMALLEST["sdxl"])
        ip_adapters.write_face(place / BIN, unet_of("sdxl"), seed=4)
    pipe = plain(place, BIN, cls=cls)
    words = ["txt2img", "a red circle", "--model", place / "model", "--backend", backend, "--precision", "fp32"]
    words += ["--steps", 2, "--seed", 7, "-W", 64, "-H", 64, "--ip-adapter", place / BIN, "--allow-pickle", BIN]
    words += ["--engine-dir", tmp_path / "engines", "--json", "--quiet"]
    words += ["--component", "unet"] if backend != "torch" else []
    made = {}
    for name, scale in (("face", 0.7), ("other", 1.0), ("face", 0)):
        given = ["--ip-embeds", f"{folder / name}.npy:{scale}", "-o", tmp_path / f"{name}-{scale}.png"]
        code, out, err = run(*map(str, [*words, *given]))
        assert code == 0, err
        pipe.set_ip_adapter_scale(scale)
        embeds = [as_in_diffusers_guide(face(int(name == "other")))]
        options = {"num_inference_steps": 2, "guidance_scale": 7.5, **SIZE}
        expected = drawn(pipe, ip_adapter_image_embeds=embeds, **options)
        made[name, scale] = picture(json.loads(out)["images"][0]["path"])
        assert np.abs(made[name, scale] - expected).max() <= LEVELS
    assert np.abs(made["face", 0.7] - made["other", 1.0]).max() > 5 * LEVELS
    if kind == "sd1" and backend == "torch":  # its LoRA counts at a scale of 0, too, as in diffusers
        pipe.unload_ip_adapter()
        pipe.unload_lora_weights()
        assert np.abs(made["face", 0] - drawn(pipe, **options)).max() > 5 * LEVELS


@pytest.mark.slow
def test_a_face_beside_a_picture_comes_again_from_its_file(folder, tmp_path, run, monkeypatch):
    """Two adapters of two kinds: diffusers takes embeddings of both then, which the command makes of the picture."""
    style = folder / "models" / "ip-adapter_sd15.safetensors"
    monkeypatch.chdir(folder)
    words = ["--backend", "torch", "--precision", "fp32", "--json", "--quiet", "--engine-dir", str(tmp_path)]
    given = ["--ip-adapter", str(style), "--ip-image", "one.png:0.5", "--ip-adapter", "bare.safetensors"]
    given += ["--ip-embeds", "face.npy:0.9", "--model", "model", "--steps", "2", "--seed", "7", "-W", "64", "-H", "64"]
    code, out, err = run("txt2img", "a red circle", *given, *words, "-o", str(tmp_path / "one.png"))
    assert code == 0, err
    report = json.loads(out)
    assert [one["image"]["name"] for one in report["ip_adapters"]] == ["one.png", "face.npy"]
    assert ["image_encoder" in one for one in report["ip_adapters"]] == [True, False]
    pipe = StableDiffusionPipeline.from_pretrained("model", torch_dtype=torch.float32, safety_checker=None)
    pipe.load_ip_adapter(str(folder), subfolder=["models", ""], weight_name=[style.name, "bare.safetensors"])
    pipe.set_ip_adapter_scale([0.5, 0.9])
    own, nothing = pipe.encode_image(Image.open("one.png"), "cpu", 1, False)
    embeds = [torch.cat([nothing[None], own[None]]), as_in_diffusers_guide(face(0))]
    expected = drawn(pipe, ip_adapter_image_embeds=embeds, num_inference_steps=2, **SIZE)
    made = picture(report["images"][0]["path"])
    assert np.abs(made - expected).max() <= LEVELS
    code, out, err = run("txt2img", "--from", str(tmp_path / "one.png"), *words, "-o", str(tmp_path / "again.png"))
    assert code == 0, err
    assert np.array_equal(picture(json.loads(out)["images"][0]["path"]), made)


@pytest.mark.slow
def test_verify_takes_a_face(folder, tmp_path, run):
    words = ["--model", folder / "model", "--ip-adapter", folder / "bare.safetensors", "--backend", "torch"]
    words += ["--precision", "fp32", "--engine-dir", tmp_path / "engines", "--steps", 2, "-W", 64, "-H", 64]
    words += ["--ip-embeds", folder / "face.npy", "--output", tmp_path, "--json"]
    code, out, err = run("verify", *map(str, words))
    assert code == 0, err
    for error in json.loads(out)["timesteps"]:
        assert error["relative_l2"] == 0
        assert 1e-5 < error["reference_relative_l2"] < 1e-2


# --- what is read, and what is refused -------------------------------------------------------------------------------


def resolved(folder, *names, **options):
    model = resolve_model(
        ModelSpec(str(folder / "model"), ip_adapters=tuple(str(folder / one) for one in names), **options)
    )
    check_ip_adapters(model)
    check_loras(model)
    return model


def test_a_file_of_faces_needs_trust_and_no_image_encoder(folder):
    with pytest.raises(ModelError, match="is a pickle file") as caught:
        resolved(folder, BIN)
    assert f"--allow-pickle {BIN}" in caught.value.hint
    (one,) = resolved(folder, BIN, allow_pickle=BIN).ip_adapters
    assert (one.takes_faces, one.tokens, one.width, one.has_lora) == (True, 4, ip_adapters.FACE_WIDTH, True)
    assert not resolved(folder, "bare.safetensors").ip_adapters[0].has_lora


def test_its_lora_is_merged_into_the_weights(folder):
    """As diffusers computes it, which keeps it beside them."""
    found = load_unet(resolved(folder, BIN, allow_pickle=BIN), torch.float32)
    layers = dict(plain(folder, BIN).unet.named_modules())
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = name if name in layers else next(one for one in layers if one.endswith("attn1.to_q"))
    given = torch.randn(2, layers[name].in_features)
    own = found.get_submodule(name)
    assert type(own) is torch.nn.Linear
    assert torch.allclose(own(given), layers[name](given), atol=1e-5)
    assert not torch.allclose(own(given), layers[name].base_layer(given), atol=1e-2)


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("ip_adapter.0.to_q_lora.up.weight", "does not fit the unet"),
        ("image_proj.proj.2.weight", "has no projection of them"),
        ("ip_adapter.3.to_v_ip.weight", "is for another UNet"),
    ],
)
def test_a_part_that_is_missing_is_refused(folder, tmp_path, drop, message):
    own = ip_adapters.face_tensors(unet_of("sd1"))
    del own[drop]
    safetensors.torch.save_file(own, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        resolved(folder, tmp_path / "half.safetensors")
    assert "\n" not in caught.value.message + caught.value.hint


def test_a_lora_of_another_model_is_refused(folder, tmp_path):
    ip_adapters.write_face(tmp_path / "xl.safetensors", unet_of("sdxl"))
    with pytest.raises(ModelError, match=r"is for .*width 64.* is .*width 32"):
        resolved(folder, tmp_path / "xl.safetensors")
    torch.save({"image_proj": {}, "other": 3}, tmp_path / "none.bin")
    with pytest.raises(ModelError, match="is no IP-Adapter"):
        resolved(folder, tmp_path / "none.bin", allow_pickle="none.bin")


@pytest.mark.parametrize("form", ["npy", "pt", "safetensors", "guide", "list"])
def test_each_form_of_a_file_is_the_same_face(tmp_path, form):
    one, path = face(3), tmp_path / f"face.{ {'guide': 'ipadpt', 'list': 'pt'}.get(form, form) }"
    if form == "npy":
        np.save(path, one.numpy())
    elif form == "safetensors":
        safetensors.torch.save_file({"embedding": one[None]}, path)
    else:
        torch.save({"pt": one, "guide": as_in_diffusers_guide(one), "list": [as_in_diffusers_guide(one)]}[form], path)
    (found,) = read_ip_images(asked(path), QUIET)
    assert torch.equal(found.embedding, one[None, None])


def asked(*paths):
    names = tuple(f"{number}.safetensors" for number, _ in enumerate(paths))
    return GenerateSpec(
        prompts=("a",), model=ModelSpec(ip_adapters=names), ip_images=tuple(map(ImagePromptSpec, paths))
    )


class Trap:
    """What a pickle can do that runs code."""

    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_what_is_no_face_is_refused(folder, tmp_path, capsys):
    wrong = {
        "two.npy": (np.ones((2, 5), np.float32), "holds 2 embeddings"),
        "text.npy": (np.array(["a"]), "holds no"),
        "nan.npy": (np.array([np.nan, 1]), "no finite"),
        "whole.npy": (np.array([1, 2]), "no finite"),
    }
    for name, (content, message) in wrong.items():
        np.save(tmp_path / name, content)
        with pytest.raises(UsageError, match=message) as caught:
            read_ip_images(asked(tmp_path / name), QUIET)
        assert str(tmp_path / name) in caught.value.message
    torch.save(Trap(), tmp_path / "trap.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    (tmp_path / "large.npy").write_bytes(bytes(2 << 20))
    for name in ("trap.pt", "torn.safetensors", "large.npy", "none.npy"):
        with pytest.raises(UsageError, match=r"ip embeds .* (holds no embedding|can't be read)"):
            read_ip_images(asked(tmp_path / name), QUIET)
    assert "ran" not in "".join(capsys.readouterr())


def test_pictures_and_faces_are_not_taken_for_each_other(folder, tmp_path):
    np.save(tmp_path / "short.npy", face(0).numpy()[:-1])
    style = "models/ip-adapter_sd15.safetensors"
    cases = (
        ("bare.safetensors", folder / "one.png", "takes the embedding of a face, and .*one.png is a picture"),
        (style, folder / "face.npy", "takes a picture, and .*face.npy is a file of tensors"),
        ("bare.safetensors", tmp_path / "short.npy", "an embedding of 19 numbers, and .* takes 20"),
    )
    for name, given, message in cases:
        with pytest.raises(UsageError, match=message):
            check_ip_images(resolved(folder, name), read_ip_images(asked(given), QUIET))
    spec = GenerateSpec(
        prompts=("a",),
        model=ModelSpec(str(folder / "model"), ip_adapters=(str(folder / "bare.safetensors"),)),
        ip_images=(ImagePromptSpec(folder / "one.png"),),
        **SIZE,
    )
    with pytest.raises(UsageError, match="is a picture"):
        sdtrt.generate(spec, engine_dir=tmp_path / "engines", progress=False)
