"""The parts of a model: checked by the headers of their weight files, then loaded, each by itself."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import reprlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrt.common.console import quiet_libraries
from sdtrt.common.errors import ModelError, SdtrtError, first_line
from sdtrt.common.files import limit_hint, temporary_folder
from sdtrt.models import ip_loading, lora_loading
from sdtrt.models.checkpoints import check_plain, convert, meta_tensors
from sdtrt.models.configuration import check_kinds, whole_numbers
from sdtrt.models.loras import Lora
from sdtrt.models.resolve import UNUSED_PARTS, Model
from sdtrt.models.weights import (
    WEIGHT_NAMES,
    TensorInfo,
    is_pickle,
    read_header,
    read_infos,
    read_model_file,
    read_pickle,
    read_tensors,
)
from sdtrt.specs import DEFAULT_TOKENS

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

MAX_TRAIN_TIMESTEPS = 100_000  # a hundred times what any model has: schedulers make tables of that length
MANY_TENSORS = 10_000  # of one part; SDXL's UNet has 1,680
PIECES_PER_TENSOR, SOME_PIECES = 8, 1000  # modules and parameters that are made for a stored tensor: all have 2 or 3
LAYERS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
CLIP_VOCABULARY = 49408  # of a text encoder that does not say
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MAX_TOKENIZER_BYTES = 32 << 20  # of one of them; CLIP's largest has 4
EVERY_BYTE = " ".join(map(chr, (*range(33, 127), *range(0xA1, 0x200), 0x2603, 0x5B57, 0x1F600)))


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
    empty = {name: check_part(model, name) for name in names if name in WEIGHT_NAMES}
    return {name: _load_part(model, name, dtype, empty.get(name)) for name in names}


def _load_part(model: Model, name: str, dtype: torch.dtype, empty: torch.nn.Module | None) -> Any:
    if name in UNUSED_PARTS:
        return None
    if name in WEIGHT_NAMES:
        return _load_module(model, name, dtype, empty)
    return _load_scheduler(model) if name == "scheduler" else _load_tokenizer(model, name)


def check_part(model: Model, part: str) -> torch.nn.Module | None:
    """Check by the weight files' headers that a part's tensors are all there, by name and shape; reads no tensor.

    Returns:
        `empty_part`, which that takes; None for weights in a pickle, which has no header.

    Raises:
        ModelError: naming some of what is missing, unexpected or of another shape.
    """
    files = model.weight_files(part)
    origin = model.origin(part)
    if any(is_pickle(file) for file in files):  # it is checked when it is loaded
        return None
    infos = part_infos(model, part)
    check_plain(part, origin.spec.name, {name: info.dtype for name, info in infos.items()})
    module = empty_part(model, part)
    _check_fit(model, part, module, convert(part, origin.layout, meta_tensors(infos), module))
    return module


def check_loras(model: Model) -> None:
    """Check that a model's LoRAs fit its parts, by names and shapes, before anything heavy is done.

    Raises:
        ModelError: naming some of what does not fit.
    """
    for part in WEIGHT_NAMES:
        if model.loras_of(part) or model.ip_adapters_of(part):
            module = empty_part(model, part)
            lora_loading.check(module, part, _all_loras(model, part, module), model.config("unet"))


def _all_loras(model: Model, part: str, module: torch.nn.Module) -> tuple[Lora, ...]:
    """The LoRAs that are merged into a part: those that the user names, and those that come with IP-Adapters."""
    return (*model.loras_of(part), *ip_loading.face_loras(module, model.ip_adapters_of(part)))


def check_ip_adapters(model: Model) -> None:
    """Check that a model's IP-Adapters fit its UNet, by names and shapes. Raises `ModelError`."""
    if model.ip_adapters:
        ip_loading.check(empty_part(model, "unet"), model.ip_adapters)


