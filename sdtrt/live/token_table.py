"""The token table of a live text encoder, which a textual inversion makes longer: engines have it as it was.

A longer table is looked up by PyTorch, with all of the encoder: it runs twice a picture, and an engine of another table
would be a build. Knows a module and its table. Knows no engine.
"""

from __future__ import annotations

from weakref import ref

import torch


class TokenTable:
    """The table that a text encoder had when its engines were found or built."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self._shape = _layer_of(encoder).weight.shape
        self.take(encoder)

    def take(self, encoder: torch.nn.Module) -> None:
        """Take the layer that is there now for the one that engines stand in for."""
        self._layer = ref(_layer_of(encoder))

    def fits(self, encoder: torch.nn.Module) -> bool:
        """Whether the encoder has a table of the engines' shape."""
        return _layer_of(encoder).weight.shape == self._shape

    def is_replaced(self, encoder: torch.nn.Module) -> bool:
        """Whether another layer has the table, as after `unload_textual_inversion`."""
        return _layer_of(encoder) is not self._layer()


def _layer_of(encoder: torch.nn.Module) -> torch.nn.Embedding:
    """The layer that looks tokens up."""
    layer = encoder.get_input_embeddings()  # type: ignore[operator]  # of transformers' models
    assert isinstance(layer, torch.nn.Embedding)
    return layer
