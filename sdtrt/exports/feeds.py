"""Seeded inputs for a component, of the size and spread that it sees in use."""

from __future__ import annotations

import torch

from sdtrt.specs import Sizes
from sdtrt.specs.contract import GUIDANCE_EMBEDDING, REFINER_TIME_IDS, Contract
from sdtrt.specs.groups import FREE_U

FREE_U_NUMBERS = (0.9, 0.2, 1.2, 1.4)  # what FreeU's authors advise for Stable Diffusion 1.4
AESTHETIC_SCORE = 6.0  # what diffusers tells SDXL's refiner unless asked

LATENT_DEVIATION = 1 / 0.18215  # Stable Diffusion's VAE; its latents are scaled by that to a deviation of 1


def seeded_feeds(contract: Contract, sizes: Sizes, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of the kind that a pipeline gives, the same for the same seed, on the CPU.

    Noise; timesteps over the whole range, some fractional; SDXL's `time_ids` of an uncropped image of this size;
    latents as far apart as Stable Diffusion's VAE has been trained with; pixels; a guidance scale's embedding, from -1
    to 1; token ids that end as prompts do.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    bounds = {spec.name: spec.below for spec in contract.inputs}
    for name, shape in contract.input_shapes(sizes).items():
        if name == "timestep":
            tensors[name] = torch.linspace(999, 0.75, shape[0]) if shape[0] > 1 else torch.tensor([500.25])
        elif name == "time_ids":
            row: list[float] = [sizes.height, sizes.width, 0, 0, sizes.height, sizes.width]
            if shape[1] == REFINER_TIME_IDS:
                row[4:] = [AESTHETIC_SCORE]
            tensors[name] = torch.tensor(row, dtype=torch.float32).expand(shape).contiguous()
        elif name == FREE_U:
            tensors[name] = torch.tensor(FREE_U_NUMBERS)
        elif (below := bounds[name]) is not None:
            tensors[name] = _token_ids(shape, below, generator)
        elif name in ("image", GUIDANCE_EMBEDDING):
            tensors[name] = 2 * torch.rand(shape, generator=generator) - 1
        else:
            tensors[name] = torch.randn(shape, generator=generator) * (LATENT_DEVIATION if name == "latents" else 1)
    return {spec.name: tensors[spec.name].to(getattr(torch, spec.dtype)) for spec in contract.inputs}


def _token_ids(shape: tuple[int, ...], below: int, generator: torch.Generator) -> torch.Tensor:
    """Ids `[B,S]` of prompts of all lengths: padded, as in CLIP, with the end token, which is the last of all."""
    rows, tokens = shape
    ids = torch.randint(0, below - 1, shape, generator=generator)
    lengths = torch.randint(1, tokens, (rows, 1), generator=generator)
    return ids.where(torch.arange(tokens) < lengths, torch.tensor(below - 1))
