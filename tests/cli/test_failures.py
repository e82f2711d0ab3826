"""Every failure that `SECURITY.md` lists is made to happen with the real command line, and says what is said there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import ip_adapters
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from factories import sd1_folder, small_unet, unet_engine
from fault_server import UNET
from PIL import Image
from safetensors.torch import load_file, save_file

from sdtrt.cli.main import main
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import SIDECAR
from sdtrt.engines.publish import seal
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import memory
from sdtrt.specs import ModelSpec, Sizes

TABLE = Path(__file__).resolve().parents[2] / "SECURITY.md"
ROW = re.compile(r"\| (?P<name>[^|]+) \| (?P<code>\d+) \| `(?P<message>.+?)` \| `(?P<hint>.+?)` \|")
MODEL = ("--model", "model")
NET = ("--controlnet", "net", "--control-image", "edges.png")
T2I = ("--t2i-adapter", "t2i", "--t2i-image", "init.png")
PAINT = ("txt2img", "-p", "x", *MODEL, "--steps", "1", "-H", "64", "-W", "64", "--quiet", "-b", "onnxruntime")
BUILD = ("build", *MODEL)


def _ip_adapters(folder):
    """IP-Adapters whose headers tell that they don't fit: one for SDXL, one for another image encoder."""
    (folder / "image_encoder").mkdir(parents=True)
    (folder / "image_encoder" / "config.json").write_text('{"projection_dim": 24, "hidden_size": 32}')
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(4, 2048)}, folder / "xl.safetensors")
    unet = small_unet("sd1", cross_attention_dim=32, **UNET)
    save_file(ip_adapters.tensors(unet, width=1024), folder / "wide.safetensors")


def _beside(place):
    """A ControlNet and a T2I-Adapter for the model, a T2I-Adapter for another one, and a map of edges."""
    own = {name: value for name, value in UNET.items() if name not in ("up_block_types", "mid_block_type")}
    ControlNetModel(**own, cross_attention_dim=32).save_pretrained(place / "net")
    for name, width in (("t2i", 8), ("wide", 16)):
        T2IAdapter(channels=[width], num_res_blocks=1).save_pretrained(place / name)
    edges = Image.new("L", (64, 64))
    edges.paste(255, (16, 16, 48, 18))
    edges.save(place / "edges.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all that failures are about: the smallest model there is, its engine, files of the wrong kinds."""
    place = tmp_path_factory.mktemp("made")
    sd1_folder(place / "model", cross_attention_dim=32, **UNET)
    model = resolve_model(ModelSpec(str(place / "model")))
    unet_engine(model, "onnxruntime", "fp32", Sizes(2, 64, 64), EngineDirectory(place / "engines"))
    (place / "text.png").write_text("no picture")
    (place / "folder").mkdir()
    for name, layer in {"xl": "unet.a.attn2.to_k", "flux": "transformer.x", "layers": "unet.mid_block.x"}.items():
        tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 2048)}
        tensors |= {f"{layer}.lora_B.weight": torch.zeros(32, 4)} if name == "layers" else {}
        save_file(tensors, place / f"{name}.safetensors")
    _ip_adapters(place / "ip")
    _beside(place)
    save_file({"emb_params": torch.ones(2, 768)}, place / "wide.safetensors")
    save_file({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 32)}, place / "clip.safetensors")
    for name in ("file", "weights.ckpt", "exists.onnx"):
        (place / name).touch()
    Image.new("RGB", (64, 64)).save(place / "init.png")
    Image.new("L", (32, 64), 255).save(place / "mask.png")
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(place / "float.tif")
    Image.new("1", (9000, 9000)).save(place / "large.png")
    Image.new("1", (2000, 8)).save(place / "long.png")
    return place


