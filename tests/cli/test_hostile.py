"""Input that means harm, and moments that are bad: what is refused, what is escaped, what is left alone."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sdtrt.common.console import Console, print_table
from sdtrt.common.errors import ModelError, OutputError, SdtrtError, UsageError
from sdtrt.engines import upkeep
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import SIDECAR
from sdtrt.exports import to_file
from sdtrt.models.weights import read_header, read_json
from sdtrt.pipeline.inputs import images
from sdtrt.pipeline.inputs.images import Metadata, read_init_image
from sdtrt.pipeline.runs.saving import plan_output
from sdtrt.specs import GenerateSpec, PruneSpec

PACKAGE = Path(__file__).resolve().parents[2] / "sdtrt"
REPOSITORY = PACKAGE.parent
PICTURE = Image.new("RGB", (8, 8), "red")
KEY = {"component": "unet", "precision": "fp32", "backend": "onnxruntime"}


def calls():
    """Every call and import in the package: (file, what is called or imported)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func), node
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                yield path.relative_to(PACKAGE).as_posix(), getattr(node, "module", None) or node.names[0].name, node


def test_pickle_is_read_in_one_place_that_asks_first_and_nothing_is_evaluated():
    names = {(file, name) for file, name, _ in calls()}
    assert {file for file, name in names if name in ("pickle", "torch.load")} == {"models/weights.py"}
    forbidden = ("eval", "exec", "marshal", "shelve", "dill", "cloudpickle", "joblib", "os.system", "yaml.load")
    assert [pair for pair in names if pair[1] in forbidden] == []
    words = [keyword.arg for _, _, node in calls() if isinstance(node, ast.Call) for keyword in node.keywords]
    assert "trust_remote_code" not in words
    assert "shell" not in words


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;owned\x07", "a\rb", "\u202eexe.png", "\x9b31m", "\x00"])
def test_no_terminal_obeys_what_a_file_says(text, capsys):
    error = SdtrtError(f"no {text}", hint=text)
    Console().note(text)
    Console().warn(text)
    print_table(("name",), [(text,)])
    said = "".join(capsys.readouterr()) + error.message + error.hint
    assert said.replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "\xff", "[1]", ""])
def test_json_of_nonsense_is_a_model_error(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ModelError):
        read_json(path)
    header = text.encode("latin-1")
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError):
        read_header(tmp_path / "x.safetensors")


def test_no_image_format_starts_another_program(tmp_path):
    path = tmp_path / "init.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    with pytest.raises(UsageError, match="in no image format that sdtrt reads"):
        read_init_image(path)


def test_fields_that_would_take_for_ever_to_search_are_a_prompt():
    text = "prompt\n" + "a " * 100_000
    start = time.monotonic()
    assert images.parse_parameters(text).fields == {}
    assert time.monotonic() - start < 2


def save(plan, prompt="x"):
    return plan.save(PICTURE, Metadata(prompt, {}), prompt=prompt, seed=1)


def test_overwriting_a_link_replaces_the_link_and_nothing_else(tmp_path):
    target = tmp_path / "elsewhere.png"
    target.write_bytes(b"precious")
    link = tmp_path / "link.png"
    link.symlink_to(target)
    with pytest.raises(OutputError, match="exists"):
        plan_output(link, count=1, overwrite=False)
    save(plan_output(link, count=1, overwrite=True))
    assert target.read_bytes() == b"precious"
    assert not link.is_symlink()
    assert Image.open(link).size == (8, 8)


def test_a_prompt_never_names_another_folder(tmp_path):
    for prompt in ("../../etc/passwd", "/etc/passwd", "..", "a/b\\c", "\x00", "con", "~", "$HOME", "😀" * 5000):
        assert save(plan_output(tmp_path / "out", count=1, overwrite=False), prompt).parent == tmp_path / "out"


def test_a_hundred_thousand_characters_are_a_prompt(tmp_path):
    for prompt in ("word " * 20_000, "x" * 100_000, "😀" * 100_000, "\x1b" * 100_000):
        GenerateSpec((prompt,))
        path = save(plan_output(tmp_path, count=1, overwrite=False), prompt)
        assert len(path.name.encode()) < 255
        assert images.read_metadata(path).parameters == prompt


def test_an_export_does_not_overwrite_what_came_into_being_meanwhile(tmp_path):
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "unet.onnx").write_bytes(b"new")
    target = tmp_path / "unet.onnx"
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="has come into being meanwhile"):
        to_file._move_into_place(draft, target, overwrite=False)
    assert target.read_bytes() == b"mine"
    to_file._move_into_place(draft, target, overwrite=True)
    assert target.read_bytes() == b"new"


