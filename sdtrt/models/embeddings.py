"""Textual inversions that a user names: read by diffusers' own loader, and held against a model's text encoders.

Knows files, tensors and configurations. What puts them into a pipeline is diffusers', too (`put_into`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import quiet_libraries
from sdtrt.common.errors import ModelError, UsageError, first_line
from sdtrt.models.components import text_encoders_of
from sdtrt.models.origins import local_path
from sdtrt.models.resolve import Model
from sdtrt.specs import EMBEDDING_SUFFIXES, EmbeddingSpec

if TYPE_CHECKING:
    import torch

MAX_BYTES = 64 << 20  # of a file; ten vectors of SDXL take 80 KB
MOST_VECTORS = 75  # that a prompt has room for
SDXL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
NAMELESS = "emb_params"  # what web UIs call the vectors of a file that has no other name for them
_OTHER = "use an embedding that was made for the model's kind, or another --model"
_HINT = "pass an embedding in diffusers' or a web UI's format, as in --embedding cat.safetensors:<cat>"


@dataclass(frozen=True)
class Embedding:
    """A textual inversion that was read.

    Args:
        token: the word that stands for it.
        vectors: `[N,D]` for each text encoder of the model, by its part's name.
    """

    path: Path
    token: str
    vectors: Mapping[str, torch.Tensor] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.stem

    def words(self, part: str) -> list[str]:
        """The tokens that diffusers makes of it, one a vector."""
        return [self.token, *(f"{self.token}_{number}" for number in range(1, len(self.vectors[part])))]


def find_embeddings(
    specs: Sequence[EmbeddingSpec], model: Model, tokenizers: Mapping[str, Any]
) -> tuple[Embedding, ...]:
    """Read textual inversions, check that they fit a model, and tell its tokenizers their words.

    Args:
        tokenizers: by the parts' names of the text encoders.

    Raises:
        UsageError: for a word that is taken.
        ModelError: for a file that can't be read, or is for another kind of model.
    """
    found = []
    for spec in specs:
        one = _read(spec, model)
        for part, tokenizer in tokenizers.items():
            _check_word(one, part, tokenizer)
            tokenizer.add_tokens(one.words(part))
        found.append(one)
    return tuple(found)


def put_into(pipe: Any, embeddings: Sequence[Embedding]) -> None:
    """Have diffusers give a pipeline's tokenizers the words, and its text encoders the vectors."""
    with quiet_libraries():
        for one in embeddings:
            for part, vectors in one.vectors.items():
                tokenizer = getattr(pipe, part.replace("text_encoder", "tokenizer"))
                own = {"tokenizer": tokenizer, "text_encoder": getattr(pipe, part)}
                pipe.load_textual_inversion(vectors, token=one.token, **own)


def _read(spec: EmbeddingSpec, model: Model) -> Embedding:
    """Read one file by diffusers' loader, and check it."""
    path = local_path(spec.name) or Path(spec.name)
    state = _state_of(path)
    parts = text_encoders_of(model)
    if isinstance(state, dict) and not state.keys().isdisjoint(SDXL_KEYS.values()):
        token, tensors = path.stem, {part: state[key] for part, key in SDXL_KEYS.items() if key in state}
    else:
        token, tensor = _named(path, state)
        tensors = {parts[0]: tensor}
    if set(tensors) != set(parts):
        raise ModelError(
            f"{path} is for {_encoders(tensors)}, and {model.name} has {_encoders(parts)}",
            hint=_OTHER,
        )
    return Embedding(path, spec.token or token, {part: _checked(path, part, tensors[part], model) for part in parts})


def _encoders(parts: Mapping[str, Any] | Sequence[str]) -> str:
    return f"the text encoder{'s' * (len(parts) > 1)} {' and '.join(SDXL_KEYS[part] for part in parts)}"


def _state_of(path: Path) -> Any:
    """What diffusers' loader reads of a file: tensors alone, no code (`weights_only`)."""
    from diffusers.loaders.textual_inversion import load_textual_inversion_state_dicts

    if path.suffix.lower() not in EMBEDDING_SUFFIXES or not path.is_file():
        raise ModelError(f"there is no embedding at {path}", hint=f"{_HINT} ({', '.join(EMBEDDING_SUFFIXES)})")
    if path.stat().st_size > MAX_BYTES:
        raise ModelError(f"{path} is too large for an embedding", hint=_HINT)
    try:
        with quiet_libraries():
            return load_textual_inversion_state_dicts([str(path)], local_files_only=True)[0]
    except Exception as error:  # unpickling may raise anything
        raise ModelError(f"can't read the embedding {path}: {first_line(error)[:200]}", hint=_HINT) from error


def _named(path: Path, state: Any) -> tuple[str, Any]:
    """An embedding's word and vectors, by diffusers' rules; the file's name where it has no word."""
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    given = [path.stem] if not isinstance(state, dict) or NAMELESS in state else [None]
    anew = SimpleNamespace(get_vocab=dict)  # whether the word is taken is looked at later
    try:
        tokens, tensors = TextualInversionLoaderMixin._retrieve_tokens_and_embeddings(given, [state], anew)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no embedding: {first_line(error)[:200]}", hint=_HINT) from error
    return str(tokens[0]), tensors[0]


def _checked(path: Path, part: str, tensor: Any, model: Model) -> torch.Tensor:
    """The vectors of one text encoder `[N,D]`, which has to be as wide."""
    import torch

    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim not in (1, 2):
        raise ModelError(f"{path} is no embedding: it has no vectors", hint=_HINT)
    vectors = tensor.detach().reshape(-1, tensor.shape[-1])
    if vectors.shape[-1] != (width := model.config(part)["hidden_size"]):
        raise ModelError(
            f"{path} has vectors of width {vectors.shape[-1]}, and the {part} of {model.name} takes {width}",
            hint=_OTHER,
        )
    if not 1 <= len(vectors) <= MOST_VECTORS or not bool(torch.isfinite(vectors).all()):
        raise ModelError(
            f"{path} has {len(vectors)} vectors, of which a prompt takes {MOST_VECTORS}; or they are not finite",
            hint=_HINT,
        )
    return vectors


def _check_word(one: Embedding, part: str, tokenizer: Any) -> None:
    """Refuse a word that a tokenizer knows."""
    known = tokenizer.get_vocab()
    if taken := [word for word in one.words(part) if word in known]:
        raise UsageError(
            f"{taken[0]!r} of {one.path} is a word that the model, or another embedding, has already",
            hint=f"name another one: --embedding {one.path}:<{one.token.strip('<>')}-2>",
        )
