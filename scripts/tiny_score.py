"""Scores the miniature on held-out prompts through diffusers' own pipelines, and writes its model card."""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import random
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from tiny_scenes import (
    COLOURS,
    JUNK,
    PLACE_WORDS,
    VIEWS,
    describe,
    expected,
    render,
    sample_scenes,
    sample_template,
    to_scene,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from pixel_checker import Scene, Verdict, judge, look

STRENGTHS = (0.4, 0.5, 0.6, 0.7)
GUIDANCE_SCALE = 7.5
STEPS = 50


@dataclass(frozen=True)
class Prompt:
    """A prompt, what it asks for, and the image size (height, width) in pixels."""

    text: str
    scene: Scene
    size: tuple[int, int]


@dataclass(frozen=True)
class Judged:
    """Images with their verdicts, in the order of the prompts."""

    images: list[Image.Image]
    verdicts: list[Verdict]


def held_out_prompts(n: int, sizes: list[tuple[int, int]], seed: int) -> list[Prompt]:
    """Captions of held-out scenes that say every kind and colour; sizes in turn."""
    rng = random.Random(seed + 77)
    generator = torch.Generator().manual_seed(seed + 77)
    pools = {size: sample_scenes(2 * n + 64, *size, generator, wanted=True) for size in sizes}
    prompts = []
    for index in range(n):
        size = sizes[index % len(sizes)]
        pool = pools[size]
        pick = rng.randrange(len(pool))
        scene = to_scene(pool, pick, swap=int(pool.count[pick]) == 2 and rng.random() < 0.5)
        template = full_template(scene.relation or "single", rng)
        prompts.append(Prompt(describe(template, scene, rng), expected(template, scene), size))
    return prompts


def full_template(view: str, rng: random.Random) -> str:
    """A wording that says every kind and colour, the background, and where two shapes lie."""
    needed: tuple[str, ...] = ("{a.colour}", "{a.kind}", "{b.colour}", "{b.kind}", "{background}")
    if view == VIEWS[0]:
        needed = ("{a.colour}", "{a.kind}", "{background}")
    while True:
        template = sample_template(view, rng)
        placed = view == VIEWS[0] or bool(PLACE_WORDS & set(template.split()))
        if placed and JUNK not in template and all(slot in template for slot in needed):
            return template


@torch.no_grad()
def score_prompts(
    pipeline: StableDiffusionPipeline, prompts: list[Prompt], steps: int = STEPS, guidance_scale: float = GUIDANCE_SCALE
) -> Judged:
    """Generate an image for each prompt, in batches of one size, and judge it; seeds are the prompts' positions."""
    images = generate(pipeline, prompts, steps, guidance_scale)
    return Judged(images, [judge(image, prompt.scene) for image, prompt in zip(images, prompts, strict=True)])


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[Prompt],
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    negative: list[str] | None = None,
) -> list[Image.Image]:
    """Images in the order of the prompts."""
    by_size = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_size[prompt.size].append(index)
    images: dict[int, Image.Image] = {}
    for (height, width), indices in by_size.items():
        result = pipeline(
            [prompts[i].text for i in indices],
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=[negative[i] for i in indices] if negative else None,
            generator=[torch.Generator().manual_seed(i) for i in indices],
        )
        images |= dict(zip(indices, result.images, strict=True))
    return [images[i] for i in range(len(prompts))]


