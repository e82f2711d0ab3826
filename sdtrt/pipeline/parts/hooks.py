"""Hooks on a module's calls that copies and pickles of the module do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Hook = Callable[..., None]


class _Hook:
    """Calls a hook for one module. A copy of the module made meanwhile has the hook as well, and it is silent there."""

    def __init__(self, module: torch.nn.Module | None = None, hook: Hook | None = None) -> None:
        self.module, self.hook = module, hook

    def __call__(self, module: torch.nn.Module, *arguments: Any) -> None:
        if module is self.module and self.hook is not None:
            self.hook(module, *arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()

    def end(self) -> None:
        """Let go of both."""
        self.module = self.hook = None


@contextmanager
def hooked(module: torch.nn.Module, hook: Hook) -> Iterator[None]:
    """Call `hook` after each forward of a module, with its arguments and its output, for the time of a `with`."""
    attached = _Hook(module, hook)
    handle = module.register_forward_hook(attached, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        attached.end()
