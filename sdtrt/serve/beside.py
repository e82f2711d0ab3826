"""What a request has beside its model: ControlNets, adapters, a refiner, a second pass; by names of the server's lists.

Knows what each is called, and the files that its picture is uploaded as. Reads none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from sdtrt.common.errors import UsageError
from sdtrt.serve.catalog import Catalog
from sdtrt.specs import (
    DEFAULT_REFINER_START,
    LANCZOS,
    LATENT,
    AdapterSpec,
    ControlSpec,
    EmbeddingSpec,
    ImagePromptSpec,
    ModelSpec,
    RefinerSpec,
    UpscaleSpec,
)
from sdtrt.specs.serve import Limits

CONTROL, IP_IMAGE, T2I_IMAGE = "control_", "ip_image_", "t2i_image_"  # what uploads are called, counted from 0
MOST_OF_A_KIND = 8  # of one request: more is a typo


@dataclass(frozen=True)
class Control:
    """A ControlNet; its picture is uploaded. Fields are those of `ControlSpec`."""

    name: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    preprocessor: str | None = None
    mode: int | None = None


@dataclass(frozen=True)
class Scaled:
    """An adapter and how much it counts; its picture is uploaded."""

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Beside:
    """All of it for one request; as it stands, there is nothing.

    Args:
        embeddings: textual inversions, whose names are their words in prompts.
        refiner: a model of SDXL for the last steps, from `refiner_start` of the noise schedule on.
        upscale: a second pass, whose upscaler is `latent`, `lanczos` or a name of the server's list.
    """

    controls: tuple[Control, ...] = ()
    ip_adapters: tuple[Scaled, ...] = ()
    t2i_adapters: tuple[Scaled, ...] = ()
    embeddings: tuple[str, ...] = ()
    refiner: str | None = None
    refiner_start: float = DEFAULT_REFINER_START
    upscale: UpscaleSpec | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        read: dict[str, Any] = {
            "controls": tuple(Control(**one) for one in data["controls"]),
            "ip_adapters": tuple(Scaled(**one) for one in data["ip_adapters"]),
            "t2i_adapters": tuple(Scaled(**one) for one in data["t2i_adapters"]),
            "embeddings": tuple(data["embeddings"]),
            "upscale": None if data["upscale"] is None else UpscaleSpec(**data["upscale"]),
        }
        return cls(**{**data, **read})

    def check(self, limits: Limits, height: int | None, width: int | None, uploads: Mapping[str, bytes]) -> None:
        """Raise `UsageError` for more than a server makes, and for what has no picture."""
        named = {
            CONTROL: [one.name for one in self.controls],
            IP_IMAGE: [one.name for one in self.ip_adapters],
            T2I_IMAGE: [one.name for one in self.t2i_adapters],
        }
        for start, names in {**named, "embedding_": list(self.embeddings)}.items():
            if len(names) > MOST_OF_A_KIND:
                what = start.strip("_").replace("_image", "_adapter")
                raise UsageError(f"at most {MOST_OF_A_KIND} of {what} work at once, got {len(names)}", hint="use fewer")
        for start, names in named.items():
            for number, name in enumerate(names):
                if f"{start}{number}" not in uploads:
                    raise UsageError(f"{name} has no image to go by", hint="send one with it, as base64")
        if self.upscale is not None:
            _check_upscale(self.upscale, limits, height, width)

    def into(self, model: ModelSpec, catalog: Catalog) -> ModelSpec:
        """The model with the IP-Adapters. Raises `UsageError` for a name that is not listed."""
        return replace(model, ip_adapters=tuple(catalog.path("ip_adapter", one.name) for one in self.ip_adapters))

    def fields(self, model: ModelSpec, catalog: Catalog) -> dict[str, Any]:
        """The fields of a `GenerateSpec`; pictures are files in the working folder. Raises `UsageError`."""
        return {
            "controls": tuple(
                ControlSpec(
                    catalog.path("controlnet", one.name),
                    Path(f"{CONTROL}{number}"),
                    one.scale,
                    one.start,
                    one.end,
                    one.preprocessor,  # type: ignore[arg-type]  # it is checked there
                    one.mode,
                )
                for number, one in enumerate(self.controls)
            ),
            "ip_images": tuple(
                ImagePromptSpec(Path(f"{IP_IMAGE}{number}"), one.scale) for number, one in enumerate(self.ip_adapters)
            ),
            "adapters": tuple(
                AdapterSpec(catalog.path("t2i_adapter", one.name), Path(f"{T2I_IMAGE}{number}"), one.scale)
                for number, one in enumerate(self.t2i_adapters)
            ),
            "embeddings": tuple(EmbeddingSpec(catalog.path("embedding", name), name) for name in self.embeddings),
            "refiner": self._refiner(model, catalog),
            "upscale": self._upscale(catalog),
        }

    def _refiner(self, model: ModelSpec, catalog: Catalog) -> RefinerSpec | None:
        """The refiner: looked for as its model is, and with the same VAE, as the commands do."""
        if self.refiner is None:
            return None
        path = catalog.path("refiner", self.refiner)
        named = ModelSpec(path, variant=model.variant, offline=model.offline, vae=model.vae)
        return RefinerSpec(named, self.refiner_start)

    def _upscale(self, catalog: Catalog) -> UpscaleSpec | None:
        if self.upscale is None or self.upscale.upscaler in (LATENT, LANCZOS):
            return self.upscale
        return replace(self.upscale, upscaler=catalog.path("upscaler", self.upscale.upscaler))


def _check_upscale(upscale: UpscaleSpec, limits: Limits, height: int | None, width: int | None) -> None:
    if upscale.steps is not None and upscale.steps > limits.steps:
        raise UsageError(f"a second pass has at most {limits.steps} steps here, got {upscale.steps}", hint="use fewer")
    if height is not None and width is not None:
        check_enlarged(upscale.size(height, width), limits)


def check_enlarged(size: tuple[int, int], limits: Limits) -> None:
    """Raise `UsageError` where a second pass makes more pixels than a request may have; `size` is (height, width)."""
    if size[0] * size[1] > limits.pixels:
        raise UsageError(
            f"the second pass makes {size[1]}x{size[0]}, more than the {limits.pixels} pixels of a picture here",
            hint="enlarge it less",
        )
