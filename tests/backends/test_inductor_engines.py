"""Engines that PyTorch's Inductor has compiled on this processor: built, run, given other weights, refused.

Nothing stands in for anything here: it takes a C++ compiler, and minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from PIL import Image

from sdtrt.backends import registry
from sdtrt.backends.build import build_engine
from sdtrt.backends.inductor.weights import PACKAGE_FILE
from sdtrt.backends.open import open_session
from sdtrt.common.console import QUIET
from sdtrt.common.errors import CacheError, EngineError, SdtrtError
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.upkeep import sweep
from sdtrt.exports.feeds import seeded_feeds
from sdtrt.exports.tracing import reference
from sdtrt.models.components import components_of, load_component, profile_of
from sdtrt.models.resolve import resolve_model
from sdtrt.specs import BuildSpec, ExportSpec, ModelSpec, Profile, Range, Sizes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("probed_once"),
    pytest.mark.skipif(registry.get("inductor").why_not() is not None, reason="needs a C++ compiler"),
]
CPU = torch.device("cpu")
SIZES = Sizes(2, 128, 128)
PROFILE = Profile.of(SIZES)
REQUEST = ["--height", "128", "--width", "128", "--steps", "4", "--seed", "1", "--quiet"]
ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = {**factories.SMALLEST["sd1"], "norm_num_groups": 8}
LEVELS = 2  # of 255, by which pictures of another engine in fp32 may differ
MAX_ERROR = 1e-4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints of one architecture. Of a group of one channel, a norm would hide what biases do."""
    folder = tmp_path_factory.mktemp("models")
    folders = [factories.sd1_folder(folder / str(seed), seed=seed, **ARCHITECTURE) for seed in (0, 1)]
    return [resolve_model(ModelSpec(str(path))) for path in folders]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The engine directory of all these tests: each engine is built once."""
    return EngineDirectory(tmp_path_factory.mktemp("engines"))


def engine(model, directory, component="unet", profile=PROFILE):
    spec = BuildSpec(ExportSpec(model.spec, component, "fp32"), "inductor", (profile_of(component, profile),))
    return build_engine(model, spec, directory, QUIET)


@pytest.fixture
def unet(models, shared):
    return engine(models[0], shared)


def eager(model, component, feeds, contract, change=lambda module: None):
    """What diffusers and transformers themselves compute."""
    module = load_component(model, component, torch.float32)
    change(module)
    with torch.inference_mode():
        found = reference(module, contract)(*feeds.values())
    return (found,) if isinstance(found, torch.Tensor) else found


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae_decoder", "vae_encoder"])
def test_two_checkpoints_one_engine_each_right(models, shared, component):
    one, two = (engine(model, shared, component) for model in models)
    assert one.digest == two.digest, "no second build"
    assert one.created == two.created
    assert set(one.files) >= {"engine.pt2", "engine.pt2.json", "build.log"}
    assert all(figures["relative_l2"] < MAX_ERROR for figures in one.info["parity"])
    assert one.info["step_ms"] > 0
    for model in models:
        with open_session(one, CPU, None, model) as session:
            feeds = seeded_feeds(session.contract, profile_of(component, PROFILE).optimum)
            found = session.run(feeds)
            for tensor, wanted in zip(found.values(), eager(model, component, feeds, session.contract), strict=True):
                assert error(tensor, wanted) < MAX_ERROR
                assert tensor.is_contiguous()


def test_each_parameter_alone_is_followed(models, unet):
    """None is compiled in, and none is bound in another's place."""
    model = models[0]
    module = load_component(model, "unet", torch.float32)
    with open_session(unet, CPU, None, model) as session, torch.inference_mode():
        feeds = seeded_feeds(session.contract, Sizes(2, 128, 128))
        call, before = reference(module, session.contract), session.run(feeds)["out_sample"]
        generator, still = torch.Generator().manual_seed(0), []
        for name, parameter in module.named_parameters():
            kept = parameter.clone()
            parameter.add_(0.5 * (kept.std() if kept.numel() > 1 else 1) * torch.randn(kept.shape, generator=generator))
            parameter.add_(0.05)
            session.set_weights(module)
            found, wanted = session.run(feeds)["out_sample"], call(*feeds.values())
            assert error(found, wanted) < MAX_ERROR, name
            still += [name] * (error(wanted, before) < 1e-5)  # a change that nobody would see proves nothing
            parameter.copy_(kept)
        assert len(still) < 5, still
        session.set_weights(module)
        assert torch.equal(session.run(feeds)["out_sample"], before)


