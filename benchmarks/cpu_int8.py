"""What int8 gives on a CPU: a UNet by NNCF, in turns with the bf16 that the backend openvino computes in.

    pip install nncf
    sdtrt export --model FOLDER --component unet --precision fp32 --output fp32.onnx
    sdtrt export --model FOLDER --component unet --precision bf16 --output bf16.onnx
    python benchmarks/cpu_int8.py fp32.onnx bf16.onnx --batch 1 --output int8.json

`int8 weights` is NNCF's compression without data: weights are stored in 8 bits, and products are in bf16 as before.
`int8` is `nncf.quantize`, calibrated on `--samples` seeded inputs of `--calibration` pixels: products and convolutions
are in 8 bits, what is left is in bf16. Its corrections of biases and its smoothing are off: they change no time, and
did not end within 15 minutes for a UNet of Stable Diffusion 1.5's size on two busy cores. The error is against the ONNX
in fp32 at the same inputs. NNCF's telemetry is left out: it would tell its maker.
"""

from __future__ import annotations

import sdtrt  # noqa: F401  # first: it switches off what ONNX Runtime tells its maker

# isort: split
import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cpu_step import Run, contract_of, take_turns

from sdtrt.backends.checking import compare
from sdtrt.backends.openvino import library
from sdtrt.common import host
from sdtrt.common.console import Console
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.specs import Sizes

Feeds = Mapping[str, torch.Tensor]


def read(path: Path, feeds: Feeds) -> Any:
    """A model at the size of some inputs."""
    model = library.core().read_model(str(path))
    reshape(model, feeds)
    return model


def reshape(model: Any, feeds: Feeds) -> None:
    """Give a model the size of some inputs."""
    shapes = {port: list(next(feeds[name] for name in feeds if name in port.names).shape) for port in model.inputs}
    model.reshape(shapes)


def given(model: Any, feeds: Feeds) -> dict[int, Any]:
    """Inputs by their place, as OpenVINO takes them."""
    openvino, found = library.load(), {}
    for index, port in enumerate(model.inputs):
        tensor = next(feeds[name] for name in feeds if name in port.names)
        if tensor.dtype == torch.bfloat16:
            found[index] = openvino.Tensor(tensor.view(torch.uint16).numpy(), list(tensor.shape), openvino.Type.bf16)
        else:
            found[index] = openvino.Tensor(tensor.numpy())
    return found


def quantised(path: Path, samples: Sequence[Feeds]) -> Any:
    """A model in int8, calibrated on some inputs."""
    import nncf

    model = read(path, samples[0])
    feeds = nncf.Dataset([{port: value.data for port, value in given(model, one).items()} for one in samples])
    return nncf.quantize(
        model,
        feeds,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            disable_bias_correction=True,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1),
        ),
    )


def compressed(path: Path, feeds: Feeds) -> Any:
    """A model whose weights alone are in int8."""
    import nncf

    return nncf.compress_weights(read(path, feeds), mode=nncf.CompressWeightsMode.INT8_ASYM)


def compiled(model: Any, hint: str, feeds: Feeds) -> tuple[Run, torch.Tensor]:
    """A run of a model, and what it computes."""
    settings = library.settings(torch.get_num_threads()) | {"INFERENCE_PRECISION_HINT": hint}
    request = library.core().compile_model(model, library.CPU, settings).create_infer_request()
    values = given(model, feeds)
    request.infer(values)
    output = request.get_output_tensor(0)
    bits = torch.from_numpy(output.data.copy())
    if output.element_type == library.load().Type.bf16:
        bits = bits.view(torch.uint8).view(torch.bfloat16).reshape(tuple(output.shape))
    return (lambda: request.infer(values)), bits.float()


def in_precision(feeds: Feeds, names: Feeds) -> dict[str, torch.Tensor]:
    """The same inputs, in the types of another export."""
    return {name: tensor.to(names[name].dtype) for name, tensor in feeds.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Make each variant, then let them take turns."""
    sizes = Sizes(args.batch, args.size, args.size)
    contract = contract_of(args.fp32)
    feeds = seeded_feeds(contract, sizes)
    narrow = in_precision(feeds, seeded_feeds(contract_of(args.bf16), sizes))
    small = Sizes(args.batch, args.calibration, args.calibration)
    samples = [seeded_feeds(contract, small, seed=seed) for seed in range(1, args.samples + 1)]
    reference = compiled(read(args.fp32, feeds), "f32", feeds)[1]
    gc.collect()
    runs: dict[str, Run] = {}
    errors, seconds = {}, {}
    for name in ("bf16", "int8 weights", "int8"):
        begin = time.perf_counter()
        if name == "int8":
            model = quantised(args.fp32, samples)
            reshape(model, feeds)
            runs[name], found = compiled(model, "bf16", feeds)
        else:
            model = read(args.bf16, narrow) if name == "bf16" else compressed(args.bf16, narrow)
            runs[name], found = compiled(model, "f32", narrow)
        del model
        seconds[name] = round(time.perf_counter() - begin, 1)
        errors[name] = compare({name: found}, {name: reference})
        Console().note(f"{name}: made in {seconds[name]} s, {errors[name]}")
    times = take_turns(runs, args.repeats)
    return {
        "sizes": str(sizes),
        "calibrated_at": f"{args.samples} of {small}",
        "made_seconds": seconds,
        "errors": errors,
        "seconds": times,
        "least": {name: min(own) for name, own in times.items()},
        "load_average": os.getloadavg()[0],
        "host": host.facts(),
    }


def main() -> None:
    """Measure, and print or write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("bf16", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    sys.modules[library.TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say that there is none
    text = json.dumps(measure(args), indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
