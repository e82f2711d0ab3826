"""What PyTorch runs of an accelerated pipeline because no engine may: `on_miss="torch"` leaves it so, and says why.

Knows errors. Knows no engine and no module: who asks says what is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakMethod

from sdtrt.common.errors import EngineError


class Left:
    """Why PyTorch runs a component that has engines. Reasons come and go with what is done to its module.

    Args:
        is_allowed: told of an error, whether PyTorch may run the component for it.

    Attributes:
        reason: empty where engines run it.
    """

    def __init__(self, is_allowed: Callable[[EngineError], bool]) -> None:
        self._is_allowed = WeakMethod(is_allowed)  # its object has this one
        self.reason = ""

    def __bool__(self) -> bool:
        return bool(self.reason)

    @contextmanager
    def where_refused(self, kind: type[EngineError] = EngineError) -> Iterator[None]:
        """Within, take an error of a kind for the reason; raise it where PyTorch may not run the component."""
        try:
            yield
        except kind as error:
            is_allowed = self._is_allowed()
            if is_allowed is None or not is_allowed(error):
                raise
            self.reason = error.message
