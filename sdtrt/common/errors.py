"""The exception tree: what a user can mend, with the mend in it.

A message has the offending value, a hint the command that mends it. Anything that is not an `SdtrtError` is a bug
and keeps its traceback.
"""

from __future__ import annotations

import re
import shlex

# What goes wrong where plain data is not of the form that it should have.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class SdtrtError(Exception):
    """A failure that its reader can mend.

    Args:
        message: what is wrong, with the offending value, in one line.
        hint: what to do about it, a command where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(_one_line(message))
        self.message = _one_line(message)
        self.hint = _one_line(hint)


class UsageError(SdtrtError):
    """The request itself is wrong: an option's value, or options that don't go together."""

    exit_code = 2


class ModelError(SdtrtError):
    """A model that can't be found, read or used."""


class ModelChangedError(ModelError):
    """A model whose files were replaced or written while they were being read: what was made of them has no name."""


class ExportError(SdtrtError):
    """A component that couldn't be turned into a correct ONNX graph."""


class BuildError(SdtrtError):
    """An ONNX graph that couldn't be turned into a correct engine."""


class BuildMemoryShortage(BuildError):  # noqa: N818 (the word is the error)
    """A build that needs more memory than there is: it may do where nothing else runs."""


class EngineError(SdtrtError):
    """An engine that can't be found, loaded or run."""


class UnservedCallError(EngineError):
    """A call with an argument that no engine has an input for, or for a gradient: the module itself could run it."""


class NotInEngineError(EngineError, AttributeError):
    """An engine lacks what the module that it stands for has. `hasattr` finds it absent, and raises nothing."""


class MemoryShortage(EngineError):  # noqa: N818 (the word is the error)
    """A run that needs more memory than there is: a smaller one may do."""


class CacheError(SdtrtError):
    """An engine directory that can't be used."""


class EntryInUseError(CacheError):
    """An entry that can't be removed while a process uses it."""


class OutputError(SdtrtError):
    """A result that can't be written where it was asked for."""


def printable(text: str) -> str:
    """Text that no terminal obeys: control characters and the like as their escapes, line ends as they are.

    Names and texts come from files that others wrote.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def quote(word: str) -> str:
    """A word as a shell takes it, on one line and without a control character, to be pasted from a hint.

    `shlex.quote` leaves line ends and bytes as they are: shown in a terminal, they would name another file.
    """
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(_escaped(letter) for letter in word)}'"


def _escaped(letter: str) -> str:
    """A letter inside `$'…'` (POSIX.1-2024, 2.2.4); octal has three digits, so that none behind it joins in."""
    if letter in "\\'":
        return f"\\{letter}"
    if letter == "\n":
        return "\\n"
    if letter.isprintable():
        return letter
    stray = "surrogateescape" if "\udc80" <= letter <= "\udcff" else "surrogatepass"  # the first: a byte of a path
    return "".join(f"\\{byte:03o}" for byte in letter.encode("utf-8", stray))


def command_line(*words: str) -> str:
    """A command of these words, as `quote` has each."""
    return " ".join(map(quote, words))


def _one_line(text: str) -> str:
    """Text whose line ends are spaces; those in a path stay as they are."""
    return printable(re.sub(r"\s*[\r\n]\s*", " ", text.strip()).replace("\t", " "))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or the error's type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
