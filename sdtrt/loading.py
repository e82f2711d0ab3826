"""The parts of a model: checked by the headers of their weight files, then loaded, each by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdtrt.checkpoints import check_plain, convert, meta_tensors
from sdtrt.console import quiet_libraries
from sdtrt.errors import ModelError, first_line
from sdtrt.models import UNUSED_PARTS, Model
from sdtrt.specs import DEFAULT_TOKENS
from sdtrt.weights import (
    WEIGHT_NAMES,
    TensorInfo,
    is_pickle,
    read_header,
    read_infos,
    read_pickle,
    read_tensors,
)

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

MAX_TRAIN_TIMESTEPS = 100_000  # a hundred times what any model has: schedulers make tables of that length


def load_unet(model: Model, dtype: torch.dtype) -> UNet2DConditionModel:
    """The UNet in `dtype` on the CPU, in eval mode and without gradients; nothing else of the model is read."""
    return load_parts(model, ("unet",), dtype)["unet"]


def load_parts(model: Model, names: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Load the named parts and no other.

    Args:
        names: as the pipelines' constructors call them; `UNUSED_PARTS` come back as None.
        dtype: of the weights; the modules lie on the CPU, in eval mode, without gradients.

    Raises:
        ModelError: if anything is missing or does not fit. All parts are checked before the first is loaded.
    """
    for name in names:
        if name in WEIGHT_NAMES:
            check_part(model, name)
    return {name: _load_part(model, name, dtype) for name in names}


def _load_part(model: Model, name: str, dtype: torch.dtype) -> Any:
    if name in UNUSED_PARTS:
        return None
    if name in WEIGHT_NAMES:
        return _load_module(model, name, dtype)
    return _load_scheduler(model) if name == "scheduler" else _load_tokenizer(model, name)


def check_part(model: Model, part: str) -> None:
    """Check by the weight files' headers that a part's tensors are all there, by name and shape; reads no tensor.

    Raises:
        ModelError: naming some of what is missing, unexpected or of another shape.
    """
    files = model.weight_files(part)
    origin = model.origin(part)
    if not any(is_pickle(file) for file in files):  # a pickle has no header; it is checked when it is loaded
        infos = part_infos(model, part)
        check_plain(part, origin.spec.name, {name: info.dtype for name, info in infos.items()})
        module = empty_part(model, part)
        _check_fit(model, part, module, convert(part, origin.layout, meta_tensors(infos), module))


def part_infos(model: Model, part: str) -> dict[str, TensorInfo]:
    """Name (as stored), dtype and shape of each tensor of a part."""
    infos: dict[str, TensorInfo] = {}
    for file in model.weight_files(part):
        infos.update(read_infos(file))
    is_mine = model.origin(part).is_mine
    return {name: info for name, info in infos.items() if is_mine(name)}


def empty_part(model: Model, part: str) -> torch.nn.Module:
    """The module of a part on PyTorch's meta device: its whole structure, no memory for weights.

    Raises:
        ModelError: where its configuration is missing, or makes no such module.
    """
    import torch

    config = model.config(part)
    with quiet_libraries(), torch.device("meta"):
        try:
            return _build_module(model.class_name(part), config)
        except (
            Exception
        ) as error:  # the classes compute with what they are given, and check it with errors of their own
            reason = first_line(error)
            raise ModelError(
                f"the configuration of the {part} of {model.name} makes no {model.class_name(part)}: {reason}",
                hint=f"check {model.config_file(part)}, or download the model again",
            ) from error


def _build_module(class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    """A module of one of the classes that sdtrt knows."""
    if class_name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        import transformers

        module: torch.nn.Module = getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(config))
        return module
    import diffusers

    cls: Any = getattr(diffusers, class_name)
    module = cls.from_config(config)
    return module


def _load_module(model: Model, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """Build a part without memory for weights, then give it the stored tensors themselves, cast to `dtype`.

    That is what low_cpu_mem_usage does with accelerate installed, without asking for accelerate.
    """
    import torch

    origin, stored = model.origin(part), _read_part(model, part)
    check_plain(
        part, origin.spec.name, {name: str(value.dtype).removeprefix("torch.") for name, value in stored.items()}
    )
    module = empty_part(model, part)
    tensors = convert(part, origin.layout, stored, module)
    _check_fit(model, part, module, tensors)
    wanted = module.state_dict().keys()
    cast = {name: _cast(model, part, name, tensors[name], dtype) for name in wanted}
    module.load_state_dict(cast, strict=True, assign=True)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):  # the one tensor that CLIP computes instead of storing
            positions = torch.arange(buffer.shape[-1]).expand(1, -1)
            module.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unset, f"{part} has tensors without values: {unset}"
    return module.eval().requires_grad_(False)