def test_what_is_written_to_its_views_is_computed_with(models, unet):
    """So a live module's parameters may be those views: one copy, and changes in place arrive."""
    model = models[0]
    module = load_component(model, "unet", torch.float32)
    with open_session(unet, CPU, None, model) as session, torch.inference_mode(False), torch.no_grad():
        feeds, views = seeded_feeds(session.contract, SIZES), session.weight_views()
        for name, parameter in module.named_parameters():
            assert torch.equal(views[name], parameter), name
            parameter.data = views[name]
        module.conv_in.weight.mul_(1.5)
        module.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight.mul_(0.5)
        found, wanted = session.run(feeds)["out_sample"], module(*feeds.values(), return_dict=False)[0]
        assert error(found, wanted) < MAX_ERROR


def test_200_changes_leave_memory_flat_and_the_first_picture_equal(models, unet):
    states = [load_component(model, "unet", torch.float32).state_dict() for model in models]
    with open_session(unet, CPU, None, models[0]) as session:
        feeds = seeded_feeds(session.contract, SIZES)
        first, sizes = session.run(feeds)["out_sample"], []
        for number in range(200):
            session.set_weights(states[(number + 1) % 2])
            last = session.run(feeds)["out_sample"]
            assert torch.equal(last, first) == (number % 2 == 1)
            sizes.append(resident_bytes())
    assert max(sizes[20:]) <= 1.01 * sizes[20], "flat after the first tenth"


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_outputs_are_new_tensors_and_inputs_may_lie_anyhow(models, unet):
    with open_session(unet, CPU, None, models[0]) as session:
        feeds = seeded_feeds(session.contract, SIZES)
        first = session.run(feeds)["out_sample"]
        kept = first.clone()
        odd = {name: feeds[name].mT.contiguous().mT for name in ("sample", "encoder_hidden_states")}
        assert not odd["sample"].is_contiguous()
        assert torch.equal(session.run(feeds | odd)["out_sample"], first)
        other = session.run({**feeds, "sample": feeds["sample"] + 1})["out_sample"]
        assert other.data_ptr() != first.data_ptr()
        assert torch.equal(first, kept)


def test_one_engine_for_a_range_of_sizes(models, shared):
    profile = Profile(Range(1, 2, 4), Range(128, 128, 192), Range(128, 128, 192), Range.of(77))
    entry = engine(models[0], shared, profile=profile)
    assert len(entry.info["parity"]) == 3
    with open_session(entry, CPU, None, models[1]) as session:
        for sizes in (Sizes(1, 136, 184), Sizes(3, 192, 128), Sizes(4, 128, 144)):
            feeds = seeded_feeds(session.contract, sizes)
            (wanted,) = eager(models[1], "unet", feeds, session.contract)
            assert error(session.run(feeds)["out_sample"], wanted) < MAX_ERROR, sizes
        with pytest.raises(EngineError, match=r"takes sample of the shape .* got \[5, 4, 16, 16\]"):
            session.run(seeded_feeds(session.contract, Sizes(5, 128, 128)))