def flip(pattern):
    """Change one bit of a file."""
    (path,) = Path().glob(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damaged_engine():
    flip("engines/unet-onnxruntime-*/engine.onnx")
    return PAINT


def damaged_export():
    flip("engines/unet-onnx-*/model.onnx")
    (engine,) = Path().glob("engines/unet-onnxruntime-*")
    shutil.rmtree(engine)
    return (*BUILD, "-b", "onnxruntime", "--precision", "fp32", "--quiet")


def damaged_entry():
    flip("engines/unet-onnxruntime-*/engine.onnx")
    return ("engines", "verify", "--quiet", "--json")


def open_entry():
    (engine,) = Path().glob("engines/unet-onnxruntime-*")
    engine.chmod(0o777)
    return ("engines", "verify", "--quiet", "--json")


def entry_in_use():
    entry = next(iter(EngineDirectory(Path("engines")).entries("engine")))
    held.append(entry.hold())
    return ("engines", "rm", entry.name)


def open_directory():
    Path("engines").chmod(0o777)
    return PAINT


def link_inside():
    Path("elsewhere").mkdir()
    shutil.rmtree("engines/.locks")
    Path("engines/.locks").symlink_to(Path("elsewhere").resolve())
    return (*BUILD, "-b", "onnxruntime", "--precision", "fp32", "--component", "vae_decoder", "--quiet")


def too_many_files():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    again = contextlib.ExitStack()
    again.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
    held.append(again)
    return ("engines", "list")


def truncated():
    path = next(Path("model/unet").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5000])
    return PAINT


def other_shapes():
    config = Path("model/unet/config.json")
    config.write_text(config.read_text().replace('"time_embedding_dim": null', '"time_embedding_dim": 48'))
    return (*PAINT, "-b", "torch")


def inpainting_model():
    config = Path("model/unet/config.json")
    config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
    return PAINT


def heic_without_its_library():
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    missing = contextlib.ExitStack()
    missing.enter_context(mock.patch.dict(sys.modules, {"pillow_heif": None}))
    held.append(missing)
    return "img2img", "-p", "x", *MODEL, "-i", "photo.heic"


def comfy():
    Path("flow.json").write_text('{"3": {"class_type": "KSampler", "inputs": {}}}')
    return (*PAINT, "--from", "flow.json")


def recipe_of_a_lost_map():
    unit = {"name": "owner/name", "scale": 1, "start": 0, "end": 1, "image": {"name": "map.png", "sha256": "0"}}
    told = {"prompt": "x", "seed": 1, "controlnets": [unit], "versions": {"sdtrt": "0"}}
    Path("told.json").write_text(json.dumps(told))
    return (*PAINT, "--from", "told.json")


def not_finite():
    path = next(Path("model/unet").glob("*.safetensors"))
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    return PAINT


def interrupted():
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    held.append(timer)
    timer.start()
    return (*PAINT, "--steps", "900")


def short_of_memory():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
    return (*PAINT, "-H", "4096", "-W", "4096")


def short_of_gpu_memory():
    """The engine's sidecar says what a TensorRT engine's does, and the GPU has 3 GiB: neither is to be had here."""
    (folder,) = Path().glob("engines/unet-onnxruntime-*")
    (entry,) = (one for one in EngineDirectory(Path("engines")).entries("engine") if one.name == folder.name)
    (folder / SIDECAR).unlink()
    seal(folder, entry.kind, entry.key, {**entry.info, "plan_bytes": 2**31, "scratch_bytes": 2**31})
    free = contextlib.ExitStack()
    free.enter_context(mock.patch.object(memory, "free_bytes", return_value=3 * 2**30))
    held.append(free)
    return (*PAINT, "--component", "unet")


def taken_port():
    listening = socket.create_server(("127.0.0.1", 0))
    held.append(listening)
    return "serve", "--port", f"{listening.getsockname()[1]}"


held: list[object] = []

