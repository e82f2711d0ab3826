"""`sdtrt serve`: its options, and what is missing where the extra is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

from typer import Option

from sdtrt.cli.options import BackendOptions, DirectoryOptions
from sdtrt.common.errors import UsageError
from sdtrt.engines.directory import in_home
from sdtrt.specs import DEFAULT_MODEL, ModelSpec, Precision
from sdtrt.specs.replicas import RaySpec
from sdtrt.specs.serve import DEFAULT_PORT, MIB, OWN_VAE, Limits, Listed, ServeSpec, parse_warm, split_name

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
PACKAGES |= {"python_multipart": "python-multipart"}


@dataclass(frozen=True)
class LimitOptions:
    """These options bound what one request may ask for."""

    max_body_mib: Annotated[int, Option(help="MiB of a request's body")] = Limits.body_bytes // MIB
    body_seconds: Annotated[float, Option(help="seconds in which a body must be there")] = Limits.body_s
    max_pixels: Annotated[int, Option(help="pixels of a picture")] = Limits.pixels
    max_steps: Annotated[int, Option(help="denoising steps")] = Limits.steps
    max_images: Annotated[int, Option(help="pictures of one request")] = Limits.images
    max_prompt: Annotated[int, Option(help="characters of a prompt")] = Limits.prompt
    max_waiting: Annotated[int, Option(help="pictures in the queue; further ones are refused with 429")] = (
        Limits.waiting
    )
    keep_mib: Annotated[int, Option(help="MiB of finished pictures that are kept to be fetched")] = (
        Limits.kept_bytes // MIB
    )

    def limits(self) -> Limits:
        """The limits."""
        return Limits(
            self.max_body_mib * MIB,
            self.body_seconds,
            self.max_pixels,
            self.max_steps,
            self.max_images,
            self.max_prompt,
            self.max_waiting,
            self.keep_mib * MIB,
        )


@dataclass(frozen=True)
class AccessOptions:
    """These options say who may ask."""

    host: Annotated[str, Option(help="where it listens; another one than this machine's own wants a key")] = "127.0.0.1"
    port: Annotated[int, Option(help="0 for any that is free")] = DEFAULT_PORT
    api_key: Annotated[
        str | None,
        Option(
            envvar="SDTRT_API_KEY", show_envvar=True, help="the key that each request must have (16 characters or more)"
        ),
    ] = None
    allow_host: Annotated[
        list[str] | None, Option(metavar="NAME", help="a name that requests may call this server; again for more")
    ] = None
    cors: Annotated[
        list[str] | None, Option(metavar="ORIGIN", help="pages that may use it, as https://example.org; again for more")
    ] = None


@dataclass(frozen=True)
class ListOptions:
    """These options list what else requests may name, by the names given here or those of the files."""

    controlnet: Annotated[
        list[str] | None,
        Option(
            "--controlnet", metavar="[NAME=]ID|FOLDER|FILE", help="a ControlNet that requests may name; again for more"
        ),
    ] = None
    ip_adapter: Annotated[
        list[str] | None, Option("--ip-adapter", metavar="[NAME=]FILE|FOLDER|ID", help="an IP-Adapter; again for more")
    ] = None
    t2i_adapter: Annotated[
        list[str] | None, Option("--t2i-adapter", metavar="[NAME=]ID|FOLDER", help="a T2I-Adapter; again for more")
    ] = None
    embedding: Annotated[
        list[str] | None,
        Option(
            "--embedding", metavar="[WORD=]FILE", help="a textual inversion, and its word in prompts; again for more"
        ),
    ] = None
    refiner: Annotated[
        list[str] | None, Option("--refiner", metavar="[NAME=]ID|FOLDER|FILE", help="a refiner of SDXL; again for more")
    ] = None
    upscaler: Annotated[
        list[str] | None,
        Option("--upscaler", metavar="[NAME=]FILE", help="a model that enlarges pictures (spandrel); again for more"),
    ] = None

    def listed(self) -> Listed:
        """The lists, whose paths mean the same in the folders where workers work."""
        return Listed(
            controlnets=_named(self.controlnet),
            ip_adapters=_named(self.ip_adapter),
            t2i_adapters=_named(self.t2i_adapter),
            embeddings=_named(self.embedding),
            refiners=_named(self.refiner),
            upscalers=_named(self.upscaler),
        )


@dataclass(frozen=True)
class RayOptions:
    """These options say that Ray's replicas make the pictures, and how many there are."""

    ray: Annotated[
        bool, Option("--ray", help="a replica on each GPU, by Ray: on this machine, or on all hosts of a cluster")
    ] = False
    ray_address: Annotated[
        str | None,
        Option(metavar="auto|HOST:PORT", help="a Ray cluster that runs already; else the server has one of its own"),
    ] = None
    replicas: Annotated[
        str | None, Option(metavar="N|MIN-MAX", help="Ray's replicas; as many as there are GPUs, without this")
    ] = None

    def spec(self, gpus: str | None) -> RaySpec | None:
        """The replicas that are asked for. Raises `UsageError` for options that exclude each other."""
        if self.ray:
            if gpus is not None:
                hint = "leave --gpus out: Ray gives each replica a GPU; CUDA_VISIBLE_DEVICES says which it may give"
                raise UsageError("--gpus is of a server without --ray", hint=hint)
            return RaySpec.of(self.ray_address, self.replicas)
        for name, value in (("--ray-address", self.ray_address), ("--replicas", self.replicas)):
            if value is not None:
                raise UsageError(f"{name} is of a server with --ray", hint=f"add --ray, or leave {name} out")
        return None