def test_eight_builders_make_one_engine(models, directory, monkeypatch):
    """Whichever checkpoint each has: one builds, and the others wait for it."""
    from sdtrt.backends.inductor import build

    built, real = [], build.build_package
    monkeypatch.setattr(build, "build_package", lambda *given: built.append(given) or real(*given))
    made = []
    factories.in_threads(
        lambda model: made.append(engine(model, directory, "text_encoder").path), [(models[n % 2],) for n in range(8)]
    )
    assert len(built) == 1
    assert len(made) == 8
    assert len(set(made)) == 1


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_does_not_fit_is_refused(models, unet):
    module = load_component(models[0], "unet", torch.float32)
    session = open_session(unet, CPU)
    feeds = seeded_feeds(session.contract, SIZES)
    with pytest.raises(EngineError, match="no weights yet"):
        session.run(feeds)
    session.set_weights(module)
    before = session.run(feeds)["out_sample"]
    state = module.state_dict()
    wrong = {
        "dtype": {name: tensor.half() for name, tensor in state.items()},
        "missing": {name: tensor for name, tensor in state.items() if name != "conv_out.bias"},
        "unknown": {**state, "lora.up": torch.zeros(1)},
        "shape": {**state, "conv_out.bias": torch.zeros(5)},
        "other": factories.small_unet("sdxl").state_dict(),
    }
    for name, given in wrong.items():
        with pytest.raises(EngineError, match="not those of the engine's architecture"):
            session.set_weights(given)
        assert torch.equal(session.run(feeds)["out_sample"], before), name
    with pytest.raises(EngineError, match="takes sample of the shape"):
        session.run(seeded_feeds(session.contract, Sizes(2, 192, 128)))
    with pytest.raises(EngineError, match="must be float32"):
        session.run({**feeds, "sample": feeds["sample"].half()})
    session.close()
    session.close()
    for use in (lambda: session.run(feeds), lambda: session.set_weights(module)):
        with pytest.raises(EngineError, match="closed"):
            use()


@pytest.mark.parametrize("name", ["engine.pt2", "engine.pt2.json"])
def test_a_flipped_bit_is_refused(models, unet, directory, name):
    folder = directory.path / unet.name
    directory.path.mkdir(mode=0o700)
    shutil.copytree(unet.path, folder)
    (entry,) = directory.entries("engine")
    factories.flip(folder / name)
    with pytest.raises(CacheError, match="damaged"):
        open_session(entry, CPU, None, models[0])


def test_another_architecture_or_version_gets_no_such_engine(models, unet, shared, tmp_path, monkeypatch):

    def found(model):
        return factories.find_engine(model, "inductor", "fp32", SIZES, shared)

    other = factories.sd1_folder(tmp_path / "other", **ARCHITECTURE | {"layers_per_block": 2})
    assert found(models[1]) is not None
    assert found(resolve_model(ModelSpec(str(other)))) is None
    monkeypatch.setattr(type(registry.get("inductor")), "version", lambda self: "1.0")
    assert found(models[1]) is None