def load_image_prompts(model: Model, dtype: torch.dtype, *, in_engine: bool) -> tuple[dict[str, Any], Any]:
    """What a pipeline needs for a model's IP-Adapters: the image encoder, unless all are for faces, and for an engine's
    UNet what that lacks.

    Raises:
        ModelError: where any of it does not fit.
    """
    first = next((one for one in model.ip_adapters if not one.takes_faces), model.ip_adapters[0])
    parts = ip_loading.load_image_encoder(first, dtype)
    if not in_engine:
        return parts, None
    return parts, ip_loading.load_parts_for_engine(empty_part(model, "unet"), model.ip_adapters, dtype)


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
    tensors = _count_tensors(model, part)
    with quiet_libraries(), torch.device("meta"):
        try:
            _check_layers(config, tensors)
            with _at_most(tensors), _nothing_drawn():
                return build_module(model.class_name(part), config)
        except (
            Exception
        ) as error:  # the classes compute with what they are given, and check it with errors of their own
            reason = first_line(error)
            raise ModelError(
                f"the configuration of the {part} of {model.name} makes no {model.class_name(part)}: {reason}",
                hint=f"check {model.config_file(part)}, or download the model again",
            ) from error


def build_module(class_name: str, config: dict[str, Any]) -> torch.nn.Module:
    """A module of one of the classes that sdtrt knows."""
    if class_name in TEXT_CLASSES:
        import transformers

        check_kinds(config, class_defaults(class_name))
        module: torch.nn.Module = getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(config))
        return module
    import diffusers

    cls: Any = getattr(diffusers, class_name)
    check_kinds(config, class_defaults(class_name))
    module = cls.from_config(config)
    return module


def class_defaults(class_name: str) -> dict[str, Any]:
    """What a class of a model's part takes where its configuration says nothing."""
    if class_name in TEXT_CLASSES:
        import transformers

        defaults: dict[str, Any] = transformers.CLIPTextConfig().to_dict()
        return defaults
    import diffusers

    return _defaults(getattr(diffusers, class_name))