# --------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """In an empty folder, whose engine directory is what is used."""
    monkeypatch.chdir(tmp_path)
    return run


def fill(folder: Path) -> EngineDirectory:
    """An engine directory with three entries: whole, with a flipped bit, without its sidecar."""
    directory = EngineDirectory(folder)
    for name in ("whole", "flipped", "headless"):
        directory.obtain("engine", KEY | {"weights": name}, lambda f: (f / "engine.onnx").write_bytes(b"abc") and {})
    entries = {entry.key["weights"]: entry for entry in directory.entries()}
    entries["flipped"].file("engine.onnx").write_bytes(b"abd")
    (entries["headless"].path / SIDECAR).unlink()
    return directory


def test_engines_verify_finds_damage_and_prune_removes_it(run, tmp_path):
    fill(tmp_path / "engines")
    code, out, err = run("engines", "verify", "--json")
    found = {entry["name"]: entry for entry in json.loads(out)["entries"]}
    assert code == 1
    assert sorted(entry["state"] for entry in found.values()) == ["damaged", "damaged", "ok"]
    assert "2 of 3 entries are damaged" in err
    code, out, _ = run("engines", "verify")
    assert code == 1
    assert "entry.json is missing" in out
    assert "its content is not what was published" in out
    code, out, _ = run("engines", "prune", "--damaged", "--dry-run", "--json")
    assert len(json.loads(out)["removed"]) == 2
    assert run("engines", "prune", "--damaged", "--quiet")[0] == 0
    assert run("engines", "verify", "--quiet")[0] == 0


def test_engines_rm_takes_damaged_entries_and_spares_what_is_used(run, tmp_path):
    directory = fill(tmp_path / "engines")
    damaged = [one.name for one in upkeep.check(directory) if one.state == "damaged"]
    assert run("engines", "rm", *damaged)[0] == 0
    (entry,) = directory.entries()
    with entry.hold():
        code, out, err = run("engines", "prune", "--keep-gib", "0")
        assert (code, out) == (0, "")
        assert f"{entry.name} is in use: it stays" in err
        assert run("engines", "rm", entry.name)[0] == 1
    assert run("engines", "prune", "--keep-gib", "0")[1] == f"{entry.name}\n"


def test_prune_leaves_what_is_mended_or_used_while_it_looks(tmp_path, monkeypatch):
    directory = fill(tmp_path / "engines")
    (sound,) = (one.name for one in upkeep.check(directory) if one.state == "ok")
    (flipped,) = (one.name for one in upkeep.check(directory) if "content" in one.problem)
    real = upkeep.check

    def check(where):
        yield from real(where)
        key = json.loads((where.path / flipped / SIDECAR).read_text())["key"]
        where.obtain("engine", key, lambda f: (f / "engine.onnx").write_bytes(b"abc") and {}, force=True)
        where.touch(where.named(sound))

    monkeypatch.setattr(upkeep, "check", check)
    pruned = upkeep.prune(directory, PruneSpec(keep_bytes=0, damaged=True), lambda entry: False)
    assert not {sound, flipped} & set(pruned.removed)
    assert len(pruned.removed) == 1  # the one without a sidecar
    assert {entry.name for entry in directory.entries()} == {sound, flipped}


def test_entries_of_another_format_are_listed_as_such_and_go_with_foreign(run, tmp_path):
    directory = fill(tmp_path / "engines")
    (entry,) = (directory.named(one.name) for one in upkeep.check(directory) if one.state == "ok")
    (entry.path / SIDECAR).write_text(json.dumps({"format": 99}))
    _, out, _ = run("engines", "list")
    assert f"{entry.name}  (of another version of sdtrt)" in out
    listed = json.loads(run("engines", "list", "--json")[1])
    assert [one["name"] for one in listed["foreign"]] == [entry.name]
    assert entry.name not in [one["name"] for one in listed["entries"]]
    code, _, err = run("inspect", "--engine", entry.name)
    assert code == 1
    assert "another version of sdtrt" in err
    assert run("engines", "prune", "--dry-run")[1] == ""
    assert entry.name in run("engines", "prune", "--foreign")[1].split()
    assert not entry.path.exists()


