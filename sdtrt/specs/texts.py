"""What a request says of its texts beside the words: how they are read, and the words that are learnt for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

from sdtrt.common.errors import UsageError

PromptSyntax = Literal["plain", "webui"]
PROMPT_SYNTAXES: tuple[str, ...] = get_args(PromptSyntax)
EMBEDDING_SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True)
class EmbeddingSpec:
    """A textual inversion.

    Args:
        name: its file.
        token: the word that stands for it in prompts; None for the one that the file says, or the file's name.
    """

    name: str
    token: str | None = None

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("an embedding without a file was given", hint="as in --embedding cat.safetensors:<cat>")
        if self.token is not None and (not self.token or any(letter.isspace() for letter in self.token)):
            raise UsageError(f"a token must be one word, got {self.token!r}", hint=f"as in {self.name}:<word>")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `FILE` or `FILE:TOKEN`."""
        name, colon, token = text.rpartition(":")
        return cls(name, token) if colon and name.lower().endswith(EMBEDDING_SUFFIXES) else cls(text)

    def __str__(self) -> str:
        return self.name if self.token is None else f"{self.name}:{self.token}"