def _defaults(cls: Any) -> dict[str, Any]:
    """What a diffusers class takes where its configuration says nothing."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _count_tensors(model: Model, part: str) -> int:
    """How many tensors the weights of a part have; where no header tells, more than those of any model."""
    files = model.stored_weight_files(part)
    return len(part_infos(model, part)) if files and not any(map(is_pickle, files)) else MANY_TENSORS


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Raise `ValueError` for a number of layers above the weights' tensors (constructors make lists of that length)."""
    for name in LAYERS:
        most = max(whole_numbers(config.get(name)), default=0)
        if most > tensors:
            raise ValueError(f"{name} is {most}, and the weights have {tensors} tensors")


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Within, modules leave their weights as they are: on the meta device they have no values to be drawn.

    For what has none, PyTorch computes shapes in Python: that imports its compiler for a normal distribution, and SymPy
    for a range, which is made on the CPU here. Both take longer than the whole module.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    drawing = {torch.Tensor.normal_, torch.Tensor.uniform_}

    class Leave(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if getattr(function, "__module__", None) == "torch.nn.init" or function in drawing:
                return args[0] if args else given["tensor"]
            if function is torch.arange:
                given.setdefault("device", "cpu")
            return function(*args, **given)

    with Leave():
        yield


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Raise `ValueError` as soon as a module that is built in a `with` grows far beyond the weights it is built for.

    A number in its configuration, or a product of some, decides how large it is and how long that takes.
    """
    from torch.nn.modules import module

    own, left = threading.get_ident(), PIECES_PER_TENSOR * tensors + SOME_PIECES

    def count(*_: Any) -> None:
        nonlocal left
        if threading.get_ident() == own:
            left -= 1
            if left < 0:
                raise ValueError(f"it asks for far more layers than the {tensors} tensors of the weights make")

    hooks = [
        module.register_module_parameter_registration_hook(count),
        module.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _load_module(model: Model, part: str, dtype: torch.dtype, empty: torch.nn.Module | None) -> torch.nn.Module:
    """Build a part without memory for weights, then give it the stored tensors themselves, cast to `dtype`.

    That is what low_cpu_mem_usage does with accelerate installed, without asking for accelerate.

    Args:
        empty: what `check_part` has built.
    """
    import torch

    module, tensors = _stored_part(model, part, empty)
    wanted = module.state_dict().keys()
    cast = {name: _cast(model, part, name, tensors[name], dtype) for name in wanted}
    module.load_state_dict(cast, strict=True, assign=True)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):  # the one tensor that CLIP computes instead of storing
            positions = torch.arange(buffer.shape[-1]).expand(1, -1)
            module.get_submodule(name.rpartition(".")[0]).register_buffer("position_ids", positions, persistent=False)
    unset = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not unset, f"{part} has tensors without values: {unset}"
    module.eval().requires_grad_(False)
    if loras := _all_loras(model, part, module):
        lora_loading.merge_loras(module, part, loras, model.config("unet"), dtype)
    if adapters := model.ip_adapters_of(part):
        ip_loading.put_on(module, adapters, dtype)
    return module


def stored_tensors(model: Model, part: str) -> dict[str, torch.Tensor]:
    """A part's tensors under the names of its `state_dict()`, as they are stored: in any dtype, mapped into memory.

    Nobody has looked at their numbers: whoever takes them has to see whether they are finite.

    Raises:
        ModelError: as of `load_parts`, but for what is said of numbers.
    """
    module, tensors = _stored_part(model, part, check_part(model, part))
    return {name: tensors[name] for name in module.state_dict()}


def _stored_part(
    model: Model, part: str, empty: torch.nn.Module | None
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A part without memory for weights, and the stored tensors that fit it."""
    origin, stored = model.origin(part), _read_part(model, part)
    check_plain(
        part, origin.spec.name, {name: str(value.dtype).removeprefix("torch.") for name, value in stored.items()}
    )
    module = empty if empty is not None else empty_part(model, part)
    tensors = convert(part, origin.layout, stored, module)
    _check_fit(model, part, module, tensors)
    return module, tensors


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
    if part == "controlnet":
        return "use the ControlNet's folder, with its config.json, or one for this model"
    if part == "adapter":
        return "use another T2I-Adapter, or download it again"
    if part == "vae" and model.spec.vae is not None:
        return "use a VAE of the model's kind as --vae, best its folder with its configuration"
    single = "pass the configuration of its kind of model as --config, or " * (origin.layout == "single-file")
    return f"{single}download or convert the model again"


def _load_scheduler(model: Model) -> Any:
    """The model's own scheduler."""
    cls, config = _scheduler_class(model), scheduler_config(model)
    with quiet_libraries():
        try:
            check_kinds(config, _defaults(cls))
            return cls.from_config(config)
        except Exception as error:  # schedulers compute with what they are given
            raise _bad_scheduler(model, first_line(error)) from error


def scheduler_config(model: Model) -> dict[str, Any]:
    """The configuration of the model's own scheduler, without its class.

    Raises:
        ModelError: for numbers that a scheduler would make endless tables of.
    """
    config = model.config("scheduler")
    timesteps = config.get("num_train_timesteps", 1000)
    if not (isinstance(timesteps, int) and 1 <= timesteps <= MAX_TRAIN_TIMESTEPS):
        raise _bad_scheduler(model, f"num_train_timesteps is {timesteps!r}")
    for name, value in config.items():
        if any(abs(number) > MAX_TRAIN_TIMESTEPS for number in whole_numbers(value)):
            raise _bad_scheduler(model, f"{name} is {reprlib.repr(value)}")
    return config


def _bad_scheduler(model: Model, reason: str) -> ModelError:
    return ModelError(
        f"the configuration of the scheduler of {model.name} makes no {model.class_name('scheduler')}: {reason}",
        hint=f"check {model.config_file('scheduler')}, or use another model",
    )


def _scheduler_class(model: Model) -> Any:
    """The class of the model's own scheduler.

    Raises:
        ModelError: where diffusers has none of that name, or only with a package that is not installed.
    """
    with quiet_libraries():
        import diffusers

        name = model.class_name("scheduler")
        cls: Any = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin):
        return cls
    needed = [package for package in getattr(cls, "_backends", ()) if importlib.util.find_spec(package) is None]
    if needed:  # diffusers has a stand-in that says so
        raise ModelError(
            f"the {name} of {model.name} needs a package that is not installed: {', '.join(needed)}",
            hint=f"pip install {' '.join(needed)}; or use --scheduler, as in --scheduler euler",
        )
    raise ModelError(
        f"diffusers {diffusers.__version__} has no {name}",
        hint="pip install --upgrade diffusers; or use --scheduler, as in --scheduler euler",
    )


