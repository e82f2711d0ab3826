"""Turn arguments into an exit code. Knows how every failure is told; what commands do it does not know."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import typer

from sdtrt.cli.commands import app
from sdtrt.common import interrupts, threads
from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError, first_line, printable
from sdtrt.common.files import FULL, LIMITS, MORE_FILES, RAISE_LIMITS, is_exhausted

NO_ROOM = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")  # of the system's loader

NO_THREAD = "can't start new thread"  # in Python's own words


def _as_it_came_or_escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler for stdout: paths go out as they came in, whatever their bytes; else as `\\u043a`."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


def main() -> NoReturn:
    """Run the command line; every failure that its reader can mend is an `error:` and a `hint:` line on stderr."""
    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error("sdtrt", _as_it_came_or_escaped)
        sys.stdout.reconfigure(errors="sdtrt")
    try:
        _check_working_folder()
        _check_docstrings()
        if threads.make_do():
            Console().warn(f"few threads to spare, so that one computes: {RAISE_LIMITS}")
        code = app(standalone_mode=False) or 0
        sys.stdout.flush()
    except SdtrtError as error:
        code = _fail(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):  # only where nobody listens (`interrupts.listen`)
        code = interrupts.INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        code = 1
    except MemoryError:
        code = _fail("out of memory", "end other programs, or use a smaller --height and --width", 1)
    except _CLICK_EXCEPTION as error:
        message = error.format_message()  # empty where the help was shown instead, for want of arguments
        hint = f"{_command_path(error)} --help shows the options"
        code = _fail(message, hint, error.exit_code) if message else error.exit_code
    except Exception as error:
        code = _fail_of_the_system(error)
    if code == interrupts.INTERRUPTED:  # newer typers turn the exception into this code themselves
        _fail(interrupts.MESSAGE, interrupts.HINT, interrupts.INTERRUPTED)
    sys.exit(code)


def _check_docstrings() -> None:
    """Raise `SdtrtError` where Python leaves docstrings out: transformers can't be imported without its own."""
    if sys.flags.optimize > 1:
        raise SdtrtError(
            "Python runs without docstrings (-OO, PYTHONOPTIMIZE=2), which transformers and the help of commands need",
            hint="unset PYTHONOPTIMIZE",
        )


def _check_working_folder() -> None:
    """Raise `SdtrtError` where the working folder is gone: libraries end the process without a word of sense."""
    try:
        os.getcwd()  # noqa: PTH109
    except OSError as error:
        raise SdtrtError(f"the working folder can't be used: {error.strerror}", hint="cd to one that exists") from error


def _drop_stdout() -> None:
    """Let what is left in stdout's buffer go nowhere, so that the interpreter's own flush is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail_of_the_system(error: Exception) -> int:
    """Say what the system has no more of: files to open, memory, threads, or space. Raises what is of another kind."""
    if is_exhausted(error):
        return _fail(f"too many files are open: {first_line(error)}", MORE_FILES, 1)
    if isinstance(error, (ImportError, RuntimeError)) and any(text in str(error) for text in NO_ROOM):
        return _fail(f"out of memory: {first_line(error)}", "end other programs, or raise the limit: ulimit -v", 1)
    if (isinstance(error, OSError) and error.errno in LIMITS) or str(error) == NO_THREAD:
        return _fail(str(error), RAISE_LIMITS, 1)
    if not isinstance(error, OSError) or error.errno not in (*FULL, errno.EIO):
        raise error
    _drop_stdout()
    what = error.filename or "all of the output"
    hint = "free some space, or write elsewhere; temporary files go where $TMPDIR says"
    return _fail(f"can't write {what}: {error.strerror}", hint, 1)


def _fail(message: str, hint: str, code: int) -> int:
    """Say what is wrong and what mends it. Where files can't be opened, nothing else that is advised would help."""
    hint = MORE_FILES if is_exhausted(sys.exception()) else hint
    print(f"error: {printable(message)}\nhint: {printable(hint)}", file=sys.stderr)
    return code


# Typer's errors derive from click's class of this name, which newer versions carry inside typer.
_CLICK_EXCEPTION: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _command_path(error: Any) -> str:
    """The command that a usage error is about, as typed."""
    context = getattr(error, "ctx", None)
    return context.command_path if context is not None else "sdtrt"
