"""What PyTorch's users write to make a diffusers pipeline fast, each form a function; what sdtrt is compared with.

Knows a pipeline's modules, and changes what their `forward` runs. Times nothing, and knows no engine. The reports show
these functions as they stand here (`code_of`), so that nobody has to take a name for what was run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdtrt.specs import BaselineName

Graphed = Callable[[Callable[..., Any]], Callable[..., Any]]  # puts a UNet's `forward` into one CUDA graph
Form = Callable[[Any, Graphed], None]


def in_a_graph(pipe: Any, graphed: Graphed) -> None:
    """Nothing is compiled: layouts channels last, and one CUDA graph runs a UNet step."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.forward = graphed(pipe.unet.forward)


def compiled(pipe: Any, graphed: Graphed) -> None:
    """The strongest form known: all parts compiled, QKV projections fused, channels last, a UNet step in one graph."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.fuse_qkv_projections()
    pipe.unet.forward = graphed(torch.compile(pipe.unet.forward, fullgraph=True, dynamic=False))
    compile_others(pipe)


def compiled_and_tuned(pipe: Any, graphed: Graphed) -> None:
    """The same, the UNet's kernels tuned as well, which takes many minutes."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.fuse_qkv_projections()
    mode = "max-autotune-no-cudagraphs"
    pipe.unet.forward = graphed(torch.compile(pipe.unet.forward, mode=mode, fullgraph=True, dynamic=False))
    compile_others(pipe)


def compiled_by_blocks(pipe: Any, graphed: Graphed) -> None:
    """The same, of the UNet's repeated blocks alone, which takes a tenth of the time."""
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.fuse_qkv_projections()
    pipe.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    pipe.unet.forward = graphed(pipe.unet.forward)
    compile_others(pipe)


def compile_others(pipe: Any) -> None:
    """Compile the VAE and the text encoders, whose calls are few (no graph of theirs would pay), and ControlNets."""
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.vae.fuse_qkv_projections()
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        half.forward = torch.compile(half.forward, dynamic=False)
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := getattr(pipe, name, None)) is not None:
            encoder.forward = torch.compile(encoder.forward, dynamic=False)
    control = getattr(pipe, "controlnet", None)
    for net in [] if control is None else getattr(control, "nets", [control]):
        net.to(memory_format=torch.channels_last)
        net.fuse_qkv_projections()
        net.forward = torch.compile(net.forward, fullgraph=True, dynamic=False)


def compiled_unet(pipe: Any, graphed: Graphed) -> None:
    """What most write: the UNet alone, in the compiler's own CUDA graphs, whose outputs the next call writes over."""
    pipe.unet.to(memory_format=torch.channels_last)
    mode = "reduce-overhead" if pipe.unet.device.type == "cuda" else "default"
    forward: Any = torch.compile(pipe.unet.forward, mode=mode, dynamic=False)

    def call(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return (forward(*args, **kwargs, return_dict=False)[0].clone(),)

    pipe.unet.forward = call


def compiled_by_tensorrt(pipe: Any, graphed: Graphed) -> None:
    """The UNet alone, as Torch-TensorRT's own example has it; the precision is the weights' own."""
    import torch_tensorrt  # noqa: F401  # it gives PyTorch's compiler the backend

    options: dict[str, Any] = {"truncate_double": True, "use_explicit_typing": True}
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="torch_tensorrt", dynamic=False, options=options)


FORMS: Mapping[BaselineName, Form] = {
    "torch-graph": in_a_graph,
    "torch-compile": compiled,
    "torch-compile-max": compiled_and_tuned,
    "torch-compile-regional": compiled_by_blocks,
    "torch-compile-unet": compiled_unet,
    "torch-tensorrt": compiled_by_tensorrt,
}


def compile_pipeline(pipe: Any, name: BaselineName, device: torch.device, graphed: Graphed) -> None:
    """Change a pipeline's parts into the form that a baseline is named for.

    Args:
        graphed: puts a UNet's `forward` into one CUDA graph; not asked on a CPU.
    """
    if FORMS[name] is not in_a_graph:
        torch.compiler.reset()
    FORMS[name](pipe, graphed if device.type == "cuda" else _as_it_is)


def _as_it_is(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def code_of(name: BaselineName) -> str:
    """The Python of a form, as it runs; empty for a baseline that changes nothing of the pipeline."""
    form = FORMS.get(name)
    if form is None:
        return ""
    parts: list[Callable[..., Any]] = [form]
    parts += [compile_others] if "compile_others" in form.__code__.co_names else []
    return "\n\n".join(inspect.getsource(part) for part in parts)