@dataclass(frozen=True)
class ServeOptions:
    """These options say what is served, and how."""

    model: Annotated[
        list[str] | None,
        Option("--model", "-m", help="as of txt2img; again for more: requests may name these and no other"),
    ] = None
    lora: Annotated[
        list[str] | None,
        Option("--lora", metavar="[NAME=]FILE|FOLDER|ID", help="a LoRA that requests may name; again for more"),
    ] = None
    variant: Annotated[str | None, Option(help="weight variant, such as fp16")] = None
    vae: Annotated[str | None, Option(metavar="FILE|FOLDER|ID", help="a VAE in the place of the models' own")] = None
    offline: Annotated[bool, Option("--offline", help="never ask the hub")] = False
    warm: Annotated[
        str | None, Option(metavar="WxH,...", help="sizes to make ready before it says that it is, as 512x512,768x512")
    ] = None
    no_build: Annotated[
        bool, Option("--no-build", help="refuse what has no engine, rather than build it meanwhile")
    ] = False
    batch_wait_ms: Annotated[float, Option(help="how long a picture waits for others that can share its call")] = 20.0
    max_batch: Annotated[int, Option(help="pictures of one call at most")] = 8
    keep: Annotated[int, Option(help="pipelines that stay open at once")] = 3
    preview: Annotated[
        str | None,
        Option(
            metavar=f"{OWN_VAE}|FILE|FOLDER|ID", help="a tiny VAE that shows pictures meanwhile; own: the model's VAE"
        ),
    ] = None
    gpus: Annotated[str | None, Option(metavar="N,...", help="GPUs, each with a process of its own")] = None
    grace: Annotated[float, Option(help="seconds, from SIGTERM on, to finish what was accepted")] = 30.0
    quiet: Annotated[bool, Option("--quiet", "-q", help="log warnings and errors alone")] = False

    def spec(
        self,
        lists: ListOptions,
        access: AccessOptions,
        limits: LimitOptions,
        ray: RayOptions,
        backend: BackendOptions,
        directory: DirectoryOptions,
    ) -> ServeSpec:
        """The server that is asked for."""
        backend.check()
        named = ModelSpec(
            variant=self.variant, offline=self.offline, vae=None if self.vae is None else _whole(self.vae)
        )
        return ServeSpec(
            models=tuple(replace(named, name=_whole(one)) for one in self.model or [DEFAULT_MODEL]),
            loras=_named(self.lora),
            listed=lists.listed(),
            host=access.host,
            port=access.port,
            api_key=access.api_key,
            backend=backend.backend,
            precision=cast("Precision | None", backend.precision),
            batch_wait_ms=self.batch_wait_ms,
            max_batch=self.max_batch,
            warm=parse_warm(self.warm),
            allow_build=not self.no_build,
            preview=self.preview if self.preview in (None, OWN_VAE) else _whole(self.preview),
            hosts=tuple(access.allow_host or ()),
            origins=tuple(access.cors or ()),
            open_models=self.keep,
            grace_s=self.grace,
            devices=_devices(self.gpus),
            ray=ray.spec(self.gpus),
            engine_dir=str(directory.directory().path.absolute()),
            trust_engine_dir=directory.trust_engine_dir,
            limits=limits.limits(),
        )


def _whole(name: str) -> str:
    """A name that means the same in the folders where workers work."""
    if name == DEFAULT_MODEL:
        return name
    path = in_home(Path(name))
    return str(path.absolute()) if path.exists() else name


def _named(given: Sequence[str] | None) -> tuple[str, ...]:
    """What was listed, with paths that mean the same in the folders where workers work."""
    pairs = map(split_name, given or ())
    return tuple(_whole(path) if name is None else f"{name}={_whole(path)}" for name, path in pairs)


def _devices(text: str | None) -> tuple[int, ...]:
    parts = [one.strip() for one in (text or "").split(",")] if text else []
    if not all(one.isdecimal() and len(one) <= 4 for one in parts):
        raise UsageError(f"--gpus takes numbers, got {text!r}", hint="as in --gpus 0,1")
    return tuple(map(int, parts))


def check_packages(*, ray: bool = False) -> None:
    """Raise `UsageError` where the extra is not installed, or Ray where it is asked for."""
    if ray and importlib.util.find_spec("ray") is None:
        raise UsageError(
            "sdtrt serve --ray needs ray, which is not installed",
            hint='pip install "sdtrt[serve,ray]", or pip install "ray[serve]"; --gpus 0,1 takes two GPUs without it',
        )
    lacking = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if lacking:
        raise UsageError(
            f"sdtrt serve needs {', '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed",
            hint=f'pip install "sdtrt[serve]", or pip install {" ".join(lacking)}',
        )
