"""Keys are of what was really read: weights that are replaced while something waits, exports, builds or loads."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace

import factories
import pytest
from filelock import FileLock

from sdtrt.backends.build import build_engine, engine_key
from sdtrt.common.console import QUIET, Console
from sdtrt.common.errors import CacheError, ExportError, ModelChangedError, ModelError
from sdtrt.engines import digests, find, keys, upkeep
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import key_digest
from sdtrt.engines.keys import Sight
from sdtrt.exports import component as component_export
from sdtrt.exports.component import export_component
from sdtrt.exports.to_file import export_file
from sdtrt.models import components, loading
from sdtrt.models.resolve import resolve_model
from sdtrt.pipeline.opening import engines
from sdtrt.pipeline.opening import open as pipeline_open
from sdtrt.pipeline.runs import generate
from sdtrt.reports import verify
from sdtrt.specs import BuildSpec, ExportSpec, GenerateSpec, ModelSpec, Sizes, VerifySpec

PART = "text_encoder"  # the smallest: exported in a fraction of a second
SMALLEST = factories.SMALLEST["sd1"]


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """Two models of one architecture; tests must not change them."""
    base = tmp_path_factory.mktemp("two")
    return [factories.sd1_folder(base / name, seed=seed, **SMALLEST) for name, seed in (("old", 0), ("new", 1))]


class Changing:
    """A model whose weights are replaced, as a download does it: by a rename."""

    def __init__(self, folder, new):
        self.folder, self.new = folder, new
        self.model = resolve_model(ModelSpec(str(folder)))
        self.count = 0

    def replace(self, part=PART):
        self.count += 1
        for source in (self.new / part).glob("*.safetensors"):
            draft = self.folder / "draft"
            shutil.copy(source, draft)
            draft.replace(self.folder / part / source.name)

    def fingerprint(self, part=PART):
        return self.model.fingerprint(part, factories.sha256_of)


@pytest.fixture
def changing(tmp_path, two_models):
    old, new = two_models
    shutil.copytree(old, tmp_path / "model")
    return Changing(tmp_path / "model", new)


def once(changing, function, *, after=False, times=1):
    """The function, and before (or after) its first calls the weights are replaced."""

    def call(*args, **kwargs):
        if not after and changing.count < times:
            changing.replace()
        result = function(*args, **kwargs)
        if after and changing.count < times:
            changing.replace()
        return result

    return call


class Waiting(Console):
    """Tells when somebody waits for a lock."""

    def __init__(self, then):
        super().__init__(quiet=True)
        self.then = then

    @contextmanager
    def activity(self, name):
        if name.startswith("waiting for another process"):
            self.then()
        with super().activity(name) as show:
            yield show


def spec_of(model):
    return BuildSpec(ExportSpec(model.spec, PART, "fp32"), "onnxruntime")


def check_entries(changing, directory, two_models):
    """Each entry holds the weights of its key, and nothing is found for the old weights but what is of them."""
    by_weights = {
        resolve_model(ModelSpec(str(folder))).fingerprint(PART, factories.sha256_of): folder for folder in two_models
    }
    for entry in directory.entries("onnx"):
        folder = by_weights[entry.key["fingerprint"]]
        fresh = resolve_model(ModelSpec(str(folder)))
        scratch = EngineDirectory(directory.path.parent / f"scratch-{folder.name}")
        expected = export_component(fresh, ExportSpec(fresh.spec, PART, "fp32"), scratch)
        assert entry.digests == expected.digests, f"{entry.name} holds other weights than its key says"
    exports = {entry.name: entry for entry in directory.entries("onnx")}
    for entry in directory.entries("engine"):
        assert entry.key["export"] == exports[entry.info["onnx"]].key
    old = resolve_model(ModelSpec(str(two_models[0])))
    assert directory.find("engine", engine_key(old, spec_of(old), directory).to_json()) is None
    assert factories.find_engine(old, "onnxruntime", "fp32", Sizes(1, 8, 8), directory, PART) is None


@pytest.mark.parametrize("which", ["export", "engine"])
def test_weights_that_are_replaced_while_a_build_waits_for_the_lock(changing, directory, two_models, which):
    spec = spec_of(changing.model)
    key = engine_key(changing.model, spec, directory).to_json()
    digest = key_digest("engine", key) if which == "engine" else key_digest("onnx", key["export"])
    (directory.path / ".locks").mkdir(parents=True, mode=0o755)
    other = FileLock(directory.path / ".locks" / f"{digest}.lock")
    with other:

        def end():
            changing.replace()
            other.release()

        entry = build_engine(changing.model, spec, directory, Waiting(end))
    assert changing.count == 1, "it waited"
    if which == "engine":  # its export had been made before: of the old weights, under their key
        assert entry.key == key
        (exported,) = directory.entries("onnx")
        assert entry.info["onnx"] == exported.name
        assert exported.key == key["export"]
    else:
        assert entry.key["export"]["fingerprint"] == changing.fingerprint()
        check_entries(changing, directory, two_models)


@pytest.mark.parametrize(
    ("step", "after"),
    [("export_key", True), ("load_component", False), ("load_component", True), ("check_onnx", True)],
    ids=["after the fingerprint", "before the load", "after the load", "after the check"],
)
def test_weights_that_are_replaced_while_a_component_is_exported(
    changing, directory, two_models, monkeypatch, step, after
):
    monkeypatch.setattr(component_export, step, once(changing, getattr(component_export, step), after=after))
    entry = build_engine(changing.model, spec_of(changing.model), directory)
    assert changing.count == 1
    assert entry.key["export"]["fingerprint"] == changing.fingerprint()
    monkeypatch.undo()
    check_entries(changing, directory, two_models)


def test_weights_that_are_replaced_between_an_engines_key_and_its_export(changing, directory, two_models, monkeypatch):
    monkeypatch.setattr(component_export, "export_component", once(changing, component_export.export_component))
    entry = build_engine(changing.model, spec_of(changing.model), directory)
    assert entry.key["export"]["fingerprint"] == changing.fingerprint()
    monkeypatch.undo()
    check_entries(changing, directory, two_models)


def test_a_configuration_that_is_replaced_is_used_as_it_was_checked(changing, directory, monkeypatch):
    spec = ExportSpec(changing.model.spec, PART, "fp32")
    config = changing.folder / PART / "config.json"

    def load(*args):
        config.write_text(config.read_text().replace('"quick_gelu"', '"gelu"'))
        monkeypatch.undo()
        return real(*args)

    real = components.load_component
    before = changing.fingerprint()
    scratch = export_component(changing.model, spec, EngineDirectory(directory.path.parent / "scratch"))
    monkeypatch.setattr(component_export, "load_component", load)
    entry = export_component(changing.model, spec, directory)
    assert entry.key["fingerprint"] == changing.fingerprint() == before
    assert entry.digests == scratch.digests  # of the activation that its key says
    anew = resolve_model(changing.model.spec)
    other = export_component(anew, spec, directory)
    assert other.key["fingerprint"] == anew.fingerprint(PART, factories.sha256_of) != before
    assert other.digests != entry.digests


def test_weights_that_change_each_time_are_an_error_that_leaves_nothing(changing, directory, monkeypatch):
    monkeypatch.setattr(component_export, "load_component", once(changing, components.load_component, times=99))
    with pytest.raises(ModelChangedError, match="text_encoder") as caught:
        build_engine(changing.model, spec_of(changing.model), directory)
    assert "again" in caught.value.hint
    assert changing.count == keys.TRIES
    assert directory.entries() == []
    assert list((directory.path / ".building").iterdir()) == []


def test_weights_that_are_half_written_are_waited_out(changing, directory, monkeypatch):
    """What fails on files that change meanwhile fails for that."""

    def load(*args):
        monkeypatch.undo()
        changing.replace()
        raise ModelError("it is truncated", hint="download it again")

    monkeypatch.setattr(component_export, "load_component", load)
    entry = export_component(changing.model, ExportSpec(changing.model.spec, PART, "fp32"), directory)
    assert entry.key["fingerprint"] == changing.fingerprint()


def test_failures_of_what_does_not_change_stay_what_they_are(changing, directory, monkeypatch):
    def fail(*args, **kwargs):
        raise ExportError("off", hint="none")

    monkeypatch.setattr(component_export, "check_onnx", fail)
    with pytest.raises(ExportError, match="off"):
        export_component(changing.model, ExportSpec(changing.model.spec, PART, "fp32"), directory)


def test_a_file_is_exported_from_one_state_of_the_weights(changing, tmp_path, two_models, monkeypatch):
    new = resolve_model(ModelSpec(str(two_models[1])))
    spec = ExportSpec(changing.model.spec, PART, "fp32", output=tmp_path / "made" / "one.onnx")
    monkeypatch.setattr(component_export, "load_component", once(changing, components.load_component, after=True))
    export_file(changing.model, spec)
    monkeypatch.undo()
    expected = export_file(new, replace(spec, model=new.spec, output=tmp_path / "expected" / "one.onnx"))
    assert (tmp_path / "made" / "one.onnx").read_bytes() == expected.read_bytes()
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["one.onnx"]


def test_a_digest_that_was_taken_of_a_file_under_way_is_not_remembered(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    weights = tmp_path / "weights"
    weights.write_bytes(b"old")
    old = weights.stat()
    real = factories.sha256_of

    def hashed(path):
        (tmp_path / "draft").write_bytes(b"new")
        os.link(weights, tmp_path / "kept")
        (tmp_path / "draft").replace(weights)
        return real(path)

    monkeypatch.setattr("sdtrt.engines.digests.sha256_file", hashed)
    directory.file_digest(weights)
    assert not digests.DigestMemo(directory.path, trust_others=False).read()
    monkeypatch.setattr("sdtrt.engines.digests.sha256_file", real)
    (tmp_path / "kept").replace(weights)
    assert weights.stat().st_ino == old.st_ino
    assert directory.file_digest(weights) == real(weights)


def test_a_digest_is_remembered_where_the_memo_cannot_be_written(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    (tmp_path / "weights").write_bytes(b"one")

    def refuse(path, text):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("sdtrt.engines.digests.write_atomically", refuse)
    first = directory.file_digest(tmp_path / "weights")
    monkeypatch.setattr("sdtrt.engines.digests.sha256_file", lambda path: pytest.fail("hashed again"))
    assert directory.file_digest(tmp_path / "weights") == first


def test_a_sight_sees_what_is_put_back(changing):
    (weights,) = changing.model.weight_files(PART)
    sight = Sight(changing.model, [PART])
    sight.check()
    weights.rename(weights.with_suffix(".aside"))
    with pytest.raises(ModelChangedError):
        sight.check()
    weights.with_suffix(".aside").rename(weights)
    with pytest.raises(ModelChangedError):
        sight.check()
    Sight(changing.model, [PART]).check()


# --- pipelines ---------------------------------------------------------------------------------------------------


@pytest.fixture
def request_of_one(changing, tmp_path):
    return GenerateSpec(
        model=changing.model.spec,
        prompts=("red",),
        steps=2,
        seed=0,
        height=32,
        width=32,
        backend="onnxruntime",
        components=(PART,),
        output=tmp_path / "out",
    )


def test_engines_of_a_pipeline_are_of_one_state_of_the_weights(changing, directory, monkeypatch, request_of_one):
    """The weights are replaced after the engine of the old ones was found."""
    old = build_engine(changing.model, spec_of(changing.model), directory)
    monkeypatch.setattr(engines, "best_fit", once(changing, find.best_fit, after=True))
    report = generate.generate(request_of_one, directory, QUIET)
    facts = report.to_json()
    assert facts["engines"][PART]["name"] != old.name
    assert facts["model"][PART] == changing.fingerprint()


@pytest.mark.parametrize(
    "step", ["_load_parts", *(pytest.param(step, marks=pytest.mark.slow) for step in ("open_session", "_facades"))]
)
def test_weights_that_are_replaced_while_a_pipeline_opens_are_an_error(
    changing, directory, monkeypatch, request_of_one, tmp_path, step
):
    build_engine(changing.model, spec_of(changing.model), directory)
    monkeypatch.setattr(pipeline_open, step, once(changing, getattr(pipeline_open, step), after=True))
    with pytest.raises(ModelChangedError, match=PART) as caught:
        generate.generate(request_of_one, directory, QUIET)
    assert "again" in caught.value.hint
    assert not list((tmp_path / "out").glob("*"))
    monkeypatch.undo()
    facts = generate.generate(request_of_one, directory, QUIET).to_json()
    assert facts["model"][PART] == changing.fingerprint()


def test_a_part_in_pytorch_that_is_replaced_while_it_loads_is_an_error(
    changing, directory, monkeypatch, request_of_one
):
    request_of_one = replace(request_of_one, backend="torch", components=())
    monkeypatch.setattr(loading, "load_unet", once(changing, loading.load_unet))
    with pytest.raises(ModelChangedError, match=PART):
        generate.generate(request_of_one, directory, QUIET)
    facts = generate.generate(request_of_one, directory, QUIET).to_json()
    assert facts["model"][PART] == changing.fingerprint()


def test_a_verified_model_that_is_replaced_meanwhile_is_an_error(changing, directory, monkeypatch, tmp_path):
    """Else the report would say of other weights than those it has compared whether they are the engine's."""

    def floor(*args):
        changing.replace("unet")
        return real(*args)

    real = verify.run_noise_floor
    monkeypatch.setattr(verify, "run_noise_floor", floor)
    image = GenerateSpec(("red",), model=changing.model.spec, backend="torch", steps=2, height=64, width=64)
    with pytest.raises(ModelChangedError, match="unet"):
        verify.verify(VerifySpec(image, timesteps=2, output=tmp_path / "out"), directory, QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_weights_that_are_written_in_place_while_a_pipeline_runs_are_an_error(
    changing, directory, monkeypatch, request_of_one, how, tmp_path
):
    """PyTorch has them mapped: they change under it. A file that is replaced stays what it was for this process."""

    def denoise(self, *args):
        (source,), (target,) = ((one / "unet").glob("*.safetensors") for one in (changing.new, changing.folder))
        changing.replace("unet") if how == "replaced" else shutil.copyfile(source, target)
        return real(self, *args)

    real = generate.Run._denoise
    before = changing.model.fingerprint("unet", factories.sha256_of)
    monkeypatch.setattr(generate.Run, "_denoise", denoise)
    request_of_one = replace(request_of_one, backend="torch", components=())
    if how == "replaced":
        facts = generate.generate(request_of_one, directory, QUIET).to_json()
        assert facts["model"]["unet"] == before
        return
    with pytest.raises(ModelChangedError, match="unet"):
        generate.generate(request_of_one, directory, QUIET)
    assert not list((tmp_path / "out").glob("*"))


# --- entries -----------------------------------------------------------------------------------------------------


def test_an_entry_that_is_made_anew_meanwhile_is_not_called_damaged(directory):
    def write(content):
        def make(folder):
            (folder / "model.onnx").write_bytes(content)
            return {}

        return make

    key = {"component": "unet", "precision": "fp32"}
    entry = directory.obtain("onnx", key, write(b"first"))
    directory.obtain("onnx", key, write(b"second"), force=True)
    with pytest.raises(CacheError, match="anew") as caught:
        entry.verified("model.onnx")
    assert "rm" not in caught.value.hint.split()
    (entry.path / "model.onnx").write_bytes(b"spoilt")
    with pytest.raises(CacheError, match="damaged"):
        directory.find("onnx", key).verified("model.onnx")


def test_an_engine_of_another_export_than_its_key_says_is_damaged(changing, directory):
    """As builds made them that read other weights than they had looked at."""
    spec = spec_of(changing.model)
    old = engine_key(changing.model, spec, directory).to_json()
    changing.replace()
    entry = build_engine(changing.model, spec, directory)

    def make(folder):
        shutil.copy(entry.file("engine.onnx"), folder)
        return entry.info

    with pytest.raises(CacheError):
        directory.obtain("engine", old, make)
    assert directory.find("engine", old) is None
    assert [one.state for one in upkeep.check(directory)].count("damaged") == 1
    assert directory.find("engine", entry.key) == entry
