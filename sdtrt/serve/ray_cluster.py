"""The Ray cluster that a server's replicas are in: one of the server's own, or one that runs already.

Its own cluster is for this machine alone. It listens on loopback, with a token that nobody else has, in a folder that
nobody else reads, without a dashboard, and without usage statistics; it goes with the server. Of a cluster that runs
already all of this is its owner's to say. Knows Ray; what replicas do is known to them and to their makers.
"""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

from sdtrt.common import interrupts
from sdtrt.common.errors import SdtrtError, UsageError
from sdtrt.serve.log import Log
from sdtrt.serve.maker import Place
from sdtrt.specs.replicas import RaySpec
from sdtrt.specs.serve import MIB, ServeSpec

APPLICATION, DEPLOYMENT = "sdtrt", "Pictures"
OBJECT_STORE_BYTES = 256 * MIB  # for pictures and uploads on their way
LONGEST_FOLDER = 40  # characters; Ray's sockets in it have names of 66 more, and a socket's name 107 at most
GONE_S = 10.0  # from the end of Ray's processes to that of theirs
HEALTH_S = 2.0  # between two looks at a replica
SHUTDOWN_S = 10.0  # that a replica has to end its batch when it is one too many
BESIDE = 8  # requests to a replica that makes a batch: cancels, token counts, builds
# What Ray is told by its environment, before it is imported: nothing is sent home; no other host is a part of the
# cluster (this variable is named for other systems, and without it Ray listens on all interfaces); who has not the
# token does nothing.
PRIVATE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
_COLOURS = re.compile(r"\x1b\[[\d;]*m")


@contextmanager
def replicas(spec: ServeSpec, wanted: RaySpec, log: Log) -> Iterator[Sequence[Place]]:
    """The places of a server whose pictures replicas make; they are ready later.

    Raises:
        UsageError: where there is no such cluster, or it has no room.
    """
    with _printing_to(log), _own(wanted.most) if wanted.address is None else _connected(wanted.address):
        import ray
        from ray import serve

        from sdtrt.serve.ray_maker import ReplicaMaker

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        fewest, most = _numbers(wanted, gpus)
        log.info("ray", address=ray.get_runtime_context().gcs_address, replicas=[fewest, most], gpus=gpus)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})
        target = serve.RunTarget(deployment(spec, fewest, most, 1 if gpus else 0), APPLICATION, route_prefix=None)
        (pictures,) = serve.run_many([target], wait_for_applications_running=False)
        try:
            yield [partial(ReplicaMaker, pictures) for _ in range(most)]
        finally:
            if wanted.address is not None:
                serve.delete(APPLICATION)


def deployment(spec: ServeSpec, fewest: int, most: int, gpus: int) -> Any:
    """The replicas as Ray deploys them: one batch at a time each, and more of them where batches wait.

    Args:
        fewest, most: replicas.
        gpus: that each has; 0 for a processor.
    """
    from ray import serve

    from sdtrt.serve.ray_replica import Pictures

    options = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1}
    return serve.deployment(
        Pictures,
        name=DEPLOYMENT,
        ray_actor_options=options,
        max_ongoing_requests=most + BESIDE,
        request_router_config={"request_router_class": "sdtrt.serve.ray_maker:Idlest"},
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": 1},
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
    ).bind(spec.to_json())


def _numbers(wanted: RaySpec, gpus: int) -> tuple[int, int]:
    """How many replicas there are at least, and at most."""
    if wanted.fewest is None or wanted.most is None:
        return max(1, gpus), max(1, gpus)
    if gpus and wanted.address is None and wanted.most > gpus:
        raise UsageError(f"--replicas asks for {wanted.most}, and {gpus} GPUs are here", hint=f"use --replicas {gpus}")
    return wanted.fewest, wanted.most


@contextmanager
def _own(most: int | None) -> Iterator[None]:
    """A cluster on this machine, with room for so many replicas; it ends with the block, its folder too."""
    folder = Path(tempfile.mkdtemp(prefix="sdtrt-"))  # nobody else reads it, though Ray opens its own folders to all
    private = {**PRIVATE, "RAY_AUTH_TOKEN": secrets.token_hex(32), "TMPDIR": str(folder)}
    with _environment(private), interrupts.undoing(partial(_remove, folder)):
        try:
            if len(str(folder)) > LONGEST_FOLDER:
                hint = "use a shorter one: TMPDIR=/tmp"
                raise UsageError(f"Ray's sockets have no room in {folder.parent}: its name is too long", hint=hint)
            sizes = {"num_cpus": max(most or 1, os.cpu_count() or 1), "object_store_memory": OBJECT_STORE_BYTES}
            with _initialised(address="local", include_dashboard=False, _temp_dir=f"{folder}/r", **sizes):
                yield
        finally:
            _remove(folder)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A cluster that runs already, whose token comes from Ray's own variables. Raises `UsageError`."""
    with _initialised(address=address):
        yield


@contextmanager
def _initialised(**options: Any) -> Iterator[None]:
    """Ray, until the block ends. Its signal handler is taken out again: the server has its own.

    Raises:
        UsageError: where there is no such cluster.
        SdtrtError: where none starts.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        words = next(iter(str(error).splitlines()), type(error).__name__)
        if options["address"] != "local":
            hint = "see that it runs (ray status), or leave --ray-address out; its token is in RAY_AUTH_TOKEN"
            raise UsageError(f"can't join the Ray cluster {options['address']}: {words}", hint=hint) from error
        raise SdtrtError(f"Ray doesn't start: {words}", hint="without --ray, --gpus 0,1 takes two GPUs") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


class _Lines(io.TextIOBase):
    """Writes what is printed to a server's log."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def write(self, text: str) -> int:
        """Log what is no empty line."""
        if said := _COLOURS.sub("", text).strip():
            self._log.warn("ray says", text=said)
        return len(text)


@contextmanager
def _printing_to(log: Log) -> Iterator[None]:
    """Keep stdout to the server: Ray prints there when a process of the cluster ends."""
    with redirect_stdout(_Lines(log)):
        yield


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables of this process and of those that it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    tempfile.tempdir = None  # that it is read again
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        tempfile.tempdir = None


def _remove(folder: Path) -> None:
    """End what is left of the cluster, and remove its folder.

    Ray's own processes end first, those that they started a little later; a signal that was sent to all of them at once
    has Ray start some anew, which nobody ends.
    """
    until = time.monotonic() + GONE_S
    while ((left := _users_of(folder)) or folder.exists()) and time.monotonic() < until:
        for pid in left:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _users_of(folder: Path) -> list[int]:
    """The processes that have files in a folder open; those of other users are not seen."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(one.readlink().is_relative_to(folder) for one in (process / "fd").iterdir()):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]