def test_the_hint_for_a_directory_that_all_can_change_brings_its_engines_back(run, tmp_path):
    directory = EngineDirectory(tmp_path / "my engines")
    directory.obtain("engine", KEY, lambda f: (f / "engine.onnx").write_bytes(b"abc") and {})
    (entry,) = directory.entries()
    where = ("--engine-dir", str(directory.path))
    subprocess.run(["chmod", "-R", "a+w", directory.path], check=True)
    code, _, err = run("engines", "list", *where)
    assert code == 1
    mend = re.search("hint: (.+), or name another", err)[1]
    subprocess.run(["chmod", "go-w", directory.path], check=True)  # half of it
    code, out, err = run("engines", "list", *where)
    assert (code, out) == (0, "")
    assert "1 of the entries" in err
    assert mend in err
    assert "has no engines yet" not in err
    code, out, err = run("engines", "verify", "--json", *where)
    assert code == 1
    assert [one["state"] for one in json.loads(out)["entries"]] == ["unsafe"]
    assert f"hint: {mend}, if nobody has; else sdtrt engines rm {entry.name}" in err
    assert json.loads(run("doctor", "--json", *where)[1])["healthy"]
    assert run("engines", "prune", "--damaged", *where)[1] == ""
    subprocess.run(["sh", "-c", mend], check=True)
    assert entry.name in run("engines", "list", *where)[1]
    assert run("engines", "verify", *where)[0] == 0


def test_folders_of_others_are_no_damaged_entries(run, tmp_path):
    mine = tmp_path / "engines" / "mine"
    mine.mkdir(parents=True)
    (mine / "entry.json").write_text("{}")
    assert run("engines", "verify")[0] == 0
    assert run("engines", "prune", "--damaged")[1] == ""
    assert mine.exists()


def test_options_before_a_subcommand_of_engines_are_refused(run, tmp_path):
    """They would not reach it, and it would work on another directory."""
    fill(tmp_path / "engines")
    code, out, err = run("engines", "--engine-dir", tmp_path / "other", "prune", "--keep-gib", "0")
    assert (code, out) == (2, "")
    assert "sdtrt engines prune" in err


def test_what_others_can_change_is_used_only_when_asked_to(run, tmp_path):
    fill(tmp_path / "engines").path.chmod(0o777)
    code, _, err = run("engines")
    assert code == 1
    assert "--trust-engine-dir" in err
    assert run("engines", "--trust-engine-dir")[0] == 0
    code, out, _ = run("doctor", "--json")
    assert "is not safe" in out  # the table would break a long path's line anywhere


def run_program(code: str) -> subprocess.CompletedProcess[bytes]:
    """Run Python code in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        timeout=60,
        check=False,
        env=environment,
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c() -> None:
    """Let a child be interrupted even where these tests run in a shell's background, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_path_of_any_bytes_goes_out_as_it_came(tmp_path):
    (tmp_path / "engines").mkdir()
    code = (
        "import os, sys; from sdtrt.cli import main as cli\n"
        "name = os.fsdecode(b'\\xff.png')\n"
        "cli.app = lambda **_: print(name)\n"
        "cli.main()"
    )
    ended = run_program(code)
    assert (ended.returncode, ended.stdout) == (0, b"\xff.png\n"), ended.stderr


@pytest.mark.parametrize(
    "lost",
    [
        "torch.tensor(Sequence())",  # ValueError: could not determine the shape of object type 'Sequence'
        "Deleted(); time.sleep(100)",  # Exception ignored in: <function Deleted.__del__>
        "collected = weakref.ref(Any(), press); time.sleep(100)",
    ],
)
def test_ctrl_c_ends_the_command_where_a_library_would_lose_it(lost):
    code = f"""
import signal, time, weakref, torch
from sdtrt.cli import main as cli
from sdtrt.__main__ import main

def press(*_): signal.raise_signal(signal.SIGINT)
class Any: pass
class Sequence:
    def __len__(self): press()
    def __getitem__(self, index): return 0
class Deleted:
    def __del__(self): press()

def app(**_): {lost}
cli.app = app
main()
"""
    ended = run_program(code)
    assert ended.returncode == -signal.SIGINT, ended.stderr
    assert ended.stderr.startswith(b"error: interrupted\n")


@pytest.mark.parametrize("error", ["OSError(28, 'No space left on device')", "MemoryError()", "ValueError('a bug')"])
def test_what_fails_without_ctrl_c_is_what_it_is(error):
    code = (
        "import sdtrt.cli.main as outermost\nfrom sdtrt.__main__ import main\n"
        f"def app(**_): raise {error}\noutermost.app = app; main()"
    )
    ended = run_program(code)
    assert ended.returncode == 1
    assert b"interrupted" not in ended.stderr
