"""What a ControlNet costs: a denoising step without one and with one, UNet and ControlNet in Inductor engines.

    python benchmarks/controlnet_step.py --folder /tmp/control --output benchmarks/controlnet-step-h200.json

Everything is in one call, and stays in the folder for a second one: a model of Stable Diffusion 1.5's size with random
weights (or `--model`), a ControlNet made from its UNet whose last layers are drawn by chance as an untrained one's are
zeros, and the three engines, which are built side by side, before anything is timed. Then it accelerates diffusers' own
pipelines and times what they call at each step, whole pictures, and the same in PyTorch, and holds the latents against
PyTorch's own in that precision. The goal is a step of at most 1.5 times the one without.
To try it elsewhere: --model tiny --height 64 --width 64 --steps 2 --repeats 3.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from sdtrt.common import host
from sdtrt.common.metrics import relative_l2
from sdtrt.models.resolve import resolve_model
from sdtrt.reports.meters import Timing, driver_version, time_calls, time_queued_calls
from sdtrt.specs import ModelSpec

GOAL = 1.5
STRENGTH = 0.8
DEVIATION = 0.05  # of the layers that begin as zeros: residuals change the picture, and it stays finite
ENGINES = {
    "unet": ("--component", "unet"),
    "unet-with-residuals": ("--component", "unet", "--controlnet"),
    "controlnet": ("--component", "controlnet", "--controlnet"),
}
REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    """Run it all, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers folder; by default one of SD 1.5's size, made in the folder")
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=50, help="steps that are timed")
    parser.add_argument("--folder", type=Path, required=True, help="where models and engines are kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "host": host.facts()}
    report |= {"driver": driver_version(), "versions": host.library_versions()}
    report |= measure(args)
    text = json.dumps(report, indent=1).replace(str(args.folder), "FOLDER")
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = folder_of(args)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, torch_dtype=dtype(), safety_checker=None)
    net = controlnet_of(pipe, args.folder / "controlnet")
    built = build(args, model, args.folder / "controlnet")
    without = placed(pipe)
    with_one = placed(diffusers.StableDiffusionControlNetPipeline(**without.components, controlnet=net))
    cases = {"without": without, "with one": with_one}
    found: dict[str, Any] = {"build_s": built, "sizes": {"height": args.height, "width": args.width, "batch": 2}}
    plain = {name: latents(one, args) for name, one in cases.items()}
    found["torch"] = {name: figures(one, args) for name, one in cases.items()}
    for one in cases.values():
        sdtrt.accelerate(
            one,
            height=args.height,
            width=args.width,
            backend="inductor",
            components=("unet", "controlnet") if one is with_one else ("unet",),
            engine_dir=args.folder / "engines",
            on_miss="error",
        )
    found["inductor"] = {name: figures(one, args) for name, one in cases.items()}
    for name, one in cases.items():
        made = latents(one, args)
        found["inductor"][name]["relative_l2_to_torch"] = float(relative_l2(made.numpy(), plain[name].numpy()))
    found["effect"] = float(relative_l2(plain["with one"].numpy(), plain["without"].numpy()))
    for backend in ("torch", "inductor"):
        step, more = (found[backend][name]["step_ms"]["median"] for name in cases)
        found[backend]["ratio"] = more / step
    found["goal"] = {"ratio": GOAL, "reached": found["inductor"]["ratio"] <= GOAL}
    return found


def folder_of(args: argparse.Namespace) -> Path:
    """The model's folder; one with random weights is made where none is named."""
    if args.model:
        return resolve_model(ModelSpec(args.model)).source
    folder: Path = args.folder / "sd15"
    if not folder.exists():
        subprocess.run([sys.executable, REPOSITORY / "scripts" / "make_random_model.py", folder], check=True)
    return folder


