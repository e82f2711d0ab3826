"""What IP-Adapters cost a live pipeline with Inductor engines: a step and a picture with none, one, Plus, and two.

    python benchmarks/ip_adapter_step.py --model FOLDER --height 512 --width 512 --steps 20 --folder /tmp/ip \\
        --output benchmarks/ip-adapter-h200.json

The adapters are by chance, of the sizes of h94/IP-Adapter's (4 tokens, and Plus's 16), by its tensors' names; so
are the embeddings of pictures. What is found is held against plain diffusers in the same precision. Other pictures and
scales, and another adapter of the same kind, must build nothing: the engines are counted.
"""

from __future__ import annotations

import sdtrt  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from plain_pipelines import load, timed

from sdtrt.common import host
from sdtrt.common.metrics import relative_l2
from sdtrt.engines.directory import EngineDirectory

IMAGE_WIDTH, STATES_WIDTH, STATES = 1024, 1280, 257  # of the image encoder of h94/IP-Adapter: embedding, states
TOKENS = {"base": 4, "plus": 16}
ROWS: dict[str, tuple[str, ...]] = {"none": (), "one": ("base",), "plus": ("plus",), "two": ("base", "plus")}
CALLS = 50  # of the UNet, that a step's time is the mean of

State = dict[str, dict[str, torch.Tensor]]


def main() -> None:
    """Run it all, and write the report after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--folder", type=Path, required=True, help="where engines are kept")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = {"command": shlex.join(["python", *sys.argv])}
    report |= {"host": host.facts(), "versions": host.library_versions()}
    report |= {"steps": args.steps, "height": args.height, "width": args.width, "rows": []}
    for row in rows(args):
        report["rows"].append(row)
        if args.output:  # whatever becomes of the next one
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each choice of adapters; the first is what the others are compared with."""
    first = None
    for name in args.rows:
        row = measure(name, args)
        first = first or row["step_ms"]
        yield {**row, "step_times_the_first": row["step_ms"] / first}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one choice of adapters."""
    pipe, kinds = load(args.model), ROWS[name]
    put_on(pipe, kinds, seed=1)
    pictures = [embeddings(pipe, kinds, seed) for seed in (1, 2)]
    plain: dict[str, Any] = {"picture": picture(pipe, pictures[0], args), "step_ms": step_ms(pipe, pictures[0], args)}
    started, engines = time.perf_counter(), EngineDirectory(args.folder / "engines")
    options = {"height": args.height, "width": args.width, "engine_dir": engines.path, "components": ("unet",)}
    sdtrt.accelerate(pipe, backend="inductor", **options)
    found: dict[str, Any] = {"adapters": name, "accelerate_s": time.perf_counter() - started}
    made = picture(pipe, pictures[0], args)
    found["relative_l2"] = relative_l2(made.float().cpu().numpy(), plain["picture"].float().cpu().numpy())
    built = len(engines.entries("engine"))
    found |= {"step_ms": step_ms(pipe, pictures[0], args), "pytorch_step_ms": plain["step_ms"]}
    found["picture_s"] = timed(lambda: picture(pipe, pictures[0], args), pipe.device, args.repeats)
    if kinds:
        found |= turned(pipe, kinds, pictures, args)
        found["engines_built_by_that"] = len(engines.entries("engine")) - built
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    sdtrt.restore(pipe)
    return found


def turned(pipe: Any, kinds: tuple[str, ...], pictures: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    """What pictures cost beside the last one where something has been turned: another scale, image, or adapter."""
    found: dict[str, Any] = {}
    pipe.set_ip_adapter_scale([0.3] * len(kinds))
    found["picture_of_another_scale_s"] = timed(lambda: picture(pipe, pictures[0], args), pipe.device, 1)
    found["picture_of_another_image_s"] = timed(lambda: picture(pipe, pictures[1], args), pipe.device, 1)
    found["loading_another_adapter_s"] = timed(lambda: put_on(pipe, kinds, seed=2), pipe.device, 1)
    found["picture_of_another_adapter_s"] = timed(lambda: picture(pipe, pictures[0], args), pipe.device, 1)
    return found


def put_on(pipe: Any, kinds: tuple[str, ...], *, seed: int) -> None:
    """Load adapters by chance with diffusers' own call."""
    if kinds:
        states = [state(pipe.unet, kind, seed + number) for number, kind in enumerate(kinds)]
        pipe.load_ip_adapter(states, subfolder="", weight_name=[""] * len(kinds), image_encoder_folder=None)
        pipe.set_ip_adapter_scale([0.6] * len(kinds))


