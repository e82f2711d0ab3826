"""What a UNet gets of texts where diffusers' pipelines don't encode them: prompts of web UIs, and skipped layers.

Knows the encoders of an open pipeline, engines' or PyTorch's. Weights are applied as stable-diffusion-webui does:
states are multiplied, and then scaled so that their mean stays; the pooled text is the first chunk's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdtrt.common.errors import ModelError, UsageError
from sdtrt.models import loading
from sdtrt.models.components import text_encoders_of
from sdtrt.models.embeddings import Embedding, find_embeddings
from sdtrt.models.resolve import Model
from sdtrt.pipeline.inputs.weighted_prompts import Token, check_syntax, chunks_of, ids_of
from sdtrt.specs import GenerateSpec, PromptSyntax

MOST_CHUNKS = 32  # of a prompt: 2,400 tokens


@dataclass(frozen=True)
class TextPlan:
    """How a request's texts become states.

    Args:
        chunks: of the encoders' length that every text is padded to.
    """

    syntax: PromptSyntax = "plain"
    clip_skip: int = 0
    embeddings: tuple[Embedding, ...] = ()
    chunks: int = 1

    @property
    def in_pytorch(self) -> bool:
        """Whether PyTorch runs the text encoders: engines have neither other layers' states nor more tokens."""
        return bool(self.clip_skip or self.embeddings)

    @property
    def is_own(self) -> bool:
        """Whether states are made here; else diffusers' pipelines make them."""
        return self.syntax != "plain" or bool(self.clip_skip)

    @property
    def reasons(self) -> str:
        """The options for which PyTorch runs the text encoders."""
        words = {"--clip-skip": self.clip_skip, "--embedding": self.embeddings}
        return " and ".join(word for word, given in words.items() if given)


def plan_texts(spec: GenerateSpec, model: Model) -> TextPlan:
    """Read what a request says of its texts, and refuse what does not fit the model, before anything heavy.

    Raises:
        UsageError, ModelError: where it does not.
    """
    if spec.prompt_syntax == "plain" and not spec.clip_skip and not spec.embeddings:
        return TextPlan()
    encoders = text_encoders_of(model)
    _check_encoders(spec, model, encoders)
    names: dict[str, str] = {part: part.replace("text_encoder", "tokenizer") for part in encoders}
    loaded = loading.load_parts(model, list(names.values()), torch.float32)
    tokenizers = {part: loaded[name] for part, name in names.items()}
    found = find_embeddings(spec.embeddings, model, tokenizers)
    chunks = 1
    if spec.prompt_syntax == "webui":
        texts = (*spec.prompts, spec.negative_prompt) if spec.uses_guidance else spec.prompts
        for text in texts:
            check_syntax(text)
        chunks = max(len(chunks_of(tokenizer, text)) for tokenizer in tokenizers.values() for text in texts)
    if chunks > MOST_CHUNKS:
        raise UsageError(f"a prompt takes {chunks} chunks of 75 tokens", hint=f"shorten it to {MOST_CHUNKS} chunks")
    return TextPlan(spec.prompt_syntax, spec.clip_skip, found, chunks)


def _check_encoders(spec: GenerateSpec, model: Model, encoders: Sequence[str]) -> None:
    """Refuse more layers to skip than there are, and encoders that take a mask."""
    most = min(model.config(part)["num_hidden_layers"] for part in encoders) - model.is_sdxl
    if spec.clip_skip > most:
        raise UsageError(
            f"--clip-skip {spec.clip_skip} skips more layers than {model.name} has to skip, {most}",
            hint=f"use --clip-skip {most} or less",
        )
    if any(model.config(part).get("use_attention_mask") for part in encoders):
        raise ModelError(
            f"the text encoder of {model.name} takes an attention mask", hint="use --prompt-syntax plain for this model"
        )


def states_of(
    pipe: Any, plan: TextPlan, prompts: Sequence[str], negatives: Sequence[str], guidance: bool
) -> dict[str, Any]:
    """The arguments of a pipeline's call in the place of its prompts.

    Layers are skipped for prompts alone, as diffusers does; in web UIs' syntax for negative prompts as well, as web UIs
    do.

    Returns:
        `prompt_embeds [B,S,D]`, with guidance the negative ones, of SDXL the pooled ones `[B,P]`.
    """
    with torch.no_grad():
        states, pooled = _encode(pipe, plan, prompts, plan.clip_skip)
        given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
        if guidance:
            if not any(negatives) and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
                nothing = torch.zeros_like(states), pooled if pooled is None else torch.zeros_like(pooled)
            else:
                skip = plan.clip_skip if plan.syntax == "webui" else 0
                nothing = _encode(pipe, plan, negatives, skip)
            given |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), nothing, strict=True))
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def _encode(pipe: Any, plan: TextPlan, texts: Sequence[str], skip: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States of texts `[B,S,D]`, those of two encoders side by side, and SDXL's pooled ones `[B,P]`."""
    joined, pooled = [], None
    for end in ("", "_2"):
        tokenizer, encoder = getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)
        if tokenizer is None or encoder is None:
            continue
        rows = [_padded(tokenizer, _chunks(plan, tokenizer, text), plan.chunks) for text in texts]
        found = []
        for number in range(plan.chunks):
            tokens = [row[number] for row in rows]
            output = encoder(_tensor(tokens, 0, torch.long, encoder.device), output_hidden_states=True)
            weights = _tensor(tokens, 1, torch.float32, encoder.device)
            found.append(_weighted(_states(pipe, encoder, output, skip), weights))
            if number == 0 and end:
                pooled = output[0]
        joined.append(torch.cat(found, dim=1))
    return torch.cat(joined, dim=-1), pooled


def _chunks(plan: TextPlan, tokenizer: Any, text: str) -> list[list[Token]]:
    """A text's tokens in chunks; in plain syntax one, whatever the text's length."""
    if plan.syntax == "webui":
        return chunks_of(tokenizer, text)
    return [[(number, 1.0) for number in ids_of(tokenizer, text)[: tokenizer.model_max_length - 2]]]


def _padded(tokenizer: Any, chunks: list[list[Token]], count: int) -> list[list[Token]]:
    """So many chunks, each with start, end and padding, as the tokenizer itself pads."""
    length = tokenizer.model_max_length
    whole = [*chunks, *[[]] * (count - len(chunks))]
    start, end, pad = (tokenizer.bos_token_id, 1.0), (tokenizer.eos_token_id, 1.0), (tokenizer.pad_token_id, 1.0)
    return [[start, *own, end, *[pad] * (length - 2 - len(own))] for own in whole]


def _tensor(rows: list[list[Token]], which: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([[token[which] for token in row] for row in rows], dtype=dtype, device=device)


def _states(pipe: Any, encoder: Any, output: Any, skip: int) -> torch.Tensor:
    """The states that a pipeline takes of an encoder, or those of an earlier layer, normalised as the last ones are."""
    states: torch.Tensor
    if hasattr(pipe, "text_encoder_2"):
        states = output.hidden_states[-(skip + 2)]
    elif skip:
        layers = getattr(encoder, "text_model", encoder)  # which transformers 5 no longer has
        states = layers.final_layer_norm(output.hidden_states[-(skip + 1)])
    else:
        states = output[0]
    return states


def _weighted(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """States `[B,S,D]` times their tokens' weights `[B,S]`; the mean of each row stays what it was."""
    if bool((weights == 1).all()):
        return states
    plain = states.float()
    heavy = plain * weights[..., None]
    mean, other = (one.mean(dim=(1, 2), keepdim=True) for one in (plain, heavy))
    changed = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(changed, heavy * (mean / other), plain).to(states.dtype)
