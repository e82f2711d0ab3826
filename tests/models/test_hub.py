"""Hub models through the real client: what is fetched, from the cache alone, and what every refusal says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import sd1_folder, sd1_single_file
from hub_server import COMMIT, Hub, serve
from safetensors.torch import load_file, save_file

from sdtrt.models.hub import is_repo_id

ROOT = Path(__file__).parents[2]
# huggingface_hub reads its settings when it is imported, so every case is a process of its own.
SCRIPT = """
import json, sys
from sdtrt.common.console import Console
from sdtrt.common.errors import SdtrtError
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import LoraSpec, ModelSpec
spec, parts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
try:
    spec["loras"] = tuple(map(LoraSpec.parse, spec.get("loras", ())))
    model = resolve_model(ModelSpec(**spec), Console(quiet=not sys.argv[3]))
    files = [str(path) for part in parts for path in model.weight_files(part)]
    print(json.dumps({"source": str(model.source), "parts": model.parts, "files": files,
                      "loras": [str(one.path) for one in model.loras]}))
except SdtrtError as error:
    print(json.dumps({"message": error.message, "hint": error.hint, "exit_code": error.exit_code}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as its author uploads it: also in fp16 as a variant, and with a pickle beside."""
    path = sd1_folder(tmp_path_factory.mktemp("hub") / "model")
    other = sd1_folder(tmp_path_factory.mktemp("hub") / "other", seed=1)
    weights = "unet/diffusion_pytorch_model"
    shutil.copy(other / f"{weights}.safetensors", path / f"{weights}.fp16.safetensors")
    (path / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (path / "README.md").write_text("a model card")
    return path


@pytest.fixture
def hub(folder):
    repos = {"owner/model": folder, "owner/other": folder, "owner/vae": folder / "vae", "owner/gated": "GatedRepo"}
    with serve(repos) as served:
        yield served


def ask(
    home: Path,
    spec: dict,
    parts: tuple[str, ...] = (),
    *,
    url: str = "http://127.0.0.1:9",
    note: str = "",
    **environment: str,
):
    """Resolve a model in a fresh process, and get its parts' weights; `note`: what it has to say, where it speaks."""
    variables = {name: value for name, value in os.environ.items() if not name.lower().endswith("proxy")}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(spec), json.dumps(parts), "speak" if note else ""]
    result = subprocess.run(command, env={**variables, **environment}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    if note:
        assert note in result.stderr
        return json.loads(result.stdout)
    assert not result.stderr, "a quiet console keeps the client's bars and warnings away"
    return json.loads(result.stdout)


def hub_cache(home: Path, folder: Path, names: tuple[str, ...]) -> Path:
    """A hub cache with some of a model's files, laid out as huggingface_hub does; returns the snapshot's folder."""
    repo = home / "hub" / "models--owner--model"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "refs").mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(names):
        blob = repo / "blobs" / f"{number:040x}"
        shutil.copy(folder / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def configs(folder: Path) -> tuple[str, ...]:
    """The files of a model that say what it is."""
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".txt")]
    return tuple(path.relative_to(folder).as_posix() for path in files)