def state(unet: Any, kind: str, seed: int) -> State:
    """An adapter's tensors for a UNet, in two groups as files have them."""
    generator, layers = torch.Generator().manual_seed(seed), {}
    attentions = [
        unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name
    ]
    for index, attention in enumerate(attentions):
        for one in "kv":
            shape = attention.to_k.weight.shape
            weight = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            layers[f"{2 * index + 1}.to_{one}_ip.weight"] = weight.to(unet.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = made(kind, attentions[0].to_k.in_features)
    return {"image_proj": {name: one.to(unet.dtype) for name, one in projection.items()}, "ip_adapter": layers}


def made(kind: str, text: int) -> dict[str, torch.Tensor]:
    """A projection by chance, its tensors by the names of their authors."""
    if kind == "base":
        own = ImageProjection(IMAGE_WIDTH, text, TOKENS[kind]).state_dict()
        return {name.replace("image_embeds", "proj"): one for name, one in own.items()}
    plus = IPAdapterPlusImageProjection(
        embed_dims=STATES_WIDTH, output_dims=text, hidden_dims=text, heads=max(1, text // 64), num_queries=TOKENS[kind]
    )
    return dict(by_authors(plus.state_dict()))


def by_authors(own: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """A resampler's tensors: each layer's attention is its part 0, what comes after that its part 1."""
    parts = {"ln0": "0.norm1", "ln1": "0.norm2", "attn.to_q": "0.to_q", "attn.to_out.0": "0.to_out"}
    parts |= {"ff.0": "1.0", "ff.1.net.0.proj": "1.1", "ff.1.net.2": "1.3"}
    for name, tensor in own.items():
        head, _, rest = name.partition(".attn.to_k.")
        if rest:
            yield f"{head}.0.to_kv.weight", torch.cat([tensor, own[f"{head}.attn.to_v.weight"]])
        elif ".attn.to_v." not in name:
            words = name.split(".", 2)
            old = next((one for one in parts if len(words) > 2 and words[2].startswith(f"{one}.")), None)
            yield (name if old is None else f"layers.{words[1]}.{parts[old]}{words[2].removeprefix(old)}"), tensor


def embeddings(pipe: Any, kinds: tuple[str, ...], seed: int) -> list[torch.Tensor]:
    """Embeddings of pictures by chance, those of none before them, as guidance takes them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base": (2, 1, IMAGE_WIDTH), "plus": (2, 1, STATES, STATES_WIDTH)}
    given = [torch.randn(shapes[kind], generator=generator) for kind in kinds]
    return [one.to(pipe.device, pipe.unet.dtype) for one in given]


def picture(pipe: Any, embeds: list[torch.Tensor], args: argparse.Namespace) -> torch.Tensor:
    """The latents of a picture, the same each time."""
    given = {"height": args.height, "width": args.width, "num_inference_steps": args.steps, "output_type": "latent"}
    given |= {"ip_adapter_image_embeds": embeds} if embeds else {}
    result: torch.Tensor = pipe("a red circle", **given, generator=torch.Generator().manual_seed(3)).images
    return result


def step_ms(pipe: Any, embeds: list[torch.Tensor], args: argparse.Namespace) -> float:
    """Milliseconds of a call of the UNet, as a picture's steps make them: the same conditioning again and again."""
    call = unet_call(pipe, embeds, args)
    for _ in range(3):  # kernels are loaded, and a graph is captured
        call()

    def several() -> None:
        for _ in range(args.calls):
            call()

    found: float = 1000 * timed(several, pipe.device, args.repeats) / args.calls
    return found


def unet_call(pipe: Any, embeds: list[torch.Tensor], args: argparse.Namespace) -> Callable[[], Any]:
    """A call of the UNet with guidance."""
    config, dtype, device = pipe.unet.config, pipe.unet.dtype, pipe.device
    factor, generator = pipe.vae_scale_factor, torch.Generator().manual_seed(0)
    width = config.cross_attention_dim
    sample = torch.randn(2, config.in_channels, args.height // factor, args.width // factor, generator=generator)
    states = torch.randn(2, 77, width, generator=generator)
    sample, states = sample.to(device, dtype), states.to(device, dtype)
    added: dict[str, Any] = {"image_embeds": embeds} if embeds else {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added |= {"text_embeds": torch.randn(2, pooled, generator=generator).to(device, dtype)}
        added["time_ids"] = torch.tensor([[args.height, args.width, 0, 0, args.height, args.width]] * 2).to(
            device, dtype
        )

    def call() -> Any:
        with torch.no_grad():
            return pipe.unet(
                sample, 500, encoder_hidden_states=states, added_cond_kwargs=added or None, return_dict=False
            )[0]

    return call


if __name__ == "__main__":
    main()