MAKERS = {
    "no prompt": ("txt2img",),
    "unknown option": ("txt2img", "-p", "x", "--stepz", "3"),
    "not a number": ("txt2img", "-p", "x", "--steps", "many"),
    "unknown command": ("text2img",),
    "size": (*PAINT, "--height", "500"),
    "size beyond all": (*PAINT, "--width", "20000"),
    "steps": (*PAINT, "--steps", "0"),
    "more steps than the model has": (*PAINT, "--steps", "5000"),
    "number of images": (*PAINT, "--num-images", "0"),
    "number of images beyond all": (*PAINT, "--num-images", "9" * 12),
    "guidance scale": (*PAINT, "--cfg-scale", "nan"),
    "preset": (*PAINT, "--quality", "hihg"),
    "guidance interval": (*PAINT, "--guidance-interval", "0.7:0.1"),
    "guidance interval that is none": (*PAINT, "--guidance-interval", "0.7"),
    "seed": (*PAINT, "--seed", "-2"),
    "scheduler": (*PAINT, "--scheduler", "eulr"),
    "sigmas of a scheduler": (*PAINT, "--scheduler", "DDIM Karras"),
    "eta of a scheduler": (*PAINT, "--scheduler", "euler", "--eta", "0.5"),
    "cache interval": (*PAINT, "--cache-interval", "0"),
    "cache depth of a unet": (*PAINT, "--steps", "12", "--cache-interval", "3", "--cache-depth", "9"),
    "deep caching in PyTorch": (*PAINT, "--backend", "torch", "--cache-interval", "3"),
    "preview by a full VAE": (*PAINT, "--preview", "model"),
    "backend": (*PAINT, "--backend", "tensort"),
    "precision of a backend": (*PAINT, "--precision", "bf16"),
    "precision of one backend": (*PAINT, "--precision", "fp8"),
    "precision of no graph": ("export", *MODEL, "--precision", "int8"),
    "backend without a GPU": (*PAINT, "--backend", "tensorrt"),
    "prompt that is no text": ("txt2img", "-p", "\udcff"),
    "strength": ("img2img", *PAINT[1:], "-i", "init.png", "--strength", "0"),
    "strength of no step": ("img2img", *PAINT[1:], "-i", "init.png", "--strength", "0.5"),
    "missing init image": ("img2img", "-p", "x", *MODEL, "-i", "missing.png"),
    "init image that is none": ("img2img", "-p", "x", *MODEL, "-i", "text.png"),
    "HEIC without its library": heic_without_its_library,
    "init image too large": ("img2img", "-p", "x", *MODEL, "-i", "large.png"),
    "init image too long": ("img2img", "-p", "x", *MODEL, "-i", "long.png"),
    "init image of floats": ("img2img", "-p", "x", *MODEL, "-i", "float.tif"),
    "missing mask": ("inpaint", "-p", "x", *MODEL, "-i", "init.png", "--mask", "missing.png"),
    "mask of another size": ("inpaint", "-p", "x", *MODEL, "-i", "init.png", "--mask", "mask.png"),
    "mask that covers nothing": ("inpaint", "-p", "x", *MODEL, "-i", "init.png", "--mask", "init.png"),
    "mask's blur": ("inpaint", "-p", "x", *MODEL, "-i", "init.png", "--mask", "init.png", "--mask-blur", "-1"),
    "model for inpainting": inpainting_model,
    "file that tells nothing": (*PAINT, "--from", "init.png"),
    "file of ComfyUI": comfy,
    "picture that a file tells of": recipe_of_a_lost_map,
    "refiner beside another kind of model": (*PAINT, "--refiner", "model"),
    "refiner's start": (*PAINT, "--refiner", "model", "--refiner-start", "1"),
    "sizes that a model is not told": (*PAINT, "--crop", "0,0"),
    "two numbers": (*PAINT, "--target-size", "big"),
    "second pass": (*PAINT, "--upscale", "1"),
    "upscaler": (*PAINT, "--upscale", "2", "--upscaler", "missing.safetensors"),
    "image format": (*PAINT, "-o", "x.gif"),
    "images for one file": (*PAINT, "-o", "x.png", "--num-images", "2"),
    "output exists": (*PAINT, "-o", "init.png"),
    "output is a file": (*PAINT, "-o", "file"),
    "output's name is too long": (*PAINT, "-o", "x" * 300 + ".png"),
    "output can't be written": (*PAINT, "-o", "/proc/nowhere/x.png"),
    "unknown model": ("txt2img", "-p", "x", "--model", "tinny"),
    "missing model": ("txt2img", "-p", "x", "--model", "./nowhere"),
    "model's address": ("txt2img", "-p", "x", "--model", "https://huggingface.co/a/b"),
    "folder that is no model": ("txt2img", "-p", "x", "--model", "folder"),
    "file that is no model": ("txt2img", "-p", "x", "--model", "weights.ckpt"),
    "model that is not here": ("txt2img", "-p", "x", "--model", "owner/name", "--offline"),
    "missing LoRA": (*PAINT, "--lora", "missing.safetensors"),
    "LoRA's weight": (*PAINT, "--lora", "xl.safetensors:nan"),
    "LoRA for another kind of model": (*PAINT, "--lora", "xl.safetensors"),
    "LoRA that matches nothing": (*PAINT, "--lora", "flux.safetensors:0.5"),
    "LoRA of other layers": (*PAINT, "--lora", "layers.safetensors"),
    "missing IP-Adapter": (*PAINT, "--ip-adapter", "missing.safetensors", "--ip-image", "init.png"),
    "IP-Adapter without a picture": (*PAINT, "--ip-adapter", "ip/wide.safetensors"),
    "missing picture": (*PAINT, "--ip-adapter", "ip/wide.safetensors", "--ip-image", "missing.png:0.6"),
    "IP-Adapter for another kind of model": (*PAINT, "--ip-adapter", "ip/xl.safetensors", "--ip-image", "init.png"),
    "IP-Adapter of another width": (*PAINT, "--ip-adapter", "ip/wide.safetensors", "--ip-image", "init.png"),
    "ControlNet without a map": (*PAINT, "--controlnet", "net"),
    "map without a ControlNet": (*PAINT, "--control-image", "init.png"),
    "missing ControlNet": (*PAINT, "--controlnet", "missing", "--control-image", "edges.png"),
    "map of one colour": (*PAINT, "--controlnet", "net", "--control-image", "init.png"),
    "ControlNet's start and end": (*PAINT, *NET, "--control-start", "0.9", "--control-end", "0.1"),
    "numbers of no ControlNet": (*PAINT, "--control-end", "0.5"),
    "mode of no union": (*PAINT, *NET, "--control-mode", "1"),
    "missing T2I-Adapter": (*PAINT, "--t2i-adapter", "missing", "--t2i-image", "init.png"),
    "T2I-Adapter without a picture": (*PAINT, "--t2i-adapter", "t2i"),
    "file of a T2I-Adapter": (*PAINT, "--t2i-adapter", "xl.safetensors", "--t2i-image", "init.png"),
    "T2I-Adapter for another kind of model": (*PAINT, "--t2i-adapter", "wide", "--t2i-image", "init.png"),
    "T2I-Adapter and a second pass": (*PAINT, *T2I, "--upscale", "2"),
    "T2I-Adapter and an embedding": (*PAINT, *T2I, "--embedding", "wide.safetensors:<cat>"),
    "second pass and a refiner": (*PAINT, "--upscale", "2", "--refiner", "model"),
    "refiner behind a ControlNet and an image": (
        *("img2img", *PAINT[1:], "-i", "init.png", *NET, "--steps", "4"),
        *("--refiner", "model"),
    ),
    "edit by another kind of model": ("img2img", *PAINT[1:], "-i", "init.png", "--edit"),
    "edit with a ControlNet": ("img2img", *PAINT[1:], "-i", "init.png", "--edit", *NET),
    "image guidance without an edit": (
        "img2img",
        *PAINT[1:],
        "-i",
        "init.png",
        "--steps",
        "2",
        "--image-cfg-scale",
        "2",
    ),
    "strength of a second pass": (*PAINT, "--upscale", "2", "--upscale-strength", "0"),
    "missing embedding": (*PAINT, "--embedding", "missing.pt"),
    "embedding of another width": (*PAINT, "--embedding", "wide.safetensors:<cat>"),
    "embedding for another kind of model": (*PAINT, "--embedding", "clip.safetensors"),
    "embedding's word": (*PAINT, "--embedding", "wide.safetensors:a cat"),
    "layers to skip": (*PAINT, "--clip-skip", "9"),
    "prompt syntax": (*PAINT, "--prompt-syntax", "webiu"),
    "syntax that is not read": ("txt2img", "-p", "a <lora:b:1>", *PAINT[3:], "--prompt-syntax", "webui"),
    "truncated weights": truncated,
    "weights of another shape": other_shapes,
    "weights that are not finite": not_finite,
    "profile": (*BUILD, "-b", "tensorrt-rtx", "--profile", "depth=3"),
    "server for others without a key": ("serve", "--host", "0.0.0.0"),
    "server's key": ("serve", "--api-key", "short"),
    "server's port": taken_port,
    "server's sizes": ("serve", "--warm", "big"),
    "server's models of one name": ("serve", *MODEL, *MODEL),
    "range": (*BUILD, "-b", "tensorrt-rtx", "--height", "1:2"),
    "range upside down": (*BUILD, "-b", "tensorrt-rtx", "--height", "512:256:128"),
    "compute capability": (*BUILD, "-b", "tensorrt-rtx", "--compute-capability", "x"),
    "options without effect": (*BUILD, "-b", "onnxruntime", "--workspace-gib", "1"),
    "attention left to PyTorch": (*BUILD, "-b", "tensorrt-rtx", "--split-attention", "2048"),
    "attention without a UNet": ("build", *MODEL, "--component", "text_encoder", "--split-attention", "2048"),
    "channels-last without pieces": (*BUILD, "-b", "tensorrt", "--channels-last", "--split-attention", "0"),
    "channels-last in fp32": (*BUILD, "-b", "tensorrt", "--channels-last", "--precision", "fp32"),
    "backend without engines": (*BUILD, "-b", "torch"),
    "export's name": ("export", *MODEL, "--component", "unet", "-o", "unet.txt"),
    "export of several parts": ("export", *MODEL, "-o", "unet.onnx"),
    "export exists": ("export", *MODEL, "--component", "unet", "-o", "exists.onnx"),
    "opset": ("export", *MODEL, "--opset", "3"),
    "component": ("export", *MODEL, "--component", "vea"),
    "missing engine": (*PAINT, "--no-build", "--engine-dir", "none"),
    "damaged engine": damaged_engine,
    "damaged export": damaged_export,
    "damaged entries": damaged_entry,
    "entries that others can change": open_entry,
    "no such entry": ("engines", "rm", "nothing"),
    "entry in use": entry_in_use,
    "size to keep": ("engines", "prune", "--keep-gib", "nan"),
    "age": ("engines", "prune", "--older-than-days", "-5"),
    "part of an engine": ("inspect", "--engine", "x", "--part", "unet"),
    "engine directory is a file": (*PAINT, "--engine-dir", "file"),
    "engine directory can't be written": (*PAINT, "--engine-dir", "/proc/nowhere"),
    "engine directory that others can change": open_directory,
    "link inside the engine directory": link_inside,
    "too many open files": too_many_files,
    "out of memory": short_of_memory,
    "engines larger than the GPU's memory": short_of_gpu_memory,
    "interrupted": interrupted,
}