def _read_part(model: Model, part: str) -> dict[str, torch.Tensor]:
    """The stored tensors of a part, by their stored names."""
    tensors: dict[str, torch.Tensor] = {}
    is_mine = model.origin(part).is_mine
    for file in model.weight_files(part):
        if is_pickle(file):
            found = {name: value for name, value in read_pickle(file).items() if is_mine(name)}
        else:
            found = read_tensors(file, [name for name in read_header(file) if is_mine(name)])
        tensors.update(found)
    return tensors


def _cast(model: Model, part: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`, if every number of it is finite before and after."""
    import torch

    if _is_finite(result := tensor.to(dtype)):
        return result
    if _is_finite(tensor.to(torch.float32)):
        short = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"{name} of the {part} of {model.name} does not fit into {short}", hint="use --precision bf16 or fp32"
        )
    raise ModelError(
        f"{name} of the {part} of {model.name} holds numbers that are not finite",
        hint="the weights are damaged: download the model again, or use another version of it",
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite, in one pass without a copy (NaN goes through aminmax)."""
    import torch

    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _check_fit(model: Model, part: str, module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise `ModelError` unless the tensors are the module's, by name, shape and kind of number."""
    wanted = module.state_dict()
    extra = tensors.keys() - wanted.keys()
    problems = {
        "are missing": sorted(wanted.keys() - tensors.keys()),
        "are not of this architecture": sorted(extra),
        "have another shape": sorted(
            f"{name} {list(tensors[name].shape)} instead of {list(value.shape)}"
            for name, value in wanted.items()
            if name in tensors and tensors[name].shape != value.shape
        ),
        "are quantised": sorted(name for name in wanted if name in tensors and not tensors[name].is_floating_point()),
    }
    for what, names in problems.items():
        if names:
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ModelError(
                f"the {part} weights of {model.origin(part).spec.name} don't fit its configuration:"
                f" {len(names)} {what} ({some})",
                hint=_mend(model, part, what),
            )


def _mend(model: Model, part: str, what: str) -> str:
    """What helps where a part's weights don't fit."""
    origin = model.origin(part)
    if what == "are quantised":
        return "use a version of it in fp16, bf16 or fp32"
    if part == "vae" and model.spec.vae is not None:
        return "use a VAE of the model's kind as --vae, best its folder with its configuration"
    single = "pass the configuration of its kind of model as --config, or " * (origin.layout == "single-file")
    return f"{single}download or convert the model again"


def _load_scheduler(model: Model) -> Any:
    """The model's own scheduler."""
    with quiet_libraries():
        import diffusers

        cls = getattr(diffusers, model.class_name("scheduler"), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
            raise ModelError(
                f"diffusers {diffusers.__version__} has no {model.class_name('scheduler')}",
                hint="pip install --upgrade diffusers",
            )
        scheduler: Any = cls
        config = model.config("scheduler")
        timesteps = config.get("num_train_timesteps", 1000)
        try:
            if not (isinstance(timesteps, int) and 1 <= timesteps <= MAX_TRAIN_TIMESTEPS):
                raise ValueError(f"num_train_timesteps is {timesteps!r}")
            return scheduler.from_config(config)
        except Exception as error:  # schedulers compute with what they are given
            raise ModelError(
                f"the configuration of the scheduler of {model.name} makes no {cls.__name__}: {first_line(error)}",
                hint=f"check {model.config_file('scheduler')}, or use another model",
            ) from error


def _load_tokenizer(model: Model, name: str) -> Any:
    """A CLIP tokenizer from its own files, that makes no more tokens than its text encoder has positions for.

    `model_max_length` may be missing: transformers takes 1e30 then.
    """
    model.class_name(name)
    folder = model.origin(name).folder
    positions = model.config(name.replace("tokenizer", "text_encoder")).get("max_position_embeddings", DEFAULT_TOKENS)
    with quiet_libraries():
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = first_line(error)
            raise ModelError(
                f"can't read the tokenizer in {folder}: {reason}", hint="download or copy the model again"
            ) from error
    return tokenizer
