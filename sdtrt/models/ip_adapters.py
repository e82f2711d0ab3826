"""IP-Adapters that a user names: found with their image encoders, and told by their tensors' names whether they fit.

Those for faces (FaceID) have no image encoder: users bring embeddings. Copies no tensor: what does is `ip_loading`.
Knows names of tensors, and no module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrt.common.console import Console
from sdtrt.common.errors import ModelError, quote
from sdtrt.models import ip_files
from sdtrt.models.hub import Repo, is_repo_id, refuse_address
from sdtrt.models.loras import kind_of_width, require_peft
from sdtrt.models.origins import has_weight_suffix, local_path
from sdtrt.models.weights import TensorInfo, allows, is_pickle, read_json
from sdtrt.specs import ModelSpec
from sdtrt.specs.image_prompts import cross_attentions

HINT = (
    "pass a .safetensors file, its folder, or a hub id with it, as in"
    " --ip-adapter h94/IP-Adapter/models/ip-adapter_sd15.safetensors"
)
OTHER = "use an IP-Adapter that was made for the model's kind, or another --model"
ENCODER = "image_encoder"
FOLDERS = {False: "models", True: "sdxl_models"}  # of the authors' repository, by whether it is SDXL
USUAL = ("ip-adapter_sd15.safetensors", "ip-adapter_sdxl.safetensors")
BASE_TOKENS = 4  # of one picture; no file says it
Fetch = Callable[[Sequence[str], str], Path]


@dataclass(frozen=True)
class IpAdapter:
    """An IP-Adapter that was found.

    Args:
        path: of its file.
        encoder: the folder of its image encoder; None for one that takes embeddings of faces.
        tokens: that it makes of a picture, or of a face.
        width: of the embeddings that it takes.
        has_lora: whether its file has a LoRA of the UNet besides, as those for faces do.
    """

    path: Path
    encoder: Path | None
    tokens: int
    width: int
    has_lora: bool = False

    @property
    def name(self) -> str:
        """What people call it."""
        return self.path.stem

    @property
    def takes_faces(self) -> bool:
        """Whether it takes embeddings of faces, which no image encoder makes."""
        return self.encoder is None

    @property
    def encoder_files(self) -> tuple[Path, ...]:
        """The files that its image encoder is read from; none for faces."""
        return () if self.encoder is None else (self.encoder / "config.json", self.encoder / "model.safetensors")


def find_ip_adapters(
    spec: ModelSpec, unet: Mapping[str, Any], is_sdxl: bool, console: Console
) -> tuple[IpAdapter, ...]:
    """The IP-Adapters that a user names for a model.

    Args:
        unet: the configuration of its UNet.

    Raises:
        UsageError, ModelError: where there is none, it can't be read, or is for another kind of model; where it lacks
            its image encoder, or all have not the same one.
    """
    found = tuple(_found(spec, name, unet, is_sdxl, console) for name in spec.ip_adapters)
    encoders = {one.encoder.resolve(): one for one in reversed(found) if one.encoder is not None}
    if len(encoders) > 1:
        other, first, *_ = encoders.values()
        raise ModelError(
            f"{first.path} and {other.path} have image encoders of their own, and a pipeline has one",
            hint="use adapters of one folder, or of one kind",
        )
    return found


def _found(spec: ModelSpec, name: str, unet: Mapping[str, Any], is_sdxl: bool, console: Console) -> IpAdapter:
    path, file, fetch = _place(spec, name, is_sdxl, console)
    if is_pickle(path) and not allows(spec, path.name):
        raise ModelError(
            f"{path} is a pickle file, and reading pickle can run any code",
            hint=f"use its .safetensors, or if you trust it: --allow-pickle {quote(path.name)}",
        )
    infos = ip_files.infos_of(path)
    _check_kind(path, infos, spec, unet)
    if (face := _face(path, infos)) is not None:
        width, tokens = face
        return IpAdapter(path, None, tokens, width, has_lora=any(map(ip_files.is_of_lora, infos)))
    what, width, wanted = _taken(path, infos)
    encoder, config = _encoder(path, file, what, width, fetch)
    return IpAdapter(path, encoder, wanted or (config["image_size"] // config["patch_size"]) ** 2 + 1, width)


def _check_kind(path: Path, infos: Mapping[str, TensorInfo], spec: ModelSpec, unet: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a file that is no IP-Adapter, or one for another UNet."""
    odd = [name for name in infos if not name.startswith(("image_proj.", "ip_adapter."))]
    first = infos.get("ip_adapter.1.to_k_ip.weight")
    if odd or first is None or len(first.shape) != 2:
        some = f": it has {odd[0]}" if odd else ": it has no ip_adapter.1.to_k_ip.weight"
        raise ModelError(f"{path} is no IP-Adapter{some}", hint=HINT)
    width, text = first.shape[1], unet.get("cross_attention_dim")
    if width not in (text if isinstance(text, list) else (text,)):
        raise ModelError(f"{path} is for {kind_of_width(width)}, and {spec.name} is {kind_of_width(text)}", hint=OTHER)
    wanted = cross_attentions(unet)
    names = {f"ip_adapter.{2 * at + 1}.to_{one}_ip.weight" for at in range(wanted) for one in "kv"}
    own = {name for name in infos if name.startswith("ip_adapter.") and not ip_files.is_of_lora(name)}
    if differing := sorted(own ^ names):
        raise ModelError(
            f"{path} is for another UNet: {len(own) // 2} attentions, and that of {spec.name} has {wanted}"
            f" ({differing[0]})",
            hint=OTHER,
        )


