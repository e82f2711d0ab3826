"""The CLIP score: how well a picture fits its text, for a CLIP model of a folder or the hub; by torchmetrics.

It knows how such a model is found and called. It makes no picture and judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, SdtrtError, UsageError, first_line
from sdtrt.models.hub import Repo, is_repo_id
from sdtrt.specs.quality import CLIP_EXAMPLE

FILES = ("*.json", "merges.txt", "model*.safetensors")
HINT = f"give a folder or a hub id, as --clip-model {CLIP_EXAMPLE}"


class ClipScore:
    """100 times the cosine of a picture's and a text's embeddings, and 0 where it is negative; 100 is best.

    Args:
        model, processor: transformers' CLIP.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    @torch.no_grad()
    def __call__(self, pixels: npt.NDArray[Any], text: str) -> float:
        """Of a picture `[H,W,3]` in 0 to 1 and a text, of which CLIP reads its first tokens only."""
        from torchmetrics.functional.multimodal import clip_score

        levels = torch.from_numpy((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).permute(2, 0, 1)
        made: Any = self  # it has the two methods that are called of a CLIP, whatever transformers' own return
        return float(clip_score([levels], [text], model_name_or_path=lambda: (made, self._prepared)))

    @property
    def config(self) -> Any:
        """The model's, for the most tokens that it takes."""
        return self.model.config

    def to(self, device: torch.device) -> ClipScore:
        """Move the model, as torchmetrics does."""
        self.model.to(device)
        return self

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The embedding of pictures; transformers from 5 on returns it among others."""
        return _embedding(self.model.get_image_features(pixel_values))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The embedding of texts."""
        return _embedding(self.model.get_text_features(input_ids, attention_mask))

    def _prepared(self, images: Sequence[torch.Tensor] | None = None, **options: Any) -> Any:
        """What the model takes, of pictures or of texts: processors of all kinds take PIL's pictures."""
        if images is None:
            return self.processor(**options, truncation=True)
        pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in images]
        return self.processor.image_processor(images=pictures, return_tensors=options["return_tensors"])


def _embedding(output: Any) -> torch.Tensor:
    tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def load_clip_score(name: str, console: Console, *, offline: bool) -> ClipScore:
    """The CLIP score by a model.

    Args:
        name: a folder in transformers' format, or a hub id.
        offline: never ask the hub.

    Raises:
        SdtrtError: where torchmetrics is missing.
        ModelError, UsageError: where there is no such model, or it is no CLIP.
    """
    if find_spec("torchmetrics") is None:
        raise SdtrtError("the CLIP score needs torchmetrics", hint='pip install "sdtrt[quality]"')
    from transformers import CLIPModel, CLIPProcessor

    folder = _folder(name, console, offline=offline)
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True)
        return ClipScore(model, CLIPProcessor.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"can't read a CLIP model of {name}: {first_line(error)}", hint=HINT) from error


def _folder(name: str, console: Console, *, offline: bool) -> Path:
    """Where its files lie: a folder as it is, those of the hub in its cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_repo_id(name):
        raise UsageError(f"there is no folder {name} with a CLIP model", hint=HINT)
    return Repo(name, offline=offline, console=console).fetch(FILES, "CLIP model", large=True)
