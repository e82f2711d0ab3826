"""The command line as people meet it: the real one, in a process and a folder of its own, with the real miniature."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixel_checker import Scene, Shape, judge

from sdtrt import __version__
from sdtrt.common import host
from sdtrt.common.errors import SdtrtError
from sdtrt.engines import digests

PROMPT = "a red circle on a blue background"
RED_ON_BLUE = Scene((Shape("circle", "red"),), background="blue")
REPOSITORY = Path(__file__).resolve().parents[2]
TWO_COMPONENTS = ("--component", "vae_decoder", "--component", "text_encoder")
FAST = ("--steps", "2", "--seed", "1", "--quiet")  # pictures that nobody looks at


def process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run `python -m sdtrt` in a process of its own."""
    command = [sys.executable, "-m", "sdtrt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)


def cpu_seconds() -> float:
    """Processor seconds of the child processes that have ended: what a command costs, whatever else runs here."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("how", ["here", pytest.param("process", marks=pytest.mark.slow)])
def test_the_first_command_makes_the_picture_and_a_second_one_the_same(folder, run, how):
    """The second one is a process of its own; the first one is it where there is time for that."""
    words = ("txt2img", "-p", PROMPT, "--seed", "1", "-o", "circle.png")
    if how == "process":
        first = process(*words)
        code, out, err = first.returncode, first.stdout, first.stderr
    else:
        code, out, err = run(*words)
    assert (code, out) == (0, "circle.png\n"), err
    assert "backend: " in err
    assert judge(Image.open("circle.png"), RED_ON_BLUE).all_right

    before = cpu_seconds()
    second = process("txt2img", "-p", PROMPT, "--seed", "1", "-o", "again.png", "--no-build")
    seconds = cpu_seconds() - before
    assert second.returncode == 0, second.stderr
    assert Path("again.png").read_bytes() == Path("circle.png").read_bytes()
    assert seconds < 15


def test_help_is_quick_and_loads_neither_torch_nor_diffusers(folder):
    before = cpu_seconds()
    assert process("--help").returncode == 0
    assert cpu_seconds() - before < 0.7
    code = (
        "import sys; sys.argv = ['sdtrt', 'txt2img', '--help']\n"
        "from sdtrt.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "sys.exit(code or len({'torch', 'diffusers', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_json_is_one_document_with_all_that_repeats_the_images(folder, run):
    code, out, _ = run("txt2img", "-p", PROMPT, "-p", "a star", "--num-images", "2", "-o", "out", "--json", *FAST)
    assert code == 0
    report = json.loads(out)
    assert [(image["prompt"], image["seed"]) for image in report["images"]] == [
        (PROMPT, 1),
        (PROMPT, 2),
        ("a star", 1),
        ("a star", 2),
    ]
    assert all(Path(image["path"]).is_file() for image in report["images"])
    assert report["steps"] == 2
    assert report["backend"] in ("onnxruntime", "torch", "tensorrt", "tensorrt-rtx")


def test_one_seed_gives_one_image_whatever_else_is_made(folder, run):
    assert run("txt2img", "-p", PROMPT, "--num-images", "2", "-o", "many", *FAST)[0] == 0
    code, out, _ = run("txt2img", "-p", PROMPT, "-o", "alone.png", "--steps", "2", "--seed", "2", "--quiet")
    assert code == 0
    assert out == "alone.png\n"
    twin = next(path for path in Path("many").iterdir() if path.stem.endswith("2"))
    assert np.array_equal(np.asarray(Image.open(twin)), np.asarray(Image.open("alone.png")))


def test_img2img_keeps_the_size_and_starts_from_the_image(folder, run):
    Image.new("RGB", (136, 104), (40, 70, 230)).save("init.png")
    code, out, _ = run("img2img", "-i", "init.png", "-p", PROMPT, "--strength", "0.5", "-o", "out.png", "--steps", "4")
    assert (code, out) == (0, "out.png\n")
    assert Image.open("out.png").size == (136, 104)


def test_inpaint_makes_what_the_mask_covers(folder, run):
    Image.new("RGB", (136, 104), (40, 70, 230)).save("init.png")
    mask = Image.new("L", (136, 104))
    mask.paste(255, (32, 32, 72, 72))
    mask.save("mask.png")
    arguments = (
        "-i",
        "init.png",
        "--mask",
        "mask.png",
        PROMPT,
        "--strength",
        "0.5",
        "--steps",
        "4",
        "--mask-blur",
        "1",
    )
    assert run("inpaint", *arguments, "-o", "whole.png")[:2] == (0, "whole.png\n")
    assert Image.open("whole.png").size == (136, 104)
    size = ("--padding-crop", "8", "--height", "64", "--width", "64")
    assert run("run", "inpaint", *arguments, *size, "-o", "part.png")[:2] == (0, "part.png\n")
    part, start = (np.asarray(Image.open(f"{name}.png")) for name in ("part", "init"))
    changed = (part != start).any(axis=2)
    assert changed[40:64, 40:64].any()
    changed[26:78, 26:78] = False
    assert not changed.any()


def test_torch_and_engine_draw_the_same(folder, run):
    for backend in ("torch", "onnxruntime"):
        arguments = ("--steps", "10", "--seed", "3", "-b", backend, "-o", f"{backend}.png")
        assert run("txt2img", "-p", PROMPT, *arguments)[0] == 0
    one, other = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("torch", "onnxruntime"))
    assert np.abs(one - other).max() <= 2


def test_engines_are_hashed_while_libraries_load(folder, run, monkeypatch):
    """Those that the request then runs; the torch backend has none."""
    begun = []
    monkeypatch.setattr(digests, "hash_ahead", begun.append)
    code, out, _ = run("txt2img", "-p", PROMPT, *FAST, "--backend", "onnxruntime", "--json")
    assert code == 0
    (find,) = begun
    monkeypatch.setattr(digests, "MEMO_BYTES", 0)
    used = {engine["name"] for engine in json.loads(out)["engines"].values()}
    assert {path.parent.name for path in find()} >= used
    assert run("txt2img", "-p", PROMPT, *FAST, "--backend", "torch")[0] == 0
    assert len(begun) == 1


def test_nothing_is_overwritten_unasked(folder, run):
    Path("mine.png").write_bytes(b"precious")
    code, out, err = run("txt2img", "-p", PROMPT, "-o", "mine.png", *FAST)
    assert (code, out) == (1, "")
    assert "--overwrite" in err
    assert Path("mine.png").read_bytes() == b"precious"
    assert run("txt2img", "-p", PROMPT, "-o", "mine.png", "--overwrite", *FAST)[0] == 0
    assert Image.open("mine.png").size == (128, 128)


def test_no_build_names_the_command_that_builds(folder, run):
    code, out, err = run("txt2img", "-p", PROMPT, "--no-build", "--engine-dir", "none", "-o", "x.png")
    assert (code, out) == (1, "")
    assert "hint: sdtrt build --model tiny --backend onnxruntime" in err
    assert not Path("none").exists()
    assert not Path("x.png").exists()


def truncated(folder: Path) -> str:
    source = next((REPOSITORY / "sdtrt" / "models" / "tiny" / "unet").glob("*.safetensors"))
    (folder / "cut.safetensors").write_bytes(source.read_bytes()[:100_000])
    return "cut.safetensors"


def foreign(folder: Path) -> str:
    import torch
    from safetensors.torch import save_file

    save_file({"some.weight": torch.zeros(3)}, folder / "foreign.safetensors")
    return "foreign.safetensors"


BAD_INPUT = {
    "no prompt": (2, ("txt2img",)),
    "unknown option": (2, ("txt2img", "-p", "x", "--stepz", "3")),
    "not a number": (2, ("txt2img", "-p", "x", "--steps", "many")),
    "unknown command": (2, ("text2img",)),
    "height 500": (2, ("txt2img", "-p", "x", "--height", "500")),
    "steps 0": (2, ("txt2img", "-p", "x", "--steps", "0")),
    "scheduler": (2, ("txt2img", "-p", "x", "--scheduler", "eulr")),
    "backend": (2, ("txt2img", "-p", "x", "--backend", "tensort")),
    "build backend": (2, ("build", "--backend", "tensort")),
    "profile": (2, ("build", "--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--height", "1:2")),
    "compute capability": (2, ("build", "--backend", "tensorrt-rtx", "--compute-capability", "x")),
    "digits": (2, ("build", "--backend", "tensorrt-rtx", "--compute-capability", "8." + "9" * 5000)),
    "height beyond all": (2, ("txt2img", "-p", "x", "--height", "9223372036854775800")),
    "keep nan": (2, ("engines", "prune", "--keep-gib", "nan")),
    "keep negative": (2, ("engines", "prune", "--keep-gib", "-1")),
    "age negative": (2, ("engines", "prune", "--older-than-days", "-5")),
    "workspace nan": (2, ("build", "--backend", "tensorrt-rtx", "--workspace-gib", "nan")),
    "size of a build": (2, ("build", "--backend", "onnxruntime", "--height", "500")),
    "part of an engine": (2, ("inspect", "--engine", "x", "--part", "unet")),
    "component": (2, ("build", "--component", "vea")),
    "component to generate with": (2, ("txt2img", "-p", "x", "--component", "vea")),
    "component that tiny has not": (2, ("export", "--component", "text_encoder_2")),
    "components without engines": (2, ("txt2img", "-p", "x", "-b", "torch", "--component", "unet")),
    "all components into one file": (2, ("export", "-o", "x.onnx")),
    "two components into one file": (2, ("export", *TWO_COMPONENTS, "-o", "x.onnx")),
    "strength 0": (2, ("img2img", "-p", "x", "-i", "init.png", "--strength", "0")),
    "strength 1.5": (2, ("img2img", "-p", "x", "-i", "init.png", "--strength", "1.5")),
    "no init image": (2, ("img2img", "-p", "x")),
    "missing init image": (None, ("img2img", "-p", "x", "-i", "missing.png")),
    "no mask": (2, ("inpaint", "-p", "x", "-i", "init.png")),
    "missing mask": (None, ("inpaint", "-p", "x", "-i", "init.png", "--mask", "missing.png")),
    "unreadable init image": (None, ("img2img", "-p", "x", "-i", "text.png")),
    "unknown model": (None, ("txt2img", "-p", "x", "--model", "tinny")),
    "missing model folder": (None, ("txt2img", "-p", "x", "--model", "./nowhere")),
    "truncated checkpoint": (1, ("txt2img", "-p", "x", "--model", truncated)),
    "foreign checkpoint": (1, ("txt2img", "-p", "x", "--model", foreign)),
    "engine directory is a file": (1, ("txt2img", "-p", "x", "--engine-dir", "text.png")),
    "output can't be written": (1, ("txt2img", "-p", "x", "-o", "/proc/nowhere/x.png")),
    "images to stdout": (2, ("txt2img", "-p", "x", "-o", "-")),
    "a report to stdout": (2, ("bench", "-o", "-")),
    "pictures to stdout": (2, ("verify", "-o", "-")),
    "ONNX to stdout": (2, ("export", "--component", "unet", "-o", "-")),
    "no such engine": (1, ("inspect", "--engine", "nothing")),
    "no such entry": (1, ("engines", "rm", "nothing")),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_an_error_and_a_hint_and_leaves_nothing(folder, run, name):
    expected, arguments = BAD_INPUT[name]
    Path("text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save("init.png")
    arguments = [word if isinstance(word, str) else word(folder) for word in arguments]
    before = sorted(Path().iterdir())
    code, out, err = run(*arguments)
    lines = err.splitlines()
    assert code == expected if expected is not None else code in (1, 2)
    assert out == ""
    assert [line.split(":")[0] for line in lines if not line.startswith("backend:")] == ["error", "hint"], err
    assert all(line.split(":", 1)[1].strip() for line in lines)
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "mend"),
    [
        (("txt2img", "-p", "x", "-o", "my  pics.gif"), "my  pics.png,"),
        (("txt2img", "-p", "x", "-o", "my  pics.gif"), "my  pics.gif"),
        (("txt2img", "-p", "x", "-o", "my  pics.png", "--num-images", "2"), "my  pics"),
        (("txt2img", "-p", "x", "-o", "my  file"), "my  file.png"),
        (("txt2img", "-p", "x" * 40_000, "-o", "my  pics.jpg"), "my  pics.png"),
        (("inspect", "--model", "my  models"), "my  models/m"),
        (("inspect", "--model", "my  models/mm"), "my  models/m?"),
        (("inspect", "--model", "a  b.ckpt"), "a  b.ckpt"),
        (("export", "--component", "unet", "-o", "my  pics"), "my  pics/unet.onnx"),
    ],
)
def test_hints_quote_paths_so_that_a_shell_takes_them(folder, run, arguments, mend):
    Path("my  file").touch()
    Path("a  b.ckpt").write_bytes(b"\x80\x02}.")
    Path("my  models/m").mkdir(parents=True)
    Path("my  models/m/model_index.json").touch()
    code, out, err = run(*arguments)
    assert (code > 0, out) == (True, "")
    error, hint = err.splitlines()
    assert any(word.endswith(mend) for word in shlex.split(hint)), hint
    assert arguments[-1] in error or "--num-images" in arguments


@pytest.mark.parametrize("name", ["a\nb.gif", "a'b\t\\n7.gif", "\x1b[31m.gif", "\udcff7.gif", "it's  plain.gif"])
def test_hints_name_the_same_file_whatever_its_name(folder, run, name):
    _, _, err = run("txt2img", "-p", "x", "-o", name)
    _, hint = err.splitlines()
    assert hint.isprintable()
    command = hint.partition("mkdir ")[2]
    shown = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, check=True)
    assert shown.stdout == os.fsencode(name)


def test_a_home_directory_is_one_behind_an_equals_sign_too(folder, run, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "home").mkdir()
    assert f"{folder}/home/x.gif" in run("txt2img", "-p", "x", "--output=~/x.gif")[2]
    assert f"{folder}/home/x.png" in run("img2img", "-p", "x", "--init-image=~/x.png")[2]
    assert f"{folder}/home/x" in run("export", "--component", "unet", "--output=~/x")[2]
    code, _, err = run("txt2img", "-p", "x", "--output=~nosuch/x")
    assert code == 2
    assert "no home directory is known for ~nosuch" in err
    assert sorted(path.name for path in folder.iterdir()) == ["home"]


def test_completion_is_given_and_loads_no_torch(folder, monkeypatch):
    show = f"'{sys.executable}' -m sdtrt --show-completion; exit $?"  # typer asks which shell it was called from
    shown = subprocess.run(["bash", "-c", show], capture_output=True, text=True, timeout=60, check=False)
    assert (shown.returncode, "COMPREPLY" in shown.stdout) == (0, True), shown.stderr
    code = (
        "import sys; sys.argv = ['sdtrt']\n"
        "from sdtrt.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "sys.exit(code or len({'torch', 'diffusers', 'onnx', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    for words, expected in (("sdtrt txt2img --predi", "--prediction-type"), ("sdtrt engines pru", "prune")):
        count = str(len(words.split()) - 1)
        for name, value in (("_SDTRT_COMPLETE", "complete_bash"), ("COMP_WORDS", words), ("COMP_CWORD", count)):
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")


def test_an_error_is_one_line_with_the_spaces_that_a_path_has():
    error = SdtrtError(" can't read a  b.png:\n\n  no\r\n\tsuch file\n", hint="use 'a  b'")
    assert (error.message, error.hint) == ("can't read a  b.png: no such file", "use 'a  b'")


def test_a_reader_that_leaves_early_is_no_traceback(folder):
    command = f"'{sys.executable}' -m sdtrt engines --json | true"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in ended.stderr


def test_a_closed_or_full_stdout_is_no_traceback(folder):
    for target, code in ((">&-", 0), (">/dev/full", 1)):
        command = f"'{sys.executable}' -m sdtrt --version {target}"
        ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
        assert "Traceback" not in ended.stderr
        assert ended.returncode == code, ended.stderr


@pytest.mark.slow
def test_what_belongs_on_a_closed_stderr_goes_nowhere(folder):
    """Not into the result, and into no file that would get its number."""
    build = f"'{sys.executable}' -m sdtrt build --component vae_decoder --backend onnxruntime --engine-dir own --json"
    for closed in ("2>&-", "<&- 2>&-"):
        ended = subprocess.run(["sh", "-c", f"{build} {closed}"], capture_output=True, timeout=200, check=False)
        assert ended.returncode == 0
        assert json.loads(ended.stdout)["path"].startswith(str(folder / "own"))
    wrong = f"'{sys.executable}' -m sdtrt txt2img -p x --steps 0 2>&-"
    ended = subprocess.run(["sh", "-c", wrong], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")


@pytest.mark.slow
def test_a_full_or_broken_stderr_ends_no_work(folder):
    """Of notes, warnings and bars; errors keep their exit code."""
    command = f"'{sys.executable}' -m sdtrt txt2img -p x --steps 2 --num-images 2 -n text --guidance-scale 1 -o out"
    ended = subprocess.run(["sh", "-c", f"{command} 2>/dev/full"], capture_output=True, timeout=200, check=False)
    assert ended.returncode == 0
    assert len(ended.stdout.splitlines()) == len(list(Path("out").iterdir())) == 2
    read, write = os.pipe()
    os.close(read)
    wrong = [sys.executable, "-m", "sdtrt", "txt2img", "-p", "x", "--steps", "0"]
    for target in (write, os.open("/dev/full", os.O_WRONLY)):
        with os.fdopen(target, "wb") as stderr:
            ended = subprocess.run(wrong, stdout=subprocess.PIPE, stderr=stderr, timeout=60, check=False)
        assert (ended.returncode, ended.stdout) == (2, b"")


def test_a_working_folder_that_is_gone_is_an_error(folder):
    command = f"mkdir gone; cd gone; rmdir ../gone; '{sys.executable}' -m sdtrt txt2img -p x -o {folder / 'out'}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert [line.split(":")[0] for line in ended.stderr.splitlines()] == ["error", "hint"], ended.stderr


@pytest.mark.slow
def test_ctrl_c_says_so_and_keeps_what_is_done(folder):
    command = [sys.executable, "-m", "sdtrt", "txt2img", "-p", PROMPT, "--num-images", "50", "-o", "out", "--no-build"]
    assert process("build", "-q").returncode == 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        while not list(Path().glob("out/*.png")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        err = running.communicate(timeout=60)[1]
    assert running.returncode == -signal.SIGINT, "a shell shows 130"
    assert err.splitlines()[-2].startswith("error: interrupted")
    assert err.splitlines()[-1].startswith("hint: ")
    for path in Path("out").iterdir():
        Image.open(path).load()


def test_export_to_a_file(folder, run):
    arguments = ("export", "--precision", "fp32", "--component", "unet", "-o", "unet.onnx")
    code, out, err = run(*arguments)
    assert (code, out) == (0, "unet.onnx\n")
    assert "exporting unet" in err
    import onnx

    dims = onnx.load("unet.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 4, "latent_height", "latent_width"]
    code, _, err = run(*arguments)
    assert code != 0
    assert "--overwrite" in err
    Path("vae_encoder.onnx").mkdir()
    code, _, err = run("export", "--component", "vae_encoder", "-o", "vae_encoder.onnx")
    assert (code, "vae_encoder.onnx/vae_encoder.onnx" in err) == (2, True)


def test_build_list_inspect_remove(folder, run, smallest):
    arguments = ("--model", str(smallest), "--engine-dir", "own")
    code, out, err = run("build", *arguments, "-b", "onnxruntime", "--component", "unet", "--json", "--height", "512")
    assert code == 0
    assert "--height: without effect, as ONNX Runtime engines take any size" in err
    engine = Path(json.loads(out)["path"])
    assert engine.is_dir()
    code, out, _ = run("engines", "list", "--engine-dir", "own", "--json")
    names = [entry["name"] for entry in json.loads(out)["entries"]]
    assert engine.name in names
    assert len(names) == 2  # the export and the engine
    assert engine.name in run("engines", "--engine-dir", "own")[1]
    code, out, _ = run("inspect", "--engine", engine.name, "--engine-dir", "own")
    assert "encoder_hidden_states" in out
    assert run("engines", "prune", "--keep-gib", "100", "--engine-dir", "own", "--quiet")[1].strip() == ""
    assert run("engines", "rm", engine.name, "--engine-dir", "own")[:2] == (0, f"{engine.name}\n")
    assert not engine.exists()
    code, out, _ = run("engines", "prune", "--keep-gib", "0", "--engine-dir", "own")
    assert out.split() == [name for name in names if name != engine.name]


@pytest.mark.slow
def test_export_and_build_make_all_that_the_pipeline_needs(folder, run):
    """One path a line; in JSON a list of entries. A text encoder's engine is what a later run for any size finds."""
    every = ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for command in ("export", "build"):
        code, out, err = run(command, "--precision", "fp32", *(("-b", "onnxruntime") if command == "build" else ()))
        assert code == 0, err
        assert [Path(line).name.split("-")[0] for line in out.splitlines() if command == "build"] in ([], every)
        assert all(Path(line).exists() for line in out.splitlines())
        code, out, _ = run(command, "--precision", "fp32", *TWO_COMPONENTS, "--json")
        assert [entry["key"]["component"] for entry in json.loads(out)["entries"]] == ["text_encoder", "vae_decoder"]
    listed = {word.split("-")[0] for word in run("engines")[1].split() if "-onnxruntime-fp32-" in word}
    assert set(every) <= listed
    assert run("txt2img", "-p", PROMPT, "--no-build", "-o", "x.png", "--height", "96", *FAST)[0] == 0


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed")
@pytest.mark.slow
def test_the_miniature_builds_ahead_of_time_for_a_gpu_that_is_not_here(folder, run):
    arguments = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--precision", "fp16")
    code, out, err = run("build", *arguments, "--height", "96:128:192", "--batch", "1:2:4")
    assert code == 0, err
    assert "built but not run" in err or host.has_gpu()
    made = [json.loads(run("inspect", "--engine", Path(line).name, "--json")[1]) for line in out.splitlines()]
    inputs = [[tensor["name"] for tensor in report["inputs"]] for report in made]
    assert inputs == [["input_ids"], ["sample", "timestep", "encoder_hidden_states"], ["latents"], ["image"]]
    assert [report["profiles"][0]["batch"]["max"] for report in made] == [2, 4, 2, 1]
    shown = [run("inspect", "--engine", Path(line).name)[1] for line in out.splitlines()]
    assert "\n  0: batch 1:1:2\n" in shown[0]
    assert "\n  0: batch 1:1:2, height 96:128:192, width 128\n" in shown[2]


def test_inspect_shows_parts_and_a_whole_tree(folder, run):
    code, out, _ = run("inspect", "--json")
    assert code == 0
    assert {part["name"] for part in json.loads(out)["parts"]} >= {"unet", "text_encoder", "vae"}
    code, out, _ = run("inspect", "--part", "text_encoder", "--tree")
    assert code == 0
    assert "self_attn" in out


def test_doctor_names_what_can_run(folder, run):
    code, out, _ = run("doctor", "--json")
    diagnosis = json.loads(out)
    assert code == (0 if diagnosis["healthy"] else 1)
    assert "onnxruntime" in diagnosis["backends"]
    code, out, _ = run("doctor")
    assert "this machine can run: " in out


def test_no_arguments_show_the_help(folder, run):
    code, out, err = run()
    assert code == 2
    assert "txt2img" in out + err
    assert "error:" not in err


def test_version(folder, run):
    assert run("--version") == (0, f"sdtrt {__version__}\n", "")


@pytest.mark.parametrize("options", [("--version", "--verbose"), ("--verbose", "--version")])
def test_version_names_the_libraries_too_where_more_is_asked_for(folder, run, options):
    code, out, err = run(*options)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"sdtrt {__version__}"
    named = dict(line.split() for line in out.splitlines())
    assert {name: named[name] for name in ("torch", "diffusers", "onnxruntime")} == {
        name: version(name) for name in ("torch", "diffusers", "onnxruntime")
    }
    backends = [name for name in ("tensorrt", "tensorrt-rtx") if host.library_version(name)]
    assert all(named[name] == version(name) for name in backends)


def test_the_libraries_versions_are_told_without_importing_them(folder):
    code = (
        "import sys; sys.argv = ['sdtrt', '--version', '--verbose']\n"
        "from sdtrt.cli.main import main\n"
        "try: main()\nexcept SystemExit as end: code = end.code\n"
        "sys.exit(code or len({'torch', 'diffusers', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


def test_verbose_before_a_command_is_refused_as_it_would_not_reach_it(folder, run):
    code, out, err = run("--verbose", "doctor")
    assert (code, out) == (2, "")
    assert "hint: give it after it: sdtrt doctor ... --verbose" in err


def test_run_has_the_same_commands(folder, run):
    for command in ("txt2img", "img2img", "inpaint"):
        (code, out, _), (run_code, run_out, _) = run(command, "--help"), run("run", command, "--help")
        assert (code, run_code) == (0, 0)
        assert run_out.replace(f"run {command}", command).split() == out.split()
    code, out, err = run("run")
    assert code == 2
    assert "txt2img" in out + err


@pytest.mark.slow
def test_a_picture_by_the_short_words_is_that_of_the_long_ones(folder, run):
    """A prompt that stands alone, `run`, and the other name of a scheduler."""
    long = run("txt2img", "--prompt", PROMPT, "--scheduler", "euler", "-o", "long.png", *FAST)
    short = run("run", "txt2img", PROMPT, "--sampler", "euler", "-o", "short.png", *FAST)
    assert (long[0], short[0]) == (0, 0)
    assert Path("short.png").read_bytes() == Path("long.png").read_bytes()


def test_a_prompt_without_quotes_is_an_error_and_not_many_prompts(folder, run):
    code, out, err = run("txt2img", "a", "red", "circle")
    assert (code, out) == (2, "")
    assert "red circle" in err