def _load_tokenizer(model: Model, name: str) -> Any:
    """A CLIP tokenizer from its own files, that makes no more tokens than its text encoder has positions for.

    `model_max_length` may be missing: transformers takes 1e30 then.
    """
    model.class_name(name)
    folder = model.origin(name).folder
    encoder = model.config(name.replace("tokenizer", "text_encoder"))
    positions = encoder.get("max_position_embeddings", DEFAULT_TOKENS)
    with quiet_libraries(), _copied_tokenizer(model, name) as copy:
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(str(copy), local_files_only=True)
            tokenizer.name_or_path = str(folder)
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
            _try_once(tokenizer, copy, encoder.get("vocab_size", CLIP_VOCABULARY))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = first_line(error).replace(str(copy), str(folder))
            raise ModelError(
                f"can't read the tokenizer in {folder}: {reason}", hint="download or copy the model again"
            ) from error
    return tokenizer


@contextmanager
def _copied_tokenizer(model: Model, name: str) -> Iterator[Path]:
    """The files of a tokenizer, each read once and no other, in a folder for the time of a `with`.

    transformers opens what lies in a folder, some by names that the configuration gives, and waits for whatever it is.
    """
    folder = model.origin(name).folder
    config = {key: value for key, value in model.config(name).items() if not key.endswith(("_file", "_files"))}
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(temporary_folder())
            (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
            for file in TOKENIZER_FILES:
                if os.path.lexists(folder / file):
                    (copy / file).write_bytes(read_model_file(folder / file, MAX_TOKENIZER_BYTES))
        except OSError as error:
            raise SdtrtError(
                f"can't write a copy of the tokenizer in {folder} to a temporary folder: {error.strerror}",
                hint=limit_hint(error) or "free some space there, or set TMPDIR",
            ) from error
        yield copy


_TRIED: set[str] = set()  # digests of what has passed in this process


def _try_once(tokenizer: Any, copy: Path, vocabulary: int) -> None:
    """Try a tokenizer whose files no other has had: its library never frees all that a text has taken there.

    Raises:
        ValueError: as of `_try_tokenizer`.
    """
    files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(copy.iterdir())]
    digest = hashlib.sha256(repr((files, tokenizer.model_max_length, vocabulary)).encode()).hexdigest()
    if digest not in _TRIED:
        _try_tokenizer(tokenizer, vocabulary)
        _TRIED.add(digest)


def _try_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Raise `ValueError` for a tokenizer that fails, or whose special tokens the text encoder has no rows for."""
    length = tokenizer.model_max_length
    rows = tokenizer(["", EVERY_BYTE], padding="max_length", max_length=length, truncation=True).input_ids
    if any(len(row) != length for row in rows):
        raise ValueError(f"it makes {max(map(len, rows))} tokens of a text, not {length}")
    beyond = max(rows[0])
    if beyond >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise ValueError(f"its token {token!r} is number {beyond}, and the text encoder knows {vocabulary}")


def check_words(tokenizer: Any, texts: Iterable[str], vocabulary: int) -> None:
    """Refuse texts with words that a text encoder has no row for, as tokens that were added to its tokenizer alone.

    Raises:
        ModelError: naming the first such word.
    """
    for text in texts:
        beyond = [one for one in tokenizer(text, truncation=True).input_ids if one >= vocabulary]
        if beyond:
            word = tokenizer.convert_ids_to_tokens(beyond[0])
            raise ModelError(
                f"the tokenizer of the model knows {word!r} as token {beyond[0]}, and its text encoder knows"
                f" {vocabulary} tokens",
                hint=f"leave {word} out of the prompt, or use a model whose text encoder was trained with it",
            )
