"""A TensorRT, a `torch.cuda` and a PyCUDA that compute on the CPU: sessions are tested with them where there is no GPU.

The fake TensorRT has, class by class, only the names that the real bindings of the version have
(`data/trt_attributes.json`): code that asks for another one fails as it would there. Its engines read and write real
memory through the addresses that they are given: `out_sample = 2 * sample + timestep + mean(encoder_hidden_states)`.
"""

from __future__ import annotations

import ctypes
import enum
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from sdtrt.backends import cuda_graphs, graph_pool, scratch, unchanged
from sdtrt.backends.tensorrt import contexts
from sdtrt.backends.tensorrt import session as session_module
from sdtrt.backends.tensorrt.versions.libraries import Library, parse_version
from sdtrt.common import host
from sdtrt.specs.contract import unet_contract

FILE = Path(__file__).parent / "data" / "trt_attributes.json"  # written by scripts/read_trt_bindings.py
FACTS = {
    label: {
        "functions": facts["functions"].split(),
        "classes": {name: members.split() for name, members in facts["classes"].items()},
    }
    for label, facts in json.loads(FILE.read_text()).items()
}
DTYPES = {"timestep": "FLOAT"}  # all other tensors are fp16
NUMPY = {"HALF": np.float16, "FLOAT": np.float32}
CHANNELS, WIDTH = 4, 8
CONFIG = {"in_channels": CHANNELS, "out_channels": CHANNELS, "cross_attention_dim": WIDTH}
CONTRACT = unet_contract(CONFIG, "fp16")

capturing: list | None = None  # operations of the CUDA graph that is being captured


