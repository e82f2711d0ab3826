"""Show people stages, bars and notes on stderr while they wait. Stdout is the result's alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sdtrt.common import interrupts
from sdtrt.common.errors import printable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

Advance = Callable[[], None]
PIPE_COLUMNS = 240


class Console:
    """Progress and notes on stderr.

    Args:
        quiet: say nothing but warnings and errors.
        verbose: also say details (`detail`).
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self._rich: RichConsole | None = None

    @property
    def rich(self) -> RichConsole:
        """The rich console on stderr, made at first use (rich costs start-up time)."""
        if self._rich is None:
            from rich.console import Console as RichConsole

            self._rich = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True)
        return self._rich

    def note(self, text: str) -> None:
        """Say one line, unless quiet."""
        if not self.quiet:
            self.rich.print(printable(text), markup=False)

    def detail(self, text: str) -> None:
        """Say one line if verbose."""
        if self.verbose:
            self.note(text)

    def warn(self, text: str) -> None:
        """Say one line of warning, also when quiet."""
        self.rich.print(f"warning: {printable(text)}", markup=False)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Show a table, unless quiet."""
        if not self.quiet:
            self.rich.print(_table(columns, rows), width=None if self.rich.is_terminal else PIPE_COLUMNS)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show `name` with a running clock, then how long it took (`name: 3.2 s`)."""
        with self._clock(name):
            yield

    @contextmanager
    def activity(self, name: str) -> Iterator[Callable[[str], None]]:
        """Like `stage`, with a word on what goes on just now: call what it yields to change that."""
        if not self.quiet and not self.rich.is_terminal:  # nothing is animated; minutes without a word look like a hang
            self.note(f"{name} ...")
        with self._clock(name) as describe:
            yield lambda text: describe(f"{name}: {text}")

    @contextmanager
    def _clock(self, name: str) -> Iterator[Callable[[str], None]]:
        """A running clock behind a description, which what it yields changes; then the time that it took."""
        if self.quiet:
            yield lambda description: None
            return
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        start = time.perf_counter()
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        # Without a terminal there is nothing to animate, and a transient display would leave an empty line.
        progress = Progress(*columns, console=self.rich, transient=True, disable=not self.rich.is_terminal)
        with interrupts.undoing(self._show_cursor), progress:
            task = progress.add_task(name, total=None)
            yield lambda description: progress.update(task, description=description)
        self.note(f"{name}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar of `total` steps; call what it yields once a step."""
        if self.quiet:
            yield lambda: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with interrupts.undoing(self._show_cursor), Progress(*columns, console=self.rich) as progress:
            task = progress.add_task(name, total=total)
            yield lambda: progress.advance(task)

    @contextmanager
    def progress(self, name: str) -> Iterator[Callable[[float, str], None]]:
        """Show how much of a long job is done; call what it yields with the share (0 to 1) and what goes on."""
        if self.quiet:
            yield lambda share, text: None
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with interrupts.undoing(self._show_cursor), Progress(*columns, console=self.rich) as progress:
            task = progress.add_task(name, total=1.0)
            yield lambda share, text: progress.update(task, completed=share, description=f"{name}: {text}")

    def _show_cursor(self) -> None:
        """Begin a new line with the cursor that rich hides: for who ends the process at once."""
        if self.rich.is_terminal:
            os.write(2, b"\x1b[?25h\n")


QUIET = Console(quiet=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table on stdout; a pipe gets whole cells, whatever their width."""
    from rich.console import Console as RichConsole

    table = _table(columns, rows, title)
    RichConsole(highlight=False, width=None if sys.stdout.isatty() else PIPE_COLUMNS).print(table)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> Table:
    """A table of plain cells."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep diffusers and transformers from writing progress bars and advice to stderr, import messages included."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before[0])
        if before[1]:
            transformers_logging.enable_progress_bar()
        diffusers_logging.set_verbosity(diffusers_before)