def _face(path: Path, infos: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """How wide the embeddings of faces are that an adapter takes, and how many tokens it makes of one; None for one
    that takes pictures. By diffusers' rules of which kind a file is."""
    shapes = {name.removeprefix("image_proj."): one.shape for name, one in infos.items()}
    if "perceiver_resampler.proj_in.weight" in shapes:
        raise ModelError(
            f"{path} takes embeddings of faces together with pictures of them (FaceID Plus)",
            hint="use a FaceID file; or in Python pipe.load_ip_adapter and sdtrt.accelerate, as diffusers' guide says",
        )
    if "norm.weight" not in shapes or {"proj.weight", "proj.3.weight", "latents"} & shapes.keys():
        return None
    first, second, norm = (shapes.get(name, ()) for name in ("proj.0.weight", "proj.2.weight", "norm.weight"))
    if len(first) != 2 or len(second) != 2 or not norm or not all(norm) or second[0] % norm[0]:
        raise ModelError(
            f"{path} takes embeddings of faces, and has no projection of them that diffusers reads", hint=HINT
        )
    if any(map(ip_files.is_of_lora, infos)):
        require_peft()
    return first[1], second[0] // norm[0]


def _taken(path: Path, infos: Mapping[str, TensorInfo]) -> tuple[str, int, int | None]:
    """What an adapter takes of its image encoder (a number of that one's configuration), how wide that is, and how
    many tokens it makes of a picture, None for one each; by diffusers' rules of which kind a file is."""
    shapes = {name.removeprefix("image_proj."): one.shape for name, one in infos.items()}
    if "proj.weight" in shapes:
        return "projection_dim", shapes["proj.weight"][1], BASE_TOKENS
    if "proj.3.weight" in shapes:
        return "hidden_size", shapes["proj.0.weight"][1], None
    if "latents" not in shapes or "proj_in.weight" not in shapes:
        raise ModelError(f"{path} has no projection of images that diffusers reads", hint=HINT)
    return "hidden_size", shapes["proj_in.weight"][1], shapes["latents"][1]


def _encoder(path: Path, file: str, what: str, width: int, fetch: Fetch) -> tuple[Path, Mapping[str, Any]]:
    """The folder and configuration of the image encoder that an adapter was trained with.

    It lies beside the adapter, or, as the authors' repository has it for some of SDXL's, beside those of SD 1.x.
    """
    own = f"{Path(file).parent.as_posix()}/{ENCODER}".removeprefix("./")
    seen: list[str] = []
    for folder in dict.fromkeys((own, f"models/{ENCODER}", ENCODER)):
        config_file = fetch((f"{folder}/config.json",), "configuration of the image encoder") / folder / "config.json"
        if not config_file.is_file():
            continue
        config = {"projection_dim": 512, "hidden_size": 768, "image_size": 224, "patch_size": 32}
        config |= read_json(config_file)
        if config[what] == width:
            root = fetch((f"{folder}/config.json", f"{folder}/model.safetensors"), "image encoder")
            if (root / folder / "model.safetensors").is_file():
                return root / folder, config
            raise ModelError(f"{root / folder} has no model.safetensors", hint="download the image encoder again")
        seen.append(f"{folder} gives {config[what]}")
    if seen:
        raise ModelError(f"{path} takes image embeddings of width {width}, and {', '.join(seen)}", hint=_NEEDS)
    raise ModelError(f"{path} has no image encoder beside it", hint=_NEEDS)


_NEEDS = f"put the folder {ENCODER} that it was trained with beside it, as h94/IP-Adapter has it"


# --- where it lies -----------------------------------------------------------------------------------------------


def _place(spec: ModelSpec, name: str, is_sdxl: bool, console: Console) -> tuple[Path, str, Fetch]:
    """An adapter's file, its place below a root, and what has other files be there, and gives that root."""
    path = local_path(name)
    if path is not None and path.is_dir():
        files = [one.relative_to(path).as_posix() for one in path.glob("*.safetensors")]
        files += [one.relative_to(path).as_posix() for one in path.glob("*models/*.safetensors")]
        file = _chosen(name, files, is_sdxl)
        return path / file, file, lambda *_: path
    if path is not None:
        root = path.absolute().parent.parent
        return path, path.absolute().relative_to(root).as_posix(), lambda *_: root
    owner, _, rest = name.partition("/")
    repo_name, _, file = rest.partition("/")
    is_id = is_repo_id(f"{owner}/{repo_name}") and not has_weight_suffix(repo_name)
    if not is_id or local_path(owner) is not None or (file and not has_weight_suffix(file)):
        refuse_address(name, "--ip-adapter", HINT)
        raise ModelError(f"there is no IP-Adapter at {name}", hint=HINT)
    return _on_hub(Repo(f"{owner}/{repo_name}", None, spec.offline, console), file, is_sdxl)


def _on_hub(repo: Repo, file: str, is_sdxl: bool) -> tuple[Path, str, Fetch]:
    """The same of the hub."""
    file = file or _chosen(repo.repo_id, repo.files() or USUAL_PATHS, is_sdxl)
    folder = repo.fetch((file,), "IP-Adapter", large=True)
    if not (folder / file).is_file():
        raise ModelError(f"{repo.repo_id} has no file {file}", hint=HINT)
    return folder / file, file, lambda patterns, what: repo.fetch(patterns, what, large=True)


USUAL_PATHS = tuple(f"{FOLDERS[index == 1]}/{name}" for index, name in enumerate(USUAL))


def _chosen(name: str, files: Iterable[str], is_sdxl: bool) -> str:
    """The one file of a folder that an adapter for a kind of model may be."""
    there = sorted(one for one in files if one.endswith(".safetensors") and ENCODER not in one)
    fitting = [one for one in there if Path(one).name == USUAL[is_sdxl]] or there
    if len(fitting) == 1:
        return fitting[0]
    if not there:
        raise ModelError(f"{name} has no .safetensors file of an IP-Adapter", hint=HINT)
    raise ModelError(
        f"{name} has {len(there)} IP-Adapters ({', '.join(there[:3])}{', …' * (len(there) > 3)})",
        hint=f"name one: --ip-adapter {quote(f'{name}/{there[0]}')}",
    )