class Strict:
    """An object of one of TensorRT's classes: it has the names of its version, and no others."""

    CLASS = ""

    def __init__(self, module):
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_names", set(module._facts["classes"][type(self).CLASS]))

    def __getattribute__(self, name):
        if not name.startswith("_") and name not in object.__getattribute__(self, "_names"):
            raise AttributeError(f"{type(self).CLASS} has no {name} in {self._module._label}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name, value):
        if not name.startswith("_") and name not in self._names:
            raise AttributeError(f"{type(self).CLASS} has no {name} in {self._module._label}")
        object.__setattr__(self, name, value)


class Recorder(Strict):
    """Gives the values that it was made with, keeps those that are set, and notes the calls of all other methods."""

    def __init__(self, module, **values):
        super().__init__(module)
        self._calls = []
        self._values = values

    def __getattribute__(self, name):
        try:
            return super().__getattribute__(name)
        except AttributeError:
            if name.startswith("_") or name not in self._names:
                raise
        if name in self._values:
            return self._values[name]
        return lambda *arguments: self._calls.append((name, *arguments)) or True


def recorder(module, class_name, **values):
    """A recorder of one of the module's classes."""
    return type(class_name, (Recorder,), {"CLASS": class_name})(module, **values)


class Engine(Strict):
    CLASS = "ICudaEngine"
    device_memory_size = device_memory_size_v2 = 4096

    def __init__(self, module, kind, profiles):
        super().__init__(module)
        self._kind = KINDS[kind]
        self._profiles = profiles
        self._contexts = []

    @property
    def num_io_tensors(self):
        return len(self._kind.tensors)

    @property
    def num_optimization_profiles(self):
        return len(self._profiles)

    def get_tensor_name(self, index):
        return self._kind.tensors[index]

    def get_tensor_mode(self, name):
        return self._module.TensorIOMode.INPUT if name in self._kind.inputs else self._module.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return self._module.DataType[DTYPES.get(name, "HALF")]

    def get_tensor_profile_shape(self, name, index):
        return [tuple(shape) for shape in self._profiles[index][name]]

    def create_execution_context(self, strategy=None):
        needs_memory = strategy is not None and getattr(strategy, "name", "USER_MANAGED") == "USER_MANAGED"
        return self._context(needs_memory)

    def create_execution_context_without_device_memory(self):
        return self._context(True)

    def create_runtime_config(self):
        return recorder(self._module, "IRuntimeConfig")

    def create_engine_inspector(self):
        text = json.dumps({"Layers": [{"LayerType": "conv", "Outputs": [{"Format/Datatype": "Half"}]}]})
        return SimpleNamespace(get_engine_information=lambda form: text)

    def _context(self, needs_memory):
        context = Context(self, needs_memory)
        self._contexts.append(context)
        return context


class Context(Strict):
    CLASS = "IExecutionContext"

    def __init__(self, engine, needs_memory):
        super().__init__(engine._module)
        self._needs_memory = needs_memory
        self._needed = type(engine).device_memory_size
        self._captured = False
        self._shapes, self._addresses, self._streams = {}, {}, []
        self.engine = engine
        self.active_optimization_profile = 0

    def __setattr__(self, name, value):
        if name == "device_memory":
            self._needs_memory = False
        super().__setattr__(name, value)

    def set_device_memory(self, memory, size):
        assert size >= Engine.device_memory_size
        self.device_memory = memory

    def set_optimization_profile_async(self, index, stream):
        self._untouched()
        self.active_optimization_profile = index
        self._shapes = {}
        return True

    def set_input_shape(self, name, shape):
        self._untouched()
        low, _, high = self.engine._profiles[self.active_optimization_profile][name]
        fits = all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if fits:
            self._shapes[name] = tuple(shape)
        else:
            self._module._say("ERROR", f"{name} {shape} is outside profile {self.active_optimization_profile}")
        return fits

    def get_tensor_shape(self, name):
        return (self._shapes | self.engine._kind.shapes(self._shapes))[name]

    def set_tensor_address(self, name, address):
        self._untouched()
        self._addresses[name] = address
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        if self._module._fail:
            self._module._say("ERROR", self._module._fail)
            return False
        self._streams.append(stream)
        operation = self._operation(dict(self._shapes), dict(self._addresses))
        if capturing is None:
            operation()
        else:
            assert len(self._streams) > 1, "a context must have run once before it is captured"
            capturing.append(operation)
            self._captured = True
        return True

    def _untouched(self):
        assert not self._captured, "the context of a CUDA graph must not change"

    def _operation(self, shapes, addresses):
        assert not self._needs_memory, "the context has no scratch memory"

        scratch, needed = getattr(self, "device_memory", None), self._needed

        def compute():
            kind = self.engine._kind
            if scratch is not None:
                ctypes.memset(scratch, 0xFF, needed)  # an engine writes there as it likes
            given = {name: _memory(addresses[name], shapes[name], name) for name in kind.inputs}
            for name, array in kind.compute(**given).items():
                _memory(addresses[name], kind.shapes(shapes)[name], name)[...] = array

        return compute


def expected(sample, timestep, text):
    """What the fake engine computes."""
    extra = timestep[:, None] + text.mean(axis=(1, 2), dtype=np.float32)[:, None]
    return (2 * sample.astype(np.float32) + extra[:, :, None, None]).astype(np.float16)


def _whole(sample, timestep, encoder_hidden_states):
    return {"out_sample": expected(sample, timestep, encoder_hidden_states)}


def of_the_sample(shapes):
    """The result has the sample's shape."""
    return {"out_sample": shapes["sample"]}


@dataclass(frozen=True)
class Kind:
    """What an engine takes, the shapes of what it gives, and how that is computed."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Callable
    compute: Callable

    @property
    def tensors(self):
        return self.inputs + self.outputs


KINDS = {
    "whole": Kind(("sample", "timestep", "encoder_hidden_states"), ("out_sample",), of_the_sample, _whole),
}


def _memory(address, shape, name):
    kind = NUMPY[DTYPES.get(name, "HALF")]
    count = math.prod(shape)
    buffer = (ctypes.c_byte * (count * np.dtype(kind).itemsize)).from_address(address)
    return np.frombuffer(buffer, kind).reshape(shape)


def fake_tensorrt(label: str):
    """A module like the real one of a label in `trt_attributes.json` (`tensorrt 8.6.1`)."""
    facts = FACTS[label]
    module = SimpleNamespace(__name__=label, __version__=label.split()[1], _facts=facts, _label=label, _fail=None)
    for name, members in facts["classes"].items():
        constants = [member for member in members if member.isupper() or member[-1].isdigit()]
        if {"name", "value"} <= set(members):
            setattr(module, name, enum.IntEnum(name, constants, start=0))
    module.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    module._errors = []
    module._say = lambda severity, text: module._logger.log(SimpleNamespace(name=severity), text)
    if "IProgressMonitor" in facts["classes"]:
        module.IProgressMonitor = type("IProgressMonitor", (), {"__init__": lambda self: None})
    if "init_libnvinfer_plugins" in facts["functions"]:
        module._plugins = False
        module.init_libnvinfer_plugins = lambda logger, namespace: setattr(module, "_plugins", True)
        module.get_plugin_registry = lambda: SimpleNamespace(
            plugin_creator_list=[SimpleNamespace(name="GroupNorm")] if module._plugins else []
        )

    class Runtime(Strict):
        CLASS = "Runtime"
        engine_host_code_allowed = False

        def __init__(self, logger):
            super().__init__(module)
            module._logger = logger

        def deserialize_cuda_engine(self, data):
            assert getattr(module, "_plugins", True), "plugins must be registered before a plan is read"
            try:
                return Engine(module, *json.loads(bytes(data)[HEADER:]))
            except ValueError:
                module._say("ERROR", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization "
                            "assertion stdVersionRead == serializationVersion failed.)")  # fmt: skip
                return None

    module.Runtime = Runtime
    return module


def fake_library(label: str) -> Library:
    """A `Library` on `fake_tensorrt`."""
    return Library(fake_tensorrt(label), label.split()[0], parse_version(label.split()[1]))


def feeds(batch=2, height=16, width=16, tokens=77, seed=0):
    """What the fake engine takes, of a size in latents."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, CHANNELS, height, width, generator=generator).half(),
        "timestep": torch.rand(batch, generator=generator),
        "encoder_hidden_states": torch.randn(batch, tokens, WIDTH, generator=generator).half(),
    }


