"""A watch over what the parts of a pipeline give each other: values that are not finite end in an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from sdtrt.models.components import TEXT_ENCODERS
from sdtrt.pipeline.parts.hooks import hooked


class Finite:
    """Watches what the parts of a pipeline give each other: the UNet's inputs and outputs, and the VAE's decoding.

    What the UNet takes is the work of other parts, which are named: each text encoder's states (SDXL's two stand side
    by side), the second one's pooled text, the VAE encoder's latents.

    It asks the device nothing until the end: no step waits for it. (Pixels would be too late: their clamping turns
    infinities into white and black.)
    """

    def __init__(self) -> None:
        self.flags: list[torch.Tensor] = []
        self.sources: list[str] = []
        self.widths: dict[str, int] = {}  # of each text encoder's states
        self.step = 0

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        """Note what the parts of a pipeline give, for the time of a `with`."""
        encoders = {name: getattr(pipe, name, None) for name in TEXT_ENCODERS}
        self.widths = {name: one.config.hidden_size for name, one in encoders.items() if one is not None}
        with hooked(pipe.unet, self._add_step), hooked(pipe.vae.decoder, self._add_image):
            yield

    def _add_image(self, decoder: torch.nn.Module, args: object, kwargs: object, output: Any) -> None:
        """Note one call of the VAE's decoder."""
        self._add("vae_decoder", output)

    def _add_step(self, unet: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note one call of the UNet: its output, and before the first step what other parts have made for it."""
        if self.step == 0:
            states = kwargs["encoder_hidden_states"].split([*self.widths.values()], dim=-1)
            for name, own in zip(self.widths, states, strict=True):
                self._add(name, own)
            if (pooled := (kwargs.get("added_cond_kwargs") or {}).get("text_embeds")) is not None:
                self._add("text_encoder_2", pooled)
            self._add("vae_encoder", args[0])
        self.step += 1
        self._add(f"unet at denoising step {self.step}", output[0])

    def _add(self, source: str, tensor: torch.Tensor) -> None:
        self.sources.append(source)
        self.flags.append(torch.isfinite(tensor).all())

    def first_bad(self) -> str | None:
        """The first source of values that were not finite."""
        finite = torch.stack(self.flags).tolist() if self.flags else []
        return self.sources[finite.index(False)] if False in finite else None
