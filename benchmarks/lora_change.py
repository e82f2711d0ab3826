"""What LoRAs cost on a live pipeline with Inductor engines: a change of them, a picture and a step with none, one, two.

    python benchmarks/lora_change.py --model FOLDER --height 512 --width 512 --steps 20 --folder /tmp/lora \\
        --output benchmarks/lora-h200.json

The LoRAs are by chance, of the UNet's attention and feed-forward layers and of the text encoders' attention, written in
diffusers' format. What is found is held against plain diffusers with the same LoRAs in the same precision, and each
picture of a choice of LoRAs against the first one of that choice, to the last bit. Needs peft.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from plain_pipelines import load, timed

from sdtrt.common import host
from sdtrt.common.metrics import relative_l2
from sdtrt.live.swap import swapped_of

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
STRENGTH = 0.02  # of factors by chance: pictures change, and stay finite
CHOICES = ("none", "one", "two", "both", "one", "none", "two", "both")


def main() -> None:
    """Run it all, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True, help="where engines and LoRAs are kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report = {"command": shlex.join(["python", *sys.argv]), "host": host.facts(), "versions": host.library_versions()}
    report |= measure(args)
    text = json.dumps(report, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    pipe = load(args.model)
    call = caller(pipe, args)
    adapters = {"one": 1, "two": 2}
    files = {
        name: write_lora(pipe, args.folder / f"lora-{args.rank}-{name}", args.rank, seed=seed)
        for name, seed in adapters.items()
    }
    for name, path in files.items():
        pipe.load_lora_weights(str(path), adapter_name=name)
    plain = {}
    for choice in dict.fromkeys(CHOICES):
        choose(pipe, choice)
        plain[choice] = call()
    pipe.unload_lora_weights()
    started = time.perf_counter()
    sdtrt.accelerate(pipe, height=args.height, width=args.width, backend="inductor", engine_dir=args.folder / "engines")
    found: dict[str, Any] = {"accelerate_s": time.perf_counter() - started, "rank": args.rank, "steps": args.steps}
    found["bare_picture_s"] = timed(call, pipe.device, args.repeats)
    for name, path in files.items():
        load_it = partial(pipe.load_lora_weights, str(path), adapter_name=name)
        found[f"load_{name}_s"] = timed(load_it, pipe.device, 1)
    found["rows"] = list(rows(pipe, call, plain, args))
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def caller(pipe: Any, args: argparse.Namespace) -> Callable[[], torch.Tensor]:
    """A call of the pipeline that gives the same latents each time."""

    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        given = {"height": args.height, "width": args.width, "num_inference_steps": args.steps}
        made: torch.Tensor = pipe("a red circle", **given, generator=generator, output_type="latent").images
        return made

    return call


def write_lora(pipe: Any, folder: Path, rank: int, *, seed: int) -> Path:
    """A LoRA by chance, as diffusers' `save_lora_weights` writes it."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    for part, targets in TARGETS.items():
        if (module := getattr(pipe, part, None)) is None:
            continue
        with torch.device("meta"):
            config = module.config
            empty = type(module).from_config(config) if hasattr(type(module), "from_config") else type(module)(config)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets), empty, adapter_name="made")
        state = get_peft_model_state_dict(empty, adapter_name="made")
        layers[f"{part}_lora_layers"] = {
            name: STRENGTH * torch.randn(one.shape, generator=generator) for name, one in state.items()
        }
    type(pipe).save_lora_weights(folder, **layers)
    return folder


def choose(pipe: Any, choice: str) -> None:
    """Have none, one or both of the LoRAs count."""
    if choice == "none":
        pipe.disable_lora()
        return
    pipe.enable_lora()
    pipe.set_adapters(["one", "two"] if choice == "both" else [choice], [0.7, 0.5] if choice == "both" else [1.0])


def rows(pipe: Any, call: Callable[[], torch.Tensor], plain: dict[str, torch.Tensor], args: argparse.Namespace) -> Any:
    """A row for each choice: what the change costs, a picture, a step, and how far it is from plain diffusers."""
    seen: dict[str, torch.Tensor] = {}
    for choice in CHOICES:
        choose(pipe, choice)
        first = timed(lambda: seen.setdefault("last", call()), pipe.device, 1)
        made = seen.pop("last")
        picture = timed(call, pipe.device, args.repeats)
        kept = seen.setdefault(choice, made)
        yield {
            "choice": choice,
            "change_s": first - picture,
            "picture_s": picture,
            "look_ms": 1000 * look(pipe),
            "relative_l2": float(relative_l2(made.float().cpu().numpy(), plain[choice].float().cpu().numpy())),
            "same_bits_as_before": bool(torch.equal(made, kept)),
        }


def look(pipe: Any) -> float:
    """Seconds that it takes to find, at a picture's first step, that nothing of the UNet's has changed."""
    swapped = swapped_of(pipe)["unet"]
    assert swapped.bound is not None
    bound = swapped.bound
    return timed(lambda: bound.copy(pipe.unet), pipe.device, 5)


if __name__ == "__main__":
    main()