def controlnet_of(pipe: Any, folder: Path) -> Any:
    """A ControlNet made from the pipeline's UNet, which has an effect; it is kept in a folder."""
    if not folder.exists():
        torch.manual_seed(0)
        net = diffusers.ControlNetModel.from_unet(pipe.unet).float()
        zeros = (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
        for layer in zeros:
            torch.nn.init.normal_(layer.weight, std=DEVIATION / layer.weight.shape[1] ** 0.5)
        net.to(dtype()).save_pretrained(folder)
    return diffusers.ControlNetModel.from_pretrained(folder, torch_dtype=dtype())


def build(args: argparse.Namespace, model: Path, controlnet: Path) -> dict[str, float]:
    """Build the engines side by side, each by a command of its own; seconds of each."""
    common = [sys.executable, "-m", "sdtrt", "build", "--model", str(model), "--backend", "inductor", "--quiet"]
    common += ["--batch", "2", "--height", str(args.height), "--width", str(args.width)]
    common += ["--engine-dir", str(args.folder / "engines")]
    started, running = time.perf_counter(), {}
    for name, words in ENGINES.items():
        given = [*words, *([str(controlnet)] if words[-1] == "--controlnet" else [])]
        running[name] = subprocess.Popen([*common, *given], stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    seconds = {}
    for name, process in running.items():
        if process.wait():
            raise SystemExit(f"{name} was not built")
        seconds[name] = round(time.perf_counter() - started, 1)
    return seconds


def dtype() -> torch.dtype:
    """What is computed in here."""
    return torch.float16 if torch.cuda.is_available() else torch.float32


def placed(pipe: Any) -> Any:
    """A pipeline where it runs."""
    pipe.set_progress_bar_config(disable=True)
    if not torch.cuda.is_available():
        return pipe
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe.to("cuda")


def latents(pipe: Any, args: argparse.Namespace) -> torch.Tensor:
    """What a call of the pipeline makes, the same noise each time."""
    given: dict[str, Any] = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
    if hasattr(pipe, "controlnet"):
        given |= {"image": control_image(args), "controlnet_conditioning_scale": STRENGTH}
    generator = torch.Generator().manual_seed(3)
    made: torch.Tensor = pipe("a red circle", **given, generator=generator, output_type="latent").images
    return made.float().cpu()


def control_image(args: argparse.Namespace) -> Image.Image:
    """A map by chance."""
    return Image.effect_noise((args.width, args.height), 96).convert("RGB")


def figures(pipe: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What a step takes, its parts, and a whole picture's latents."""
    parts = parts_of(pipe, args)
    timings = {}
    with torch.inference_mode():
        for name, call in parts.items():
            for _ in range(3):
                call()
            timings[f"{name}_ms"] = rounded(time_queued_calls(call, args.repeats, pipe.device).scaled(1000))
    latents(pipe, args)
    picture = time_calls(lambda: latents(pipe, args), 3, pipe.device)
    return {**timings, "picture_s": rounded(picture)}


def rounded(timing: Timing) -> dict[str, float]:
    """The middle one, and what nine in ten don't exceed."""
    return {"median": round(timing.median, 4), "p90": round(timing.p90, 4)}


def parts_of(pipe: Any, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What diffusers calls at a step with guidance: ControlNet and UNet; each of them by itself, too."""
    unet, net, device = pipe.unet, getattr(pipe, "controlnet", None), pipe.device
    sample = torch.randn(2, 4, args.height // 8, args.width // 8, device=device, dtype=dtype())
    states = torch.randn(2, 77, unet.config.cross_attention_dim, device=device, dtype=dtype())
    image = torch.rand(2, 3, args.height, args.width, device=device, dtype=dtype())
    timestep = torch.tensor(500)

    def residuals() -> dict[str, Any]:
        if net is None:
            return {}
        given = {"controlnet_cond": image, "conditioning_scale": STRENGTH, "return_dict": False}
        down, middle = net(sample, timestep, encoder_hidden_states=states, **given)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    def denoise(more: dict[str, Any]) -> object:
        return unet(sample, timestep, encoder_hidden_states=states, return_dict=False, **more)

    with torch.inference_mode():
        kept = residuals()
    own = {} if net is None else {"controlnet": residuals, "unet_with_residuals": lambda: denoise(kept)}
    return {"step": lambda: denoise(residuals()), **own}


if __name__ == "__main__":
    main()
