"""The server as an application of Ray Serve, for clusters that Ray's own tools deploy to (`serve run`, KubeRay).

Ray's proxies are in front of the front door, which is one replica without a GPU: it has the queue, the jobs and the
interfaces of `sdtrt serve`, and hands batches to the replicas that make pictures. Knows Ray Serve's arguments.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from sdtrt.common.errors import UsageError
from sdtrt.serve import application as http
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.dispatch import Dispatcher
from sdtrt.serve.log import Log
from sdtrt.serve.ray_cluster import deployment
from sdtrt.serve.ray_maker import ReplicaMaker
from sdtrt.specs import ModelSpec
from sdtrt.specs.choices import AUTO, PRECISIONS, check_choice
from sdtrt.specs.replicas import RaySpec
from sdtrt.specs.serve import ServeSpec, parse_warm

KEY_VARIABLE = "SDTRT_API_KEY"  # of the front door's own environment: arguments are readable to all of the cluster
REQUESTS = 512  # that the front door has open at once
NO_FOLDER = Path(os.devnull)  # for workers of its own, which it has not


class Arguments(BaseModel):
    """The arguments of the application; each is the option of `sdtrt serve` of its name.

    `engine_dir` is a folder that all hosts share, as models and LoRAs that are files are.
    """

    model_config = ConfigDict(extra="forbid")
    model: list[str] = ["tiny"]
    lora: list[str] = []
    engine_dir: str
    replicas: str = "1"
    gpus: int = 1  # of each replica
    backend: str = AUTO
    precision: str | None = None
    warm: str | None = None
    no_build: bool = False
    batch_wait_ms: float = ServeSpec.batch_wait_ms
    max_batch: int = ServeSpec.max_batch
    keep: int = ServeSpec.open_models
    offline: bool = False
    allow_host: list[str] = []

    def spec(self) -> ServeSpec:
        """The server. Raises `UsageError`."""
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        if not Path(self.engine_dir).is_absolute():
            raise UsageError(f"engine_dir is no whole path: {self.engine_dir!r}", hint="as in /shared/engines")
        return ServeSpec(
            models=tuple(ModelSpec(name, offline=self.offline) for name in self.model),
            loras=tuple(self.lora),
            backend=self.backend,
            precision=self.precision,  # type: ignore[arg-type]  # it is checked here
            warm=parse_warm(self.warm),
            allow_build=not self.no_build,
            batch_wait_ms=self.batch_wait_ms,
            max_batch=self.max_batch,
            open_models=self.keep,
            hosts=tuple(self.allow_host),
            engine_dir=self.engine_dir,
            ray=RaySpec.of("auto", self.replicas),
        )


class FrontDoor:
    """The interfaces, the queue and the jobs.

    Without a key in its environment it answers to this machine's own names alone, as `sdtrt serve` does.
    """

    def __init__(self, spec: Mapping[str, Any], hosts: tuple[str, ...], most: int, pictures: DeploymentHandle) -> None:
        key = os.environ.get(KEY_VARIABLE)
        whole = replace(ServeSpec.from_json(spec), hosts=hosts, api_key=key, host="0.0.0.0" if key else "127.0.0.1")
        places = [partial(ReplicaMaker, pictures) for _ in range(most)]
        self._dispatcher = Dispatcher(whole, Catalog.of(whole), NO_FOLDER, Log(), places)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application; its life is the replica's."""
        return http.build(self._dispatcher)


def application(arguments: Mapping[str, Any]) -> Any:
    """What `import_path: sdtrt.serve.ray_app:application` deploys. Raises `UsageError`."""
    asked = Arguments(**arguments)
    spec = asked.spec()
    assert spec.ray is not None
    fewest, most = spec.ray.fewest or 1, spec.ray.most or 1
    options = {"num_cpus": 0}
    front = serve.deployment(
        serve.ingress()(FrontDoor), name="FrontDoor", ray_actor_options=options, max_ongoing_requests=REQUESTS
    )
    return front.bind(spec.to_json(), spec.hosts, most, deployment(spec, fewest, most, asked.gpus))
