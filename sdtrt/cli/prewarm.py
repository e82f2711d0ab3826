"""Begin while Python imports what a GPU needs before a first step: CUDA's context, libraries, engines.

All of these wait without Python's lock. Nothing here can fail a command: what goes wrong is met again, and told, where
it is needed. The threads are no daemons: a process that ends early first waits for the driver, which must not be torn
down while it starts or loads; but no load begins once the process is ending.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

from sdtrt.backends import registry
from sdtrt.cli.weights_ahead import reads_weights
from sdtrt.common import host
from sdtrt.common.errors import SdtrtError
from sdtrt.engines.digests import in_background
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import Entry
from sdtrt.specs import AUTO, BackendName, GenerateSpec


def start_gpu(spec: GenerateSpec, directory: EngineDirectory) -> None:
    """Start the driver, TensorRT and a request's likely engines; import PyTorch, which must come before TensorRT.

    For `auto` that is TensorRT only where engines of it are there: else it builds for another one on most machines.
    """
    gpu = wake_gpu()
    import torch  # noqa: F401

    engines = _engines(directory)
    if reads_weights(spec, engines):
        start_libraries(gpu)
    from sdtrt.cli import likely_engines
    from sdtrt.pipeline.opening import preloaded

    preloaded.expect()
    atexit.register(preloaded.let_go)  # engines are freed before Python takes its modules apart
    wanted = {str(one.key.get("backend")) for one in engines} if spec.backend == AUTO else {spec.backend}
    import_tensorrt(spec.backend, gpu, partial(likely_engines.load_ahead, spec, directory), wanted)


def _engines(directory: EngineDirectory) -> list[Entry]:
    """The engines that are there; none where the directory can't be read."""
    with suppress(SdtrtError):
        return directory.entries("engine")
    return []


def wake_gpu() -> Future[bool]:
    """Start to initialise the driver and the first GPU's context in the background.

    The context is the one that PyTorch and TensorRT share (`host.open_primary_context`). Kernels are to be loaded when
    they are first run, unless the user says otherwise: the default since CUDA 12.2. PyTorch asks older drivers for it,
    but here they are asked for a context before PyTorch comes.

    Returns:
        Whether there is a GPU that was woken, once that is known.
    """
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    found: Future[bool] = Future()
    if not in_background(_open_context, found, name="sdtrt-cuda", daemon=False):
        found.set_result(False)  # nothing is looked up ahead: PyTorch finds the GPU itself
    return found


def start_libraries(gpu: Future[bool], device: str = "cuda") -> None:
    """Start to load what PyTorch, and packages of its compiler, multiply and convolve with; nothing without a GPU.

    cuBLAS and cuDNN are loaded and set up by the first call that needs them. What a thread has of them is another's
    after it.

    Args:
        gpu: of `wake_gpu`.
    """
    in_background(_compute_on, device, gpu, name="sdtrt-libraries", daemon=False)


def import_tensorrt(
    backend: BackendName,
    gpu: Future[bool],
    then: Callable[[], None] = lambda: None,
    wanted: Collection[BackendName] | None = None,
) -> None:
    """Start to import the TensorRT of a backend in the background; nothing happens without a GPU.

    PyTorch must be imported before: both may link a cuBLAS and a cuDNN of one name, and the first loaded serves both.

    Args:
        backend: that is asked for.
        gpu: of `wake_gpu`.
        then: what to do in the same thread once TensorRT is there.
        wanted: those that it may be of; None for any.
    """
    families = [
        module
        for candidate in registry.candidates(backend)
        if wanted is None or candidate.name in wanted
        for module in candidate.modules
        if importlib.util.find_spec(module) is not None
    ]
    if families:
        in_background(_import_on, families[0], gpu, then, name="sdtrt-tensorrt", daemon=False)


def _open_context(found: Future[bool]) -> None:
    try:
        found.set_result(host.open_primary_context())
    except BaseException as error:  # whoever waits for it must not wait forever
        found.set_exception(error)


def _compute_on(device: str, gpu: Future[bool]) -> None:
    """A small product and a small convolution, in the precision and layout of engines."""
    with suppress(Exception):
        if not gpu.result() or not threading.main_thread().is_alive():
            return
        import torch

        if device == "cuda" and not host.has_primary_context(torch.cuda.current_device()):
            return
        with torch.inference_mode():
            ones = torch.ones(16, 16, dtype=torch.float16, device=device)
            image = torch.ones(1, 16, 8, 8, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
            torch.nn.functional.linear(ones, ones, ones[0])
            torch.nn.functional.conv2d(image, image[:, :, :3, :3].expand(16, -1, -1, -1).contiguous(), padding=1)


def _import_on(name: str, gpu: Future[bool], then: Callable[[], None]) -> None:
    if gpu.exception() is None and gpu.result():
        with suppress(ImportError, OSError):
            importlib.import_module(name)
            then()


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large libraries without Python's search for reference cycles, which takes a third of the start.

    Modules make millions of objects that stay and hardly any garbage, and each search goes through all of them. What
    is there afterwards is frozen, so that later searches, between two denoising steps say, leave it out as well.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
