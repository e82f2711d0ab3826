"""LPIPS: how far two pictures are apart for an AlexNet, with torchmetrics' weights of its layers.

It knows the network, the arithmetic and where the weights lie. It downloads nothing, and judges nothing.

Source: https://arxiv.org/abs/1801.03924 (version 0.1, AlexNet), as torchmetrics has it. torchvision, which torchmetrics
takes the network from, is not needed: its wheel on PyPI is made for PyTorch with CUDA, and can't be imported beside
another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import conv2d

from sdtrt.common.errors import ModelError, SdtrtError, first_line
from sdtrt.models.weights import read_header, read_tensor_pickle, read_tensors

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's file, by the name that PyTorch's cache has for it
ADDRESS = f"https://download.pytorch.org/models/{ALEXNET}"
LEAST_PIXELS = 31  # a side: of less, nothing is left for the last layers

# What turns pictures of -1 to 1 into what the network was trained on: `ScalingLayer` of LPIPS.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-8

WEIGHTS_HINT = f"download {ADDRESS}, and give it as --lpips-weights {ALEXNET}"


def alexnet_features() -> nn.Sequential:
    """torchvision's AlexNet up to its last convolution: the same layers under the same numbers."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(),
    )


class Lpips(nn.Module):
    """The distance of two pictures; 0 is best.

    Args:
        features: layers whose outputs behind each ReLU are compared.
        weights: of each of these outputs, one number for each channel, `[1,C,1,1]`.
    """

    def __init__(self, features: nn.Sequential, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.features, self.weights = features.eval(), weights

    @torch.no_grad()
    def forward(self, one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
        """Of two pictures `[H,W,3]` in 0 to 1."""
        pairs = zip(self.weights, self._outputs(one), self._outputs(other), strict=True)
        return float(sum(conv2d((a - b) ** 2, weight).mean() for weight, a, b in pairs))

    def _outputs(self, pixels: npt.NDArray[Any]) -> list[torch.Tensor]:
        """Behind each ReLU, every pixel's channels made a vector of length 1."""
        shift, scale = (torch.tensor(values)[:, None, None] for values in (SHIFT, SCALE))
        picture = torch.as_tensor(pixels, dtype=torch.float32).permute(2, 0, 1) * 2 - 1
        value, found = ((picture - shift) / scale)[None], []
        for layer in self.features:
            value = layer(value)
            if isinstance(layer, nn.ReLU):
                found.append(value / torch.sqrt(EPSILON + (value**2).sum(1, keepdim=True)))
        return found


def load_lpips(weights: Path | None) -> Lpips:
    """LPIPS with the trained network.

    Args:
        weights: torchvision's AlexNet, `.pth` or `.safetensors`; None for the file in PyTorch's own cache.

    Raises:
        SdtrtError: where torchmetrics or the network's weights are missing.
        ModelError: for a file that is no AlexNet.
    """
    layers = _layer_weights()
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not path.is_file():
        where = f"there is no file {path}" if weights is not None else f"PyTorch's cache has no {ALEXNET}"
        raise SdtrtError(f"LPIPS needs AlexNet's weights: {where}", hint=WEIGHTS_HINT)
    network, tensors = alexnet_features(), _read(path)
    named = {name.removeprefix("features."): tensor for name, tensor in tensors.items()}
    try:
        network.load_state_dict({name: named[name] for name in network.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"{path} is no AlexNet of torchvision: {first_line(error)}", hint=WEIGHTS_HINT) from error
    return Lpips(network, layers)


def _layer_weights() -> list[torch.Tensor]:
    """What LPIPS has learned of AlexNet's layers: a small file that torchmetrics brings along."""
    found = find_spec("torchmetrics")
    if found is None or not found.submodule_search_locations:
        raise SdtrtError("LPIPS needs torchmetrics", hint='pip install "sdtrt[quality]"')
    folder = Path(found.submodule_search_locations[0]) / "functional" / "image" / "lpips_models"
    tensors = _read(folder / "alex.pth")
    return [tensors[f"lin{number}.model.1.weight"] for number in range(5)]


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    """Tensors by name; no code of a file runs. Raises `ModelError` for what holds none."""
    try:
        return read_tensors(path, read_header(path)) if path.suffix == ".safetensors" else read_tensor_pickle(path)
    except ModelError as error:
        raise ModelError(error.message, hint=WEIGHTS_HINT) from error