def rows() -> dict[str, re.Match[str]]:
    """The table, by its first column."""
    return {row["name"].strip(): row for row in ROW.finditer(TABLE.read_text(encoding="utf-8"))}


def fits(text: str, pattern: str) -> bool:
    """Whether a line is what the table has; `…` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("…"))), text) is not None


def test_the_table_and_the_tests_are_about_the_same_failures():
    assert set(rows()) == {*MAKERS, "stdout can't be written"}


@pytest.mark.parametrize("name", MAKERS)
def test_a_failure_is_as_the_table_has_it(name, made, tmp_path, capsys, monkeypatch):
    maker = MAKERS[name]
    if callable(maker):  # it changes something
        made = shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(made)
    monkeypatch.setenv("SDTRT_ENGINE_DIR", "engines")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    words = maker() if callable(maker) else maker
    monkeypatch.setattr(sys, "argv", ["sdtrt", *words])
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for thing in held:
            thing.cancel() if isinstance(thing, threading.Timer) else thing.close()
        held.clear()
    out, err = capsys.readouterr()
    error, hint = err.splitlines()[-2:]
    row = rows()[name]
    assert ended.value.code == int(row["code"]), err
    assert fits(error, f"error: {row['message']}"), error
    assert fits(hint, f"hint: {row['hint']}"), hint
    assert out == "" or name in ("damaged entries", "entries that others can change")


def test_a_full_stdout_is_as_the_table_has_it():
    row = rows()["stdout can't be written"]
    command = f"'{sys.executable}' -m sdtrt --version >/dev/full"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    error, hint = ended.stderr.splitlines()
    assert ended.returncode == int(row["code"])
    assert fits(error, f"error: {row['message']}")
    assert fits(hint, f"hint: {row['hint']}")