def score(
    folder: Path, device: torch.device, n: int, seed: int, sizes: list[tuple[int, int]]
) -> tuple[dict[str, object], list[Image.Image]]:
    """Load the float16 files as float32 and measure everything the model card says; shares are 0 to 1."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(n, sizes, seed)
    judged = score_prompts(pipeline, prompts)
    native = held_out_prompts(n // 3, [(128, 128)], seed)
    unguided = score_prompts(pipeline, native, guidance_scale=1.0)
    report: dict[str, object] = {
        "prompts": n,
        "sizes": len(sizes),
        "unguided": len(native),
        "held_out": rates(judged.verdicts, prompts),
        "guidance_1": rates(unguided.verdicts, native),
        "negative_prompt": score_negative(pipeline, max(1, n // 30)),
        "img2img": score_img2img(pipeline, max(8, n // 5), seed),
        "largest_activation": largest_activation(pipeline, prompts[:4]),
        "parameters": {
            name: sum(p.numel() for p in getattr(pipeline, name).parameters())
            for name in ("unet", "text_encoder", "vae")
        },
        "wrong": [p.text for p, v in zip(prompts, judged.verdicts, strict=True) if not v.all_right],
    }
    return report, judged.images


def rates(verdicts: list[Verdict], prompts: list[Prompt]) -> dict[str, float]:
    """Share of right verdicts for each attribute; the relation over prompts with two shapes only."""
    pairs = [v for v, p in zip(verdicts, prompts, strict=True) if len(p.scene.shapes) == 2]
    shares = {
        "background": [v.background for v in verdicts],
        "colour": [right for v in verdicts for right in v.colours],
        "kind": [right for v in verdicts for right in v.kinds],
        "size": [right for v in verdicts for right in v.sizes],
        "count": [v.count for v in verdicts],
        "relation": [v.relation for v in pairs],
        "all_right": [v.all_right for v in verdicts],
    }
    return {name: round(sum(values) / max(1, len(values)), 4) for name, values in shares.items()}


def score_negative(pipeline: StableDiffusionPipeline, each: int) -> dict[str, float]:
    """How often a colour that the prompt leaves open comes up, without and with it as negative prompt."""
    prompts, unwanted = [], []
    for index, colour in enumerate(COLOURS):
        background = COLOURS[(index + 3) % len(COLOURS)]
        prompt = Prompt(f"a circle on a {background} background", Scene(()), (128, 128))
        prompts += [prompt] * each
        unwanted += [colour] * each
    with_it = generate(pipeline, prompts, negative=unwanted)
    without = generate(pipeline, prompts)

    def share(images: list[Image.Image]) -> float:
        seen = [any(r.colour == c for r in look(i)[1]) for i, c in zip(images, unwanted, strict=True)]
        return round(sum(seen) / len(seen), 4)

    return {"without": share(without), "with": share(with_it)}


def score_img2img(pipeline: StableDiffusionPipeline, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Ask for a drawn scene in other colours: share of right colours, and of layouts kept, for each strength."""
    img2img = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    img2img.set_progress_bar_config(disable=True)
    scenes = sample_scenes(2 * n, 128, 128, torch.Generator().manual_seed(seed + 99))
    pictures = ((render(scenes, 128, 128) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    start = [Image.fromarray(pictures[2 * i]) for i in range(n)]
    wanted = [to_scene(scenes, 2 * i + 1) for i in range(n)]
    rng = random.Random(seed)
    texts = [describe(full_template(scene.relation or "single", rng), scene, rng) for scene in wanted]
    results = {}
    for strength in STRENGTHS:
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        images = img2img(
            texts,
            image=start,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
        ).images
        verdicts = [judge(image, replace(scene, relation=None)) for image, scene in zip(images, wanted, strict=True)]
        kept = [same_layout(a, b) for a, b in zip(start, images, strict=True)]
        coloured = [v.background and all(v.colours) for v in verdicts]
        results[str(strength)] = {"colours": round(sum(coloured) / n, 4), "layout": round(sum(kept) / n, 4)}
    return results


def same_layout(before: Image.Image, after: Image.Image, tolerance: float = 0.06) -> bool:
    """Whether two images show the same kinds of shapes in the same places; tolerance in units of the shorter side."""
    old, new = look(before)[1], look(after)[1]
    room = tolerance * min(before.size)
    if len(old) != len(new):
        return False
    matches = (any(a.kind == b.kind and abs(a.x - b.x) <= room and abs(a.y - b.y) <= room for b in new) for a in old)
    return all(matches)


@torch.no_grad()
def largest_activation(pipeline: StableDiffusionPipeline, prompts: list[Prompt]) -> dict[str, float]:
    """Largest absolute output of any module in each part; float16 ends at 65504."""
    largest: dict[str, float] = {}

    def watch(name: str) -> list[torch.utils.hooks.RemovableHandle]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                largest[name] = max(largest.get(name, 0.0), round(float(output.abs().max()), 1))

        return [module.register_forward_hook(hook) for module in getattr(pipeline, name).modules()]

    handles = [handle for name in ("unet", "text_encoder", "vae") for handle in watch(name)]
    generate(pipeline, [replace(prompt, size=(128, 128)) for prompt in prompts], steps=10)
    for handle in handles:
        handle.remove()
    return largest


CARD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---

# tiny

A real latent diffusion model that is small enough to ship: {parameters} parameters, float16, in Stable Diffusion's
format. It draws one or two flat shapes on a flat background, and it is there for examples, tests and timings of the
machinery, not for pictures.

It was trained from scratch by `scripts/train_tiny.py` (seed {seed}, {unet_steps} UNet steps) on scenes that the script
draws. No other data went in.

- Shapes: circle, square, triangle, ring, star; small or large.
- Colours: red, green, blue, yellow, purple, cyan, white, black, for shapes and background.
- Places: to the left of, to the right of, above, below.
- Image sizes: multiples of 8 from 96 to 192 pixels, 128x128 by default.

Prompts are plain words: "a red circle on a blue background", "a small green star to the left of a large white ring,
black background", "a yellow square with a purple triangle above it". Other words are read and ignored.

| part | class | parameters |
|---|---|---|
| unet | `UNet2DConditionModel` (v-prediction) | {unet} |
| text_encoder | `CLIPTextModel` with an own vocabulary | {text_encoder} |
| vae | `AutoencoderKL`, factor 8, {vae_psnr_db} dB PSNR | {vae} |

## Scores

{prompts} prompts of combinations that were held out of training, in {sizes} image sizes, 50 PNDM steps, float32
arithmetic on these files (guidance scale 1: {unguided} prompts, 128x128). Judged by pixels (`tests/pixel_checker.py`).

| right | guidance scale 7.5 | guidance scale 1 |
|---|---|---|
{rates}

Negative prompt: a colour that the prompt leaves open comes up in {without:.0%} of the images, and in {with_it:.0%} when
it is the negative prompt.

Image to image, the same layout in other colours (50 steps, guidance scale 7.5):

| strength | colours right | layout kept |
|---|---|---|
{img2img}
"""


def write_model_card(folder: Path, report: dict[str, Any]) -> None:
    """Write the scores and how the model was made into the folder's README.md."""
    guided, unguided, parts = report["held_out"], report["guidance_1"], report["parameters"]
    text = CARD.format(
        **{key: report[key] for key in ("seed", "unet_steps", "vae_psnr_db", "prompts", "sizes", "unguided")},
        **{name: f"{count:,}" for name, count in parts.items()},
        parameters=f"{sum(parts.values()):,}",
        rates="\n".join(f"| {name} | {guided[name]:.1%} | {unguided[name]:.1%} |" for name in guided),
        without=report["negative_prompt"]["without"],
        with_it=report["negative_prompt"]["with"],
        img2img="\n".join(
            f"| {strength} | {row['colours']:.0%} | {row['layout']:.0%} |"
            for strength, row in report["img2img"].items()
        ),
    )
    (folder / "README.md").write_text(text.replace("all_right", "everything"), encoding="utf-8")
