"""The process that holds the models of one device: it makes the batches that a server sends, one after the other.

It reads frames from stdin in a thread of its own, so that a picture can be cancelled while it is made, and ends when
stdin does: its server is gone then. Knows frames and warm pipelines. Knows no HTTP and no queue.
"""

from __future__ import annotations

import io
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import Console, quiet_libraries
from sdtrt.common.errors import SdtrtError
from sdtrt.common.files import FULL
from sdtrt.serve.catalog import Catalog
from sdtrt.serve.frames import Frame, Pipe
from sdtrt.serve.requests import PictureRequest
from sdtrt.specs.serve import ServeSpec

if TYPE_CHECKING:
    from PIL import Image

    from sdtrt.pipeline.inputs.images import Metadata
    from sdtrt.pipeline.runs.jobs import Job as Drawn
    from sdtrt.serve.warm import Batch, WarmPipelines


class _Left(Exception):  # noqa: N818 (no failure: nobody wants any picture of the batch any more)
    """Ends a call between two of its steps."""


class _Telling(Console):
    """A console whose notes and steps go to the server."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__(quiet=True)
        self._pipe = pipe
        self.batch = 0  # what is being made
        self.on_step: Callable[[int, int], object] = lambda step, steps: None

    def note(self, text: str) -> None:
        """Say one line in the server's log."""
        self._pipe.write("log", batch=self.batch, level="info", text=text)

    def warn(self, text: str) -> None:
        """Say one line of warning in the server's log."""
        self._pipe.write("log", batch=self.batch, level="warning", text=text)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Callable[[], None]]:
        """Count steps."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.on_step(done, total)

        yield advance


class _Watching:
    """Hands a batch's pictures to the server, and ends its call where all of them were cancelled."""

    def __init__(self, pipe: Pipe, batch: int, units: Mapping[str, Drawn], cancelled: set[str]) -> None:
        self._pipe, self._batch, self._cancelled = pipe, batch, cancelled
        self._left = dict(units)  # those that are not saved yet
        self._current: list[str] = []

    def begin(self, jobs: tuple[Drawn, ...]) -> None:
        """Know which pictures the next call makes, row by row."""
        free = dict(self._left)
        self._current = []
        for job in jobs:
            name = next((name for name, own in free.items() if own == job), "")  # none: it was saved before a retry
            free.pop(name, None)
            self._current.append(name)

    def step(self, step: int, steps: int) -> None:
        """Say that a step is done. Raises `_Left` where nobody waits for the pictures."""
        if self._cancelled.issuperset(self._current):
            raise _Left
        self._pipe.write("step", batch=self._batch, units=self._current, step=step, steps=steps)

    def show(self, step: int, pictures: Sequence[Image.Image]) -> None:
        """Send small pictures of what is being made."""
        left = (name for name in self._current if name in self._left)  # of fewer at once, the first are saved already
        shown = [(name, one) for name, one in zip(left, pictures, strict=False) if name not in self._cancelled]
        blobs = [_jpeg(picture) for _, picture in shown]
        self._pipe.write("preview", blobs, batch=self._batch, units=[name for name, _ in shown], step=step)

    def save(self, image: Image.Image, metadata: Metadata, *, prompt: str, seed: int) -> Path:
        """Send a picture as the file that the commands write."""
        from sdtrt.pipeline.inputs.images import encode_image

        name = next((name for name in self._current if name in self._left), "")
        if self._left.pop(name, None) is not None and name not in self._cancelled:
            data = encode_image(image, "PNG", metadata)
            self._pipe.write("picture", [data], batch=self._batch, unit=name, width=image.width, height=image.height)
        return Path(f"{name}.png")


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _end() -> None:
    """End the process without the tidying of TensorRT's and CUDA's destructors, which crash at times."""
    os._exit(0)


