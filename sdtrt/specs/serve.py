"""What `sdtrt serve` is asked for: models, limits, and who may ask. Knows no HTTP and opens no port."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sdtrt.common.errors import UsageError
from sdtrt.specs.build import ModelSpec
from sdtrt.specs.choices import AUTO, MAX_BATCH, MOST_STEPS, PRECISIONS, BackendName, Precision, check_choice
from sdtrt.specs.replicas import RaySpec
from sdtrt.specs.sizes import check_size
from sdtrt.specs.stages import parse_pair

MIB = 2**20
DEFAULT_PORT = 7860
SHORTEST_KEY = 16  # characters: what is shorter can be guessed over a network
MOST_PORT = 65535
OWN_VAE = "own"  # of `--preview`: the model's own decoder shows what is being made


@dataclass(frozen=True)
class Limits:
    """How much one request, and all that wait, may ask for.

    Args:
        body_bytes: of a request's body.
        body_s: seconds in which a body must be there, and a request's header.
        pixels: of one picture, and of each that is uploaded.
        steps: of one picture.
        images: of one request.
        prompt: characters of a prompt, and of a negative one.
        waiting: pictures in the queue.
        kept_bytes: of pictures that are done and kept to be fetched; the oldest go first.
    """

    body_bytes: int = 32 * MIB
    body_s: float = 30.0
    pixels: int = 2048 * 2048
    steps: int = 150
    images: int = 16
    prompt: int = 10_000
    waiting: int = 256
    kept_bytes: int = 512 * MIB

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"the limit {name} must be above 0, got {value}", hint="leave it at its default")
        if self.steps > MOST_STEPS:
            raise UsageError(f"no scheduler runs {self.steps} steps", hint=f"use --max-steps {MOST_STEPS} or less")


@dataclass(frozen=True)
class Listed:
    """What requests may name beside models and LoRAs: files, folders or hub ids, as `PATH` or `NAME=PATH`.

    Args:
        embeddings: textual inversions, whose names are their words in prompts.
        refiners: of SDXL, for the last steps.
        upscalers: files of models that enlarge pictures before a second pass.
    """

    controlnets: tuple[str, ...] = ()
    ip_adapters: tuple[str, ...] = ()
    t2i_adapters: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    refiners: tuple[str, ...] = ()
    upscalers: tuple[str, ...] = ()


def split_name(text: str) -> tuple[str | None, str]:
    """Read `NAME=PATH`, or a path alone, whose name is None. A path that is there may have a `=` of its own."""
    name, equals, path = text.partition("=")
    named = equals and name.strip() and path.strip() and not {"/", "\\"} & {*name} and not Path(text).exists()
    return (name.strip(), path.strip()) if named else (None, text)


@dataclass(frozen=True)
class ServeSpec:
    """A server.

    Args:
        models: that requests may name; the first one is the default.
        loras: that requests may name: files, folders or hub ids, as `PATH` or `NAME=PATH`.
        listed: what else they may name.
        host, port: where it listens. Another host than this machine's own loopback wants an `api_key`.
        api_key: that each request must have.
        batch_wait_ms: how long a picture waits at most for others that can share its call.
        max_batch: pictures of one call, at most.
        warm: sizes (width, height) that are made ready before the server says that it is.
        allow_build: build missing engines in the background.
        preview: a tiny VAE, or `OWN_VAE`, that shows what is being made.
        hosts: names, beside loopback's, that requests may call this server.
        origins: of pages elsewhere that may use it (CORS); `*` for all.
        open_models: pipelines that stay open at once, a model's tasks counted singly.
        grace_s: seconds, from SIGTERM on, in which what was accepted is finished.
        devices: GPUs, by number, each with a process of its own; none for the one that the process sees.
        ray: the replicas that make the pictures; None for processes on this machine.
        engine_dir: the engine directory, a path.
    """

    models: tuple[ModelSpec, ...] = (ModelSpec(),)
    loras: tuple[str, ...] = ()
    listed: Listed = Listed()
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key: str | None = None
    backend: BackendName = AUTO
    precision: Precision | None = None
    batch_wait_ms: float = 20.0
    max_batch: int = 8
    warm: tuple[tuple[int, int], ...] = ()
    allow_build: bool = True
    preview: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    open_models: int = 3
    grace_s: float = 30.0
    devices: tuple[int, ...] = ()
    ray: RaySpec | None = None
    engine_dir: str = ""
    trust_engine_dir: bool = False
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("a server without a model was asked for", hint="use --model tiny")
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        if not 0 <= self.port <= MOST_PORT:
            raise UsageError(f"port must be from 0 to {MOST_PORT}, got {self.port}", hint=f"use --port {DEFAULT_PORT}")
        self._check_key()
        self._check_numbers()
        for width, height in self.warm:
            check_size("width", width)
            check_size("height", height)
            if width * height > self.limits.pixels:
                raise UsageError(
                    f"--warm {width}x{height} is more than the {self.limits.pixels} pixels that a request may have",
                    hint="raise --max-pixels",
                )

    def _check_key(self) -> None:
        if not self.is_local and self.api_key is None:
            raise UsageError(
                f"{self.host} lets other machines in, and no key keeps strangers out",
                hint="set SDTRT_API_KEY (openssl rand -hex 32 makes one), or use --host 127.0.0.1",
            )
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise UsageError("an API key has printable ASCII characters alone", hint="as openssl rand -hex 32 makes it")
        if self.api_key is not None and len(self.api_key) < SHORTEST_KEY:
            raise UsageError(
                f"the API key has {len(self.api_key)} characters, which can be guessed",
                hint=f"use {SHORTEST_KEY} or more, as openssl rand -hex 32 makes it",
            )

    def _check_numbers(self) -> None:
        if not (math.isfinite(self.batch_wait_ms) and 0 <= self.batch_wait_ms <= 10_000):
            raise UsageError(
                f"batch-wait-ms must be from 0 to 10000, got {self.batch_wait_ms}", hint="use --batch-wait-ms 20"
            )
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise UsageError(f"max-batch must be at least 1, got {self.max_batch}", hint="use --max-batch 8")
        if self.open_models < 1:
            raise UsageError(f"keep must be at least 1, got {self.open_models}", hint="use --keep 3")
        if not (math.isfinite(self.grace_s) and self.grace_s >= 0):
            raise UsageError(f"grace must be a number of seconds, got {self.grace_s}", hint="use --grace 30")
        if len(set(self.devices)) != len(self.devices) or any(one < 0 for one in self.devices):
            raise UsageError(f"each GPU is named once, got {self.devices}", hint="as in --gpus 0,1")

    @property
    def is_local(self) -> bool:
        """Whether nobody but this machine reaches it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def to_json(self) -> dict[str, Any]:
        """Plain data for a worker, without the key and the cluster, which it has no use for."""
        return {**asdict(self), "api_key": None, "host": "127.0.0.1", "ray": None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        models = tuple(map(ModelSpec.from_json, data["models"]))
        warm = tuple((width, height) for width, height in data["warm"])
        listed = Listed(**{name: tuple(value) for name, value in data["listed"].items()})
        fields |= {"models": models, "warm": warm, "limits": Limits(**data["limits"]), "listed": listed}
        return cls(**fields)


def parse_warm(text: str | None) -> tuple[tuple[int, int], ...]:
    """Read `WIDTHxHEIGHT,...`. Raises `UsageError` for anything else."""
    pairs = [parse_pair("warm", one, "512x512,768x512") for one in (text or "").split(",") if one.strip()]
    return tuple(pair for pair in pairs if pair is not None)
