"""Import diffusers without what makes no picture, which takes half of the time; what is used after all comes then.

That is PyTorch's compiler, of which libraries take decorators; every model that diffusers has, as its packages import
all their modules; SciPy, of which losses and rare schedulers call a function; peft, whose classes LoRAs have; what
computes on several machines. Each is left out where one module imports it, by that module's name: where a version of a
library has no such module, or does otherwise, it is imported as usual. It is for commands that compile nothing in their
own process, whose decorators count for nothing.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
DECORATORS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})  # of the compiler's
DECORATED = ("transformers.integrations.deepgemm", "transformers.integrations.finegrained_fp8")
REEXPORTING = (
    "diffusers.hooks",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
SCHEDULERS = "diffusers.schedulers."
LATE = {  # who takes what is called in functions only, and from which modules
    SCHEDULERS: ("scipy.integrate", "scipy.stats"),
    "diffusers.loaders.lora_base": ("peft.tuners.tuners_utils",),
    "transformers.loss.loss_utils": ("scipy.optimize",),
    "transformers.masking_utils": (f"{COMPILER}._trace_wrapped_higher_order_op",),
}

Run = Callable[[ModuleType], None]  # executes a module


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within, diffusers and transformers are imported without what they don't need at once. Imports PyTorch itself."""
    import torch

    finder, names = _Finder(), vars(torch.compiler)
    before = {name: names[name] for name in DECORATORS & names.keys()}
    sys.meta_path.insert(0, finder)
    names.update(dict.fromkeys(before, _as_it_is))  # the real ones import the compiler, to tell it of a function
    try:
        yield
    finally:
        names.update(before)
        sys.meta_path.remove(finder)


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Stands for a decorator that changes nothing of what is computed, with arguments and without."""
    return _as_it_is if function is None else function


class _Finder:
    """Finds modules as Python does; some of them are executed in another way."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a module that is treated here; None for all others."""
        execute = _EXECUTE.get(SCHEDULERS if name.startswith(SCHEDULERS) else name)
        spec = PathFinder.find_spec(name, path, target) if execute is not None else None
        if execute is None or spec is None or spec.loader is None:
            return None
        spec.loader.exec_module = partial(execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


# ------------------------------------------------------------------------------------------------ PyTorch's compiler


def _without_compiler(run: Run, module: ModuleType) -> None:
    """Execute diffusers' helpers, which do without PyTorch's compiler where there is none, and go on doing so.

    Nothing is a compiled module unless the compiler was imported: to ask must not import it.
    """
    if COMPILER in sys.modules:
        run(module)
        return
    sys.modules[COMPILER] = None  # type: ignore[assignment]  # its import fails
    try:
        run(module)
    finally:
        del sys.modules[COMPILER]
    asked = getattr(module, "is_compiled_module", None)
    if asked is not None:
        vars(module)["is_compiled_module"] = lambda part: COMPILER in sys.modules and asked(part)


class _Decorators:
    """Stands for the compiler where a module takes decorators from it; all else is the compiler's own."""

    def __getattr__(self, name: str) -> Any:
        return _as_it_is if name in DECORATORS else getattr(import_module(COMPILER), name)


def _undecorated(run: Run, module: ModuleType) -> None:
    """Execute a module that tells the compiler of its functions, as `torch._dynamo.allow_in_graph`, without that."""
    import torch

    names = vars(torch)
    if "_dynamo" in names:
        run(module)
        return
    names["_dynamo"] = stand = _Decorators()
    try:
        run(module)
    finally:
        if names.get("_dynamo") is stand:
            del names["_dynamo"]


# -------------------------------------------------------------------------------------------------- diffusers' packages


def _reexports_lazily(run: Run, module: ModuleType) -> None:
    """Execute a package that does nothing but give the names of its modules: each when it is asked for."""
    names = None if module.__file__ is None else reexports(Path(module.__file__).read_text(encoding="utf-8"))
    if names is None:
        run(module)
        return

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        own, original = names[name]
        value = vars(module)[name] = getattr(import_module(f"{module.__name__}.{own}"), original)
        return value

    vars(module)["__getattr__"] = find


def reexports(source: str) -> dict[str, tuple[str, str]] | None:
    """The names that a package's source imports from its own modules: each one's module, and its name there.

    Returns:
        None where the source does anything else, or only under conditions other than that PyTorch is there.
    """
    names: dict[str, tuple[str, str]] = {}
    statements = ast.parse(source).body
    while statements:
        statement = statements.pop(0)
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "is_torch_available()":
            if statement.orelse:
                return None
            statements = [*statement.body, *statements]
        elif isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            names |= {one.asname or one.name: (statement.module, one.name) for one in statement.names}
        elif not (isinstance(statement, ast.ImportFrom) and ast.unparse(statement).endswith("is_torch_available")):
            return None
    return None if "*" in names else names


# ---------------------------------------------------------------------------------------------- SciPy, and transformers


def _with_late_functions(run: Run, module: ModuleType) -> None:
    """Execute a module that takes functions or classes from others; those are imported when one is called."""
    wanted = LATE[SCHEDULERS if module.__name__.startswith(SCHEDULERS) else module.__name__]
    stands = {name: _Functions(name) for name in wanted if name not in sys.modules}
    sys.modules.update(stands)
    try:
        run(module)
    finally:
        for name in stands:
            del sys.modules[name]


class _Functions(ModuleType):
    """Stands for a module of functions while others take them from it.

    Who imports a module of SciPy by its whole name asks SciPy itself for it, which imports it then.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Late(name, (), {"of": self.__name__})


class _Late(type):
    """Stands for a function, or for a class: nothing is one of its objects before its module is imported."""

    of: str  # the module

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(cls.of), cls.__name__)(*args, **kwargs)

    def __instancecheck__(cls, one: object) -> bool:
        return cls.of in sys.modules and isinstance(one, getattr(sys.modules[cls.of], cls.__name__))


def _on_one_machine(run: Run, module: ModuleType) -> None:
    """Execute transformers' questions about what there is: its models are looked through once, and on one machine.

    It looks through them twice: what it keeps of the first time is too small for them.
    """
    run(module)
    names = vars(module)
    if "is_torch_distributed_available" in names:
        names["is_torch_distributed_available"] = lambda: False
    scan = getattr(names.get("create_import_structure_from_path"), "__wrapped__", None)
    if scan is not None:
        once = cache(scan)
        names["create_import_structure_from_path"] = lambda path: once(_folder(os.fspath(path)))


def _undocumented(run: Run, module: ModuleType) -> None:
    """Execute what writes the docstrings of transformers' classes, which imports most of its models to name some."""
    run(module)
    if "auto_docstring" in vars(module):
        vars(module)["auto_docstring"] = _as_it_is


def _folder(path: str) -> str:
    """A folder itself, or that of a file."""
    return os.path.dirname(path) if os.path.isfile(path) else path  # noqa: PTH113, PTH120  # 500 times: as text


_EXECUTE: dict[str, Callable[[Run, ModuleType], None]] = {
    "diffusers.utils.torch_utils": _without_compiler,
    "transformers.utils.auto_docstring": _undocumented,
    "transformers.utils.import_utils": _on_one_machine,
    **dict.fromkeys(DECORATED, _undecorated),
    **dict.fromkeys(REEXPORTING, _reexports_lazily),
    **dict.fromkeys(LATE, _with_late_functions),
}