class Worker:
    """Makes batches in the thread that runs it, and answers in another one what costs little.

    Args:
        left: is called where the server is gone.
    """

    def __init__(self, spec: ServeSpec, pipe: Pipe, left: Callable[[], object] = _end) -> None:
        from sdtrt.engines.directory import EngineDirectory
        from sdtrt.serve.warm import WarmPipelines

        self._pipe, self._console, self._server_left = pipe, _Telling(pipe), left
        self._catalog = Catalog.of(spec)
        directory = EngineDirectory(Path(spec.engine_dir), trust_others=spec.trust_engine_dir)
        self._warm: WarmPipelines = WarmPipelines(spec, self._catalog, directory, self._console)
        self._work: queue.Queue[Frame] = queue.Queue()
        self._cancelled: set[str] = set()
        self._tokenizers: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Serve until the server is gone."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._pipe.write("ready", models=[self._facts(name) for name in self._catalog.models], pid=os.getpid())
        tasks = {"make": self._make, "build": self._build}
        while True:
            frame = self._work.get()
            batch = self._console.batch = frame.data["batch"]
            with self._telling(batch, frame):
                tasks[frame.kind](frame)
            self._cancelled.clear()  # they are of this batch: the server sends the next one when this is done
            self._pipe.write("done", batch=batch, memory=_memory())

    def _facts(self, name: str) -> dict[str, Any]:
        """What is known of a model; what is wrong with it, where it can't be used."""
        try:
            return self._warm.facts(name)
        except SdtrtError as error:
            return {"name": name, "error": error.message, "hint": error.hint}

    def _listen(self) -> None:
        """Take what the server sends, until it is gone."""
        while (frame := self._pipe.read()) is not None:
            if frame.kind == "cancel":
                self._cancelled.update(frame.data["units"])
            elif frame.kind == "tokens":
                with self._telling(frame.data["batch"], frame):
                    self._count(frame)
            else:
                self._work.put(frame)
        self._server_left()

    @contextmanager
    def _telling(self, batch: int, frame: Frame) -> Iterator[None]:
        """Say what went wrong, in words; a bug with its traceback, for the log."""
        from sdtrt.serve.open_pipelines import MissingEngines

        try:
            yield
        except _Left:
            pass
        except MissingEngines:
            self._pipe.write("missing", batch=batch)
        except SdtrtError as error:
            self._refuse(batch, type(error).__name__, error.message, error.hint)
        except MemoryError:
            self._refuse(batch, "MemoryShortage", "there is too little memory for this", "ask for a smaller picture")
        except Exception as error:
            if isinstance(error, OSError) and error.errno in FULL:
                self._refuse(batch, "DiskFull", "the server's disk is full", "free some space there")
                return
            self._pipe.write("bug", batch=batch, text=traceback.format_exc())

    def _refuse(self, batch: int, kind: str, message: str, hint: str) -> None:
        self._pipe.write("error", batch=batch, error=kind, message=message, hint=hint)

    def _make(self, frame: Frame) -> None:
        batch = _batch(frame)
        units = dict(zip(frame.data["units"], batch.jobs, strict=True))
        if self._cancelled.issuperset(units):
            return
        watching = _Watching(self._pipe, frame.data["batch"], units, self._cancelled)
        self._console.on_step = watching.step
        self._warm.make(batch, watching)

    def _build(self, frame: Frame) -> None:
        self._warm.build(_batch(frame))

    def _count(self, frame: Frame) -> None:
        """Count tokens as a model's encoders do, without those that begin and end a text."""
        model = frame.data["model"]
        if model not in self._tokenizers:
            with quiet_libraries():
                self._tokenizers[model] = self._warm.tokenizers(model)
        first = next(iter(self._tokenizers[model].values()))
        counts = [len(first(text, truncation=False).input_ids) - 2 for text in frame.data["texts"]]
        self._pipe.write("tokens", batch=frame.data["batch"], counts=counts, limit=first.model_max_length - 2)


def _batch(frame: Frame) -> Batch:
    """The pictures that a frame asks for; what was uploaded is put into the working folder."""
    from sdtrt.pipeline.runs.jobs import Job as Drawn
    from sdtrt.serve.warm import Batch

    uploads = dict(zip(frame.data["uploads"], frame.blobs, strict=True))
    for name, data in uploads.items():
        Path(name).write_bytes(data)
    request = PictureRequest.from_json(frame.data["request"], uploads)
    return Batch(request, tuple(Drawn(*one) for one in frame.data["jobs"]))


def _memory() -> dict[str, int]:
    """The GPU's memory that PyTorch has here, in bytes; nothing on the CPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}


def serve() -> None:
    """Be a worker: the first frame on stdin says of which server, and in which folder to work."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the server, whose end is this process's
        signal.signal(number, signal.SIG_IGN)
    pipe = Pipe(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what libraries print is no frame
    hello = pipe.read()
    if hello is None:
        return
    os.chdir(hello.data["folder"])
    try:
        with quiet_libraries():
            import warnings

            warnings.simplefilter("ignore")  # diffusers' advice on a model's configuration files
            Worker(ServeSpec.from_json(hello.data["spec"]), pipe).run()
    except SdtrtError as error:
        pipe.write("error", batch=0, error=type(error).__name__, message=error.message, hint=error.hint)
    except Exception:
        pipe.write("bug", batch=0, text=traceback.format_exc())
    os._exit(1)