def test_fetches_only_the_parts_that_are_asked_for(hub: Hub, folder, tmp_path):
    answer = ask(tmp_path, {"name": "owner/model"}, url=hub.url)
    assert sorted(hub.downloads) == sorted(configs(folder)), "resolving takes the configuration alone"
    assert answer["parts"] == ["tokenizer", "text_encoder", "unet", "vae", "scheduler"]

    hub.downloads.clear()
    answer = ask(tmp_path, {"name": "owner/model"}, ("unet",), url=hub.url)
    assert hub.downloads == ["unet/diffusion_pytorch_model.safetensors"]
    assert Path(answer["files"][0]).read_bytes() == (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()

    hub.downloads.clear()
    ask(tmp_path, {"name": "owner/model", "variant": "fp16"}, ("unet",), url=hub.url)
    assert hub.downloads == ["unet/diffusion_pytorch_model.fp16.safetensors"]


def test_a_part_without_the_variant_is_fetched_as_it_is(hub: Hub, folder, tmp_path):
    """The unet has it, the vae has not; what is in the cache by then is not taken for all that there is."""
    plain = "unet/diffusion_pytorch_model.safetensors"
    ask(tmp_path, {"name": "owner/model"}, ("unet",), url=hub.url)
    for _ in range(2):
        hub.downloads.clear()
        answer = ask(tmp_path, {"name": "owner/model", "variant": "fp16"}, ("unet", "vae"), url=hub.url, note="vae of")
        names = [Path(file).relative_to(answer["source"]).as_posix() for file in answer["files"]]
        assert names == [plain.replace(".safe", ".fp16.safe"), "vae/diffusion_pytorch_model.safetensors"]
    assert hub.downloads == [], "the second time there is nothing to fetch"
    offline = ask(tmp_path, {"name": "owner/model", "variant": "fp16", "offline": True}, ("unet", "vae"), note="vae of")
    assert offline == answer


@pytest.mark.parametrize("vae", ["owner/vae", "owner/other"], ids=["alone", "of a model"])
def test_a_vae_is_fetched_from_where_it_lies(hub: Hub, folder, tmp_path, vae):
    answer = ask(tmp_path, {"name": "owner/model", "vae": vae}, ("vae",), url=hub.url)
    place = "vae/" if vae == "owner/other" else ""
    fetched = [name for name in hub.downloads if name not in configs(folder)]
    assert f"{place}diffusion_pytorch_model.safetensors" in hub.downloads
    assert [name for name in fetched if name.endswith(".safetensors")] == fetched or not place
    (file,) = answer["files"]
    assert file.endswith(f"/{place}diffusion_pytorch_model.safetensors")
    assert f"models--{vae.replace('/', '--')}" in file


def test_a_lora_is_fetched_and_nothing_else_of_its_repository(folder, tmp_path):
    """Of a repository with several files, the one that is named."""
    tensors = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 32)}
    for name in ("one/style.safetensors", "two/a.safetensors", "two/b.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors, tmp_path / name)
    (tmp_path / "one" / "sub").mkdir()
    (tmp_path / "one" / "picture.png").write_bytes(b"no")
    repos = {"owner/lora": tmp_path / "one", "owner/loras": tmp_path / "two"}
    with serve(repos) as served:
        answers = [
            ask(tmp_path / "home", {"name": str(folder), "loras": [text]}, url=served.url)
            for text in ("owner/lora:0.5", "owner/loras/b.safetensors", "owner/loras")
        ]
        downloads = {name.rpartition("/")[2] for name in served.downloads}
    assert [Path(answer["loras"][0]).name for answer in answers[:2]] == ["style.safetensors", "b.safetensors"]
    assert downloads == {"style.safetensors", "b.safetensors"}
    assert "has 2 .safetensors files" in answers[2]["message"]
    assert "--lora owner/loras/a.safetensors" in answers[2]["hint"]
    cached = ask(tmp_path / "home", {"name": str(folder), "loras": ["owner/lora"], "offline": True})
    assert cached["loras"] == answers[0]["loras"]


def test_a_single_file_gets_what_it_lacks_from_the_hub(hub: Hub, folder, tmp_path):
    file = sd1_single_file(tmp_path / "whole.safetensors")
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith("cond_stage_model.")}
    save_file(tensors, tmp_path / "part.safetensors")
    spec = {"name": str(tmp_path / "part.safetensors"), "config": "owner/model"}
    answer = ask(tmp_path, spec, ("unet", "text_encoder"), url=hub.url)
    assert [name for name in hub.downloads if name.endswith(".safetensors")] == ["text_encoder/model.safetensors"]
    assert answer["files"][0] == spec["name"]


def test_all_parts_are_of_one_commit(hub: Hub, tmp_path):
    ask(tmp_path, {"name": "owner/model"}, ("unet", "vae"), url=hub.url)
    assert hub.lookups.count("main") == 1, "the branch may move while parts are fetched"


def test_sends_the_users_token(hub: Hub, tmp_path):
    ask(tmp_path, {"name": "owner/model"}, url=hub.url, HF_TOKEN="hf_secret")
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ({"name": "owner/nothing"}, "the hub has no model owner/nothing", "check the spelling"),
        ({"name": "owner/gated"}, "owner/gated is gated", "accept its licence at https://huggingface.co/owner/gated"),
        ({"name": "owner/model", "revision": "v9"}, "owner/model has no revision 'v9'", "branches and tags"),
        ({"name": "owner/model", "variant": "int8"}, "no int8 weights for its unet", "--variant"),
    ],
)
def test_refusals_say_what_to_do(hub: Hub, tmp_path, spec, message, hint):
    answer = ask(tmp_path, spec, ("unet",), url=hub.url)
    assert message in answer["message"]
    assert hint in answer["hint"]
    assert answer["exit_code"] == 1


def test_works_from_the_cache_when_offline(folder, tmp_path):
    weights = "unet/diffusion_pytorch_model.safetensors"
    snapshot = hub_cache(tmp_path, folder, (*configs(folder), weights))
    answer = ask(tmp_path, {"name": "owner/model"}, ("unet",), HF_HUB_OFFLINE="1")
    assert answer["source"] == str(snapshot)
    assert answer["files"] == [str(snapshot / weights)]

    missing = ask(tmp_path, {"name": "owner/model", "offline": True}, ("vae",))
    assert missing["message"] == "vae weights of owner/model: not in the hub cache, and the hub is switched off"
    assert "hf download owner/model" in missing["hint"]


def test_says_when_nothing_is_cached(tmp_path):
    offline = ask(tmp_path, {"name": "owner/model"}, HF_HUB_OFFLINE="1")
    assert "not in the hub cache, and the hub is switched off" in offline["message"]
    unreachable = ask(tmp_path, {"name": "owner/model"})
    assert "not in the hub cache, and the download failed" in unreachable["message"]
    assert "network" in unreachable["hint"]


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", True),
        ("CompVis/sd.1_4", True),
        ("tiny", False),
        ("a/b/c", False),
        ("../weights", False),
        ("owner/..", False),
        ("owner/a b", False),
        ("~/model", False),
        ("owner/", False),
    ],
)
def test_recognises_hub_ids(name, fits):
    assert is_repo_id(name) is fits