def test_nothing_stays_unpacked(models, unet, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with open_session(unet, CPU, None, models[0]) as session:
        session.run(seeded_feeds(session.contract, SIZES))
        assert not list(tmp_path.iterdir()), "a process that is killed leaves nothing either"
    assert os.environ.get("TMPDIR") != str(tmp_path)
    broken = tmp_path / "broken.pt2"
    shutil.copy(unet.file(PACKAGE_FILE), broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    from sdtrt.backends.inductor.package import Package

    with pytest.raises(EngineError, match="can't load"):
        Package(broken, CPU)
    assert list(tmp_path.iterdir()) == [broken]


def test_a_model_that_changes_while_it_is_built_is_noticed(models, directory, tmp_path, monkeypatch):
    """The build fails, and nothing is left of it."""
    from sdtrt.backends.inductor import build
    from sdtrt.common.errors import ModelChangedError

    folder = tmp_path / "model"
    shutil.copytree(models[0].spec.name, folder)
    model = resolve_model(ModelSpec(str(folder)))

    def replaced(request, console):
        shutil.copytree(models[1].spec.name, folder, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(build, "build_package", replaced)
    with pytest.raises(ModelChangedError):
        engine(model, directory)
    assert directory.entries("engine") == []


# --------------------------------------------------------------------------------------------------- command line


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def made(run, model, directory, path, backend="inductor", task="txt2img", options=()):
    """The picture that a command makes."""
    words = [task, *options, "--model", model.spec.name, "--prompt", "a red circle", "--backend", backend, *REQUEST]
    code, _, told = run(*words, "--engine-dir", str(directory.path), "--output", str(path))
    assert code == 0, told
    return picture(path)


def test_pictures_are_those_of_diffusers(run, models, shared, tmp_path):
    """txt2img and img2img, of two checkpoints; the second one builds nothing."""
    options = [
        "--backend",
        "inductor",
        "--height",
        "128",
        "--width",
        "128",
        "--engine-dir",
        str(shared.path),
        "--quiet",
    ]
    code, _, told = run("build", "--model", models[0].spec.name, *options)
    assert code == 0, told
    built = {entry.name for entry in shared.entries("engine")}
    assert {entry.key["component"] for entry in shared.entries("engine")} == set(components_of(models[0]))
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype("uint8")
    Image.fromarray(noise).save(tmp_path / "init.png")
    pictures = []
    for number, model in enumerate(models):
        for task, image in (("txt2img", []), ("img2img", ["--init-image", str(tmp_path / "init.png")])):
            found, wanted = (
                made(run, model, shared, tmp_path / f"{task}-{number}-{backend}.png", backend, task, image)
                for backend in ("inductor", "torch")
            )
            assert abs(found - wanted).max() <= LEVELS, (task, number)
            pictures.append(found)
    assert (pictures[0] != pictures[2]).any()
    assert {entry.name for entry in shared.entries("engine")} == built


def test_the_same_seed_gives_the_same_picture(run, models, shared, tmp_path):
    one, two = (made(run, models[0], shared, tmp_path / f"{name}.png") for name in "ab")
    assert (one == two).all()


# ---------------------------------------------------------------------------------------------------- interruptions


@pytest.fixture
def building(models, tmp_path):
    """A build from the command line that has got as far as the C++ compiler; its temporary folder is its own."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "sdtrt", "build", "--model", models[0].spec.name, "--backend", "inductor"]
    command += ["--component", "unet", "--height", "128", "--width", "128", "--engine-dir", str(tmp_path / "engines")]
    paths = os.pathsep.join([str(ROOT), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            compilers = wait_for(lambda: [pid for pid in descendants(process.pid) if "cc1plus" in name_of(pid)], 300)
            yield process, descendants(process.pid), compilers
        finally:
            process.kill()


def wait_for(check, seconds):
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def descendants(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def name_of(pid):
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_ctrl_c_leaves_nothing(building, tmp_path):
    process, started, compilers = building
    assert compilers
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.returncode == -signal.SIGINT
    wait_for(lambda: not any(map(is_running, started)), 20)
    assert not list((tmp_path / "engines" / ".building").iterdir())
    assert not EngineDirectory(tmp_path / "engines").entries("engine")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_killed_build_takes_its_processes_along(building, tmp_path):
    """What is left in the engine directory is swept by the next build of the key, or by pruning."""
    process, started, _ = building
    process.kill()
    process.wait(30)
    wait_for(lambda: not any(map(is_running, started)), 20)
    assert not list((tmp_path / "tmp").iterdir())
    directory = EngineDirectory(tmp_path / "engines")
    assert directory.entries("engine") == []
    assert sweep(directory) == 1
    assert not list((tmp_path / "engines" / ".building").iterdir())


def test_a_compiler_that_fails_is_an_error_with_its_log(models, directory, tmp_path, monkeypatch):
    wrong = tmp_path / "g++"
    wrong.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    wrong.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrong))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SdtrtError) as caught:
        engine(models[0], directory, "text_encoder")
    assert caught.value.hint
    (log,) = tmp_path.glob("sdtrt-build-*.log")
    assert "no such thing" in log.read_text() or "no such thing" in caught.value.message
    assert directory.entries("engine") == []
    assert not list((directory.path / ".building").iterdir())