def wanted(arrays):
    """What the fake engine gives."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    return expected(arrays["sample"], arrays["timestep"], arrays["encoder_hidden_states"])


HEADER = 28


def profile_shapes(batch, height, width, tokens=(77, 77, 77)):
    """Input name → (smallest, optimal, largest) shape."""
    bounds = list(zip(batch, height, width, tokens, strict=True))
    return {
        "sample": [(b, CHANNELS, h, w) for b, h, w, _ in bounds],
        "timestep": [(b,) for b, *_ in bounds],
        "encoder_hidden_states": [(b, t, WIDTH) for b, _, _, t in bounds],
    }


def write_plan(path: Path, profiles, version=(8, 6, 1, 6), magic=b"ftrt", kind="whole") -> Path:
    """Write a plan that `fake_tensorrt` reads, with a header as real ones have it."""
    body = json.dumps((kind, profiles)).encode()
    head = magic + bytes(12) + (HEADER + len(body)).to_bytes(8, "little") + bytes(version)
    path.write_bytes(head + body)
    return path


class FakeCuda:
    """As much of `torch.cuda` as sessions use; streams do their work at once, and note who waited for whom."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, default_stream: bool = True):
        self.streams = 0 if default_stream else 1
        self.fail_capture = False
        cuda = self

        class Stream:
            def __init__(self, device=None):
                self.cuda_stream = cuda.streams
                cuda.streams += 1
                self.waited_for = []

            def wait_stream(self, other):
                self.waited_for.append(other)

            def wait_event(self, event):
                self.waited_for.append(event)

            def synchronize(self):
                pass

        class Event:
            def record(self, stream):
                self.stream = stream

            def synchronize(self):
                pass

        class CUDAGraph:
            def replay(self):
                for operation in self.operations:
                    operation()

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.current = Stream()

    def current_stream(self):
        return self.current

    def is_available(self):
        return True

    def mem_get_info(self):
        return 2**30, 2**31

    @contextmanager
    def device(self, device):
        yield

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode, pool=None):
        global capturing
        assert capture_error_mode == "thread_local"
        capturing = []
        try:
            yield
            if self.fail_capture:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            graph.operations = capturing
        finally:
            capturing = None


def fake_gpu(monkeypatch, cuda, *modules):
    """A GPU made of the CPU, for sessions on TensorRT; `modules` are further ones that ask `torch.cuda`."""
    monkeypatch.setattr(host, "gpus", lambda: (host.Gpu("Fake", (8, 9), 2**30),))
    for module in (session_module, contexts, cuda_graphs, graph_pool, scratch, *modules):
        monkeypatch.setattr(module, "torch", fake_torch(cuda))
    monkeypatch.setattr(unchanged, "HOST", "none")
    monkeypatch.setattr(contexts, "cuda_device", lambda device, library: torch.device("cpu", 0))
    return cuda


def need_scratch(monkeypatch, size):
    """Make engines need so much scratch memory."""
    monkeypatch.setattr(Engine, "device_memory_size", size)
    monkeypatch.setattr(Engine, "device_memory_size_v2", size)


def fake_torch(cuda: FakeCuda):
    """The real torch with another `torch.cuda`."""
    return SimpleNamespace(**{**vars(torch), "cuda": cuda})


class FakePyCuda:
    """As much of `pycuda.driver` as sessions use, on the CPU's memory. Everything but `init` needs the context."""

    class MemoryError(Exception):
        pass

    def __init__(self):
        driver = self
        self.active = 0
        self.freed = 0

        class Memory:
            def __init__(self, size):
                self.buffer = ctypes.create_string_buffer(size)

            def __int__(self):
                return ctypes.addressof(self.buffer)

            def free(self):
                assert driver.active
                driver.freed += 1

        class Stream:
            handle = 5

            def __init__(self):
                assert driver.active

            def synchronize(self):
                assert driver.active

        class Primary:
            def push(self):
                driver.active += 1

            def pop(self):
                driver.active -= 1

        self.Stream, self.mem_alloc = Stream, Memory
        self.Device = lambda index: SimpleNamespace(retain_primary_context=Primary)

    def init(self):
        pass

    def pagelocked_empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, target, source, stream):
        ctypes.memmove(int(target), source.ctypes.data, source.nbytes)

    def memcpy_dtoh_async(self, target, source, stream):
        ctypes.memmove(target.ctypes.data, int(source), target.nbytes)
