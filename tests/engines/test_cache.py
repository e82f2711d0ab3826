"""The engine directory: finding, publishing, waiting, removing; nothing wrong or partial is ever loaded."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from factories import flip

from sdtrt.common.console import Console
from sdtrt.common.errors import BuildError, CacheError
from sdtrt.engines import find, trust, upkeep
from sdtrt.engines.directory import EngineDirectory, default_directory
from sdtrt.engines.entry import SIDECAR, ForeignEntry, canonical_json, entry_of, key_digest
from sdtrt.engines.publish import HOST
from sdtrt.specs import ModelSpec, PruneSpec

KEY = {"component": "unet", "precision": "fp32", "weights": "abc"}


def write(content: bytes = b"engine"):
    def make(folder):
        (folder / "model.onnx").write_bytes(content)
        return {"model": "test"}

    return make


def test_nothing_is_created_by_looking(directory):
    assert directory.find("onnx", KEY) is None
    assert directory.entries() == []
    assert not directory.path.exists()


def test_obtain_makes_once_then_finds(directory):
    made = directory.obtain("onnx", KEY, write())
    assert made.file("model.onnx").read_bytes() == b"engine"
    assert made.info == {"model": "test"}
    assert directory.obtain("onnx", dict(reversed(KEY.items())), lambda folder: pytest.fail("made twice")) == made
    assert directory.find("engine", KEY) is None
    assert directory.find("onnx", KEY | {"weights": "abd"}) is None


def test_an_entry_is_as_readable_as_its_directory(directory):
    directory.path.mkdir(mode=0o755)
    directory.path.chmod(0o755)
    assert directory.obtain("onnx", KEY, write()).path.stat().st_mode & 0o777 == 0o755


def test_force_replaces(directory):
    directory.obtain("onnx", KEY, write(b"old"))
    assert directory.obtain("onnx", KEY, write(b"new!"), force=True).file("model.onnx").read_bytes() == b"new!"
    assert len(directory.entries()) == 1


def test_force_keeps_the_old_entry_until_the_new_one_is_in_place(directory, monkeypatch):
    entry = directory.obtain("onnx", KEY, write(b"old"))
    real = Path.rename

    def failing(path, target):
        if (path / "model.onnx").read_bytes() == b"new":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        directory.obtain("onnx", KEY, write(b"new"), force=True)
    assert directory.find("onnx", KEY) == entry
    assert entry.verified("model.onnx").read_bytes() == b"old"
    assert list((directory.path / ".building").iterdir()) == []


def test_failure_leaves_nothing(directory):
    def make(folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directory.obtain("onnx", KEY, make)
    assert directory.entries() == []
    assert list((directory.path / ".building").iterdir()) == []


DAMAGES = ("truncate", "remove", "link", "lie", "garbage", "no sidecar", "format", "rename", "escape", "open to all")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_never_found(directory, damage):
    entry = directory.obtain("onnx", KEY, write())
    sidecar = entry.path / SIDECAR
    data = json.loads(sidecar.read_text())
    if damage == "truncate":
        entry.file("model.onnx").write_bytes(b"eng")
    elif damage == "remove":
        entry.file("model.onnx").unlink()
    elif damage == "link":
        entry.file("model.onnx").rename(directory.path / "elsewhere")
        (entry.path / "model.onnx").symlink_to(directory.path / "elsewhere")
    elif damage == "lie":
        sidecar.write_text(json.dumps(data | {"key": KEY | {"weights": "other"}}))
    elif damage == "garbage":
        sidecar.write_bytes(b"\xff\x00{")
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "format":
        sidecar.write_text(json.dumps(data | {"format": 0}))
    elif damage == "rename":
        entry.path.rename(entry.path.with_name("unet-onnx-fp32-0000000000000000"))
    elif damage == "escape":
        sidecar.write_text(json.dumps(data | {"files": {"../elsewhere": {"size_bytes": 0}}}))
    elif damage == "open to all":
        entry.file("model.onnx").chmod(0o666)
    (found,) = upkeep.check(directory)
    assert found.state == {"format": "foreign", "open to all": "unsafe"}.get(damage, "damaged"), found
    assert found.problem
    assert directory.find("onnx", KEY) is None
    assert directory.entries() == []
    assert directory.obtain("onnx", KEY, write(b"again")).file("model.onnx").read_bytes() == b"again"


def test_checking_reads_every_file_and_leaves_alone_what_is_not_its_own(directory):
    directory.obtain("onnx", KEY, write_two)
    flipped = directory.obtain("onnx", KEY | {"weights": "b"}, write_two)
    (directory.path / "my own folder").mkdir()
    (directory.path / "README.md").write_text("notes")
    flip(flipped.path / "build.log")
    assert {one.name: one.state for one in upkeep.check(directory)}[flipped.name] == "damaged"
    assert sorted(one.state for one in upkeep.check(directory)) == ["damaged", "ok"]
    assert [path.name for path in (directory.folder_named(flipped.name),)] == [flipped.name]


def test_a_sidecar_that_was_changed_is_seen(directory):
    entry = directory.obtain("onnx", KEY, write())
    sidecar = entry.path / SIDECAR
    sidecar.write_text(sidecar.read_text().replace('"test"', '"tess"'))
    assert directory.find("onnx", KEY) is None
    (found,) = upkeep.check(directory)
    assert "entry.json is damaged" in found.problem


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "null", '{"format": 1, "seal": 1e999}', "1e999"])
def test_a_sidecar_of_nonsense_is_no_entry(directory, text):
    entry = directory.obtain("onnx", KEY, write())
    (entry.path / SIDECAR).write_text(text)
    assert directory.entries() == []
    assert len(list(upkeep.check(directory))) == 1


def write_two(folder):
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(b"weights")
    (folder / "build.log").write_bytes(b"log")
    return {}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_flipped_bit_is_seen_before_a_file_is_used(tmp_path, name):
    entry = EngineDirectory(tmp_path / "my engines").obtain("onnx", KEY, write_two)
    assert entry.verified("model.onnx") == entry.file("model.onnx")
    flip(entry.path / "build.log")
    assert entry.verified("model.onnx").read_bytes() == b"graph"
    flip(entry.path / name)
    with pytest.raises(CacheError, match="is damaged: its content is not what was published") as caught:
        entry.verified("model.onnx")
    assert str(entry.path / name) in caught.value.message
    words = shlex.split(caught.value.hint.split(";")[0])
    assert words == ["sdtrt", "engines", "rm", entry.name, "--engine-dir", str(tmp_path / "my engines")]


def test_a_file_that_cannot_be_read_is_an_error_with_the_mend(directory):
    entry = directory.obtain("onnx", KEY, write())
    entry.file("model.onnx").unlink()
    with pytest.raises(CacheError, match=r"model.onnx can't be read") as caught:
        entry.verified("model.onnx")
    assert "sdtrt engines rm" in caught.value.hint
    with pytest.raises(CacheError, match=r"has no engine.plan"):
        entry.verified("engine.plan")


def test_a_sidecar_without_digests_is_foreign(directory):
    entry = directory.obtain("onnx", KEY, write())
    data = json.loads((entry.path / SIDECAR).read_text())
    del data["files"]["model.onnx"]["sha256"]
    (entry.path / SIDECAR).write_text(json.dumps(data))
    assert directory.find("onnx", KEY) is None


@pytest.mark.parametrize(
    ("backend", "name", "damaged"),
    [
        ("onnxruntime", "engine.onnx", "engine.onnx"),
        ("onnxruntime", "engine.onnx", "engine.onnx.data"),
        ("openvino", "engine.blob", "engine.blob"),
        ("tensorrt", "engine.plan", "engine.plan"),
    ],
)
def test_a_damaged_engine_is_not_opened(directory, backend, name, damaged):
    import torch

    from sdtrt.backends.open import open_session

    def make(folder):
        for file in {name, damaged}:
            (folder / file).write_bytes(b"engine")
        contract = {"component": "unet", "precision": "fp32", "inputs": [], "outputs": []}
        return {"contract": contract}

    entry = directory.obtain("engine", KEY | {"backend": backend}, make)
    flip(entry.path / damaged)
    with pytest.raises(CacheError, match=f"{damaged} is damaged"):
        open_session(entry, torch.device("cpu"))


def refuse(monkeypatch, owner, name, code, below):
    """Let a function fail as the system would, for paths below `below` (these tests may run as root)."""
    real = getattr(owner, name)

    def refusing(path, *args, **options):
        if Path(path).is_relative_to(below):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(owner, name, refusing)


@pytest.mark.parametrize("look", ["find", "entries", "named", "abandoned", "prunable"])
def test_a_directory_that_cannot_be_read_is_an_error_with_a_hint(directory, monkeypatch, look):
    directory.obtain("onnx", KEY, write())
    for name in ("iterdir", "stat"):
        refuse(monkeypatch, Path, name, errno.EACCES, directory.path)
    calls = {
        "find": lambda: directory.find("onnx", KEY),
        "entries": directory.entries,
        "named": lambda: directory.named("unet"),
        "abandoned": lambda: upkeep.abandoned(directory),
        "prunable": lambda: upkeep.prunable(directory, PruneSpec(), lambda entry: False),
    }
    with pytest.raises(CacheError, match="can't be read: Permission denied") as caught:
        calls[look]()
    assert str(directory.path) in caught.value.message
    assert "--engine-dir FOLDER" in caught.value.hint


def test_a_listed_directory_that_cannot_be_searched_is_not_empty(directory, monkeypatch):
    entry = directory.obtain("onnx", KEY, write())
    refuse(monkeypatch, Path, "stat", errno.EACCES, entry.path)
    with pytest.raises(CacheError, match="can't be read"):
        directory.entries()
    with pytest.raises(CacheError, match="can't be read"):
        directory.find("onnx", KEY)


def test_a_directory_in_a_folder_that_cannot_be_searched(tmp_path, monkeypatch):
    refuse(monkeypatch, Path, "stat", errno.EACCES, tmp_path)
    with pytest.raises(CacheError, match="can't be read: Permission denied") as caught:
        EngineDirectory(tmp_path / "engines")
    assert "--engine-dir FOLDER" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="Windows says that nothing is there")
def test_a_path_below_a_file_is_not_about_space(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="Not a directory") as caught:
        EngineDirectory(tmp_path / "file" / "engines").obtain("onnx", KEY, write())
    assert "--engine-dir FOLDER" in caught.value.hint
    assert "space" not in caught.value.hint


@pytest.mark.parametrize(
    ("code", "space"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False), (errno.EROFS, False)]
)
def test_only_a_full_disk_is_about_space(directory, code, space):
    def make(folder):
        raise OSError(code, os.strerror(code), str(folder / "model.onnx"))

    with pytest.raises(CacheError, match="can't be written") as caught:
        directory.obtain("onnx", KEY, make)
    assert ("space" in caught.value.hint) == space


@pytest.mark.parametrize("when", ["in the draft", "in a library", "after the draft"])
def test_a_directory_that_is_removed_while_something_is_made_is_an_error_with_a_hint(directory, when):
    def make(folder):
        shutil.rmtree(directory.path)
        if when == "in the draft":
            (folder / "model.onnx").write_bytes(b"engine")
        if when == "in a library":
            raise BuildError("NO_SUCHFILE", hint="try another")
        return {}

    with pytest.raises(CacheError, match="has vanished: something else removes from") as caught:
        directory.obtain("onnx", KEY, make)
    assert "run the command again" in caught.value.hint
    assert directory.obtain("onnx", KEY, write()).file("model.onnx").read_bytes() == b"engine"


@pytest.mark.parametrize("name", [(), ("elsewhere/weights.safetensors",)])
def test_what_is_missing_elsewhere_is_not_the_directorys(directory, name):
    def make(folder):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", *name)

    with pytest.raises(FileNotFoundError):
        directory.obtain("onnx", KEY, make)


def test_failures_in_a_folder_whose_name_only_begins_the_same_are_not_the_directorys(directory):
    def make(folder):
        raise PermissionError(errno.EACCES, "Permission denied", f"{directory.path}2/weights.safetensors")

    with pytest.raises(PermissionError):
        directory.obtain("onnx", KEY, make)


def test_a_file_is_no_engine_directory(tmp_path):
    (tmp_path / "engines").write_text("x")
    with pytest.raises(CacheError) as caught:
        EngineDirectory(tmp_path / "engines")
    assert "--engine-dir" in caught.value.hint


@pytest.mark.skipif(os.name == "nt", reason="needs /proc")
def test_a_directory_that_cannot_be_made_is_an_error_with_a_hint():
    with pytest.raises(CacheError) as caught:
        EngineDirectory(Path("/proc/engines")).obtain("onnx", KEY, write())
    assert "--engine-dir" in caught.value.hint


def test_failures_of_the_maker_keep_their_own_type(directory):
    def make(folder):
        raise FileNotFoundError(2, "no such file", "/somewhere/weights.safetensors")

    with pytest.raises(FileNotFoundError):
        directory.obtain("onnx", KEY, make)


def _slow(path, queue):
    def make(folder):
        queue.put("made")
        time.sleep(0.5)
        (folder / "model.onnx").write_bytes(b"x")
        return {}

    queue.put(EngineDirectory(path).obtain("onnx", KEY, make).name)


def test_of_two_processes_one_makes_and_the_other_waits(directory):
    context = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    queue = context.Queue()
    processes = [context.Process(target=_slow, args=(directory.path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    said = [queue.get(timeout=30) for _ in range(3)]
    assert said.count("made") == 1
    assert len(set(said) - {"made"}) == 1


def test_sweep_removes_what_dead_builds_left(directory):
    directory.obtain("onnx", KEY, write())
    orphan = directory.path / ".building" / (key_digest("onnx", KEY) + "-dead")
    orphan.mkdir()
    assert upkeep.sweep(directory) == 1
    assert not orphan.exists()
    assert len(directory.entries()) == 1


def contents(path):
    return sorted(path.rglob("*"))


def test_looking_for_what_was_left_behind_changes_nothing(directory):
    directory.obtain("onnx", KEY, write())
    (directory.path / ".building" / (key_digest("onnx", KEY | {"weights": "z"}) + "-dead")).mkdir()
    before = contents(directory.path)
    assert len(upkeep.abandoned(directory)) == 1
    assert contents(directory.path) == before


def test_sweep_removes_files_too_and_leaves_what_has_no_name_of_ours(directory):
    directory.obtain("onnx", KEY, write())
    trash, notes = directory.path / ".building" / "trash-1", directory.path / ".building" / "notes"
    trash.write_text("x")
    notes.write_text("x")
    assert upkeep.sweep(directory) == 1
    assert not trash.exists()
    assert notes.exists()
    assert upkeep.sweep(directory) == 0


def test_a_build_under_way_is_not_swept(directory):
    def make(folder):
        assert upkeep.abandoned(EngineDirectory(directory.path)) == []
        return write()(folder)

    directory.obtain("onnx", KEY, make)
    directory.obtain("onnx", KEY, make, force=True)


@pytest.mark.skipif(os.name == "nt", reason="locks are opened another way there")
def test_a_lock_that_may_not_be_tried_may_be_held(directory, monkeypatch):
    directory.obtain("onnx", KEY, write())
    (directory.path / ".building" / (key_digest("onnx", KEY) + "-dead")).mkdir()
    (directory.path / ".locks").mkdir(exist_ok=True)
    (directory.path / ".locks" / f"{key_digest('onnx', KEY)}.lock").touch()
    refuse(monkeypatch, os, "open", errno.EROFS, directory.path)
    assert upkeep.abandoned(directory) == []


def test_what_cannot_be_swept_is_an_error_with_a_hint(directory, monkeypatch):
    (directory.path / ".building").mkdir(parents=True)
    (directory.path / ".building" / "trash-1").touch()
    refuse(monkeypatch, Path, "unlink", errno.EROFS, directory.path)
    with pytest.raises(CacheError, match="can't be written: Read-only file system") as caught:
        upkeep.sweep(directory)
    assert "--engine-dir FOLDER" in caught.value.hint


def test_what_is_in_use_is_not_removed(directory):
    entry, other = (directory.obtain("onnx", KEY | {"weights": w}, write()) for w in "ab")
    with entry.hold(), entry.hold():
        with pytest.raises(CacheError, match="is in use") as caught:
            EngineDirectory(directory.path).remove(entry)
        assert caught.value.hint
        assert directory.is_in_use(entry.path)
        assert not directory.is_in_use(other.path)
        directory.obtain("onnx", entry.key, write(b"new"), force=True)  # replaced, and the old one stays where it went
        assert upkeep.abandoned(directory) == []
    assert len(upkeep.abandoned(directory)) == 1
    directory.remove(entry)
    assert directory.entries() == [other]


def test_what_was_removed_can_no_longer_be_held(directory):
    entry = directory.obtain("onnx", KEY, write())
    kept = entry.hold()
    kept.close()
    directory.remove(entry)
    with pytest.raises(CacheError, match="can't be read") as caught:
        entry.hold()
    assert "run the command again" in caught.value.hint


def test_a_killed_builders_draft_goes_when_its_key_is_made_again(directory):
    directory.path.mkdir()
    draft = directory.path / ".building" / f"{key_digest('onnx', KEY)}-{HOST}-dead"
    draft.mkdir(parents=True)
    directory.obtain("onnx", KEY, write())
    assert not draft.exists()


def test_another_machines_draft_is_left_alone_until_it_is_old(directory):
    draft = directory.path / ".building" / f"{key_digest('onnx', KEY)}-00000000-under_way"
    draft.mkdir(parents=True)
    directory.obtain("onnx", KEY, write())
    assert upkeep.sweep(directory) == 0
    long_ago = time.time() - 3 * 86400
    os.utime(draft, (long_ago, long_ago))
    assert upkeep.sweep(directory) == 1


def _without_locks(monkeypatch):
    """A file system that has none, as some network ones."""
    from filelock import FileLock

    def refuse(lock, *args, **options):
        raise OSError(errno.ENOLCK, "No locks available", str(lock.lock_file))

    monkeypatch.setattr(FileLock, "acquire", refuse)


def test_without_locks_the_first_of_two_builders_wins(directory, monkeypatch, capsys):
    _without_locks(monkeypatch)

    def slow(folder):
        EngineDirectory(directory.path).obtain("onnx", KEY, write(b"first"))
        return write(b"second")(folder)

    entry = directory.obtain("onnx", KEY, slow, Console())
    assert entry.verified("model.onnx").read_bytes() == b"first"
    assert list((directory.path / ".building").iterdir()) == []
    assert "without locks" in capsys.readouterr().err


def _die_while_making(path, ready):
    def make(folder):
        ready.set()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    EngineDirectory(path).obtain("onnx", KEY, make)


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_who_waits_says_so_and_takes_over_from_a_dead_builder(directory, capsys):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    builder = context.Process(target=_die_while_making, args=(directory.path, ready))
    builder.start()
    assert ready.wait(30)
    entry = directory.obtain("onnx", KEY, write(), Console())
    builder.join()
    assert entry.verified("model.onnx").read_bytes() == b"engine"
    said = capsys.readouterr().err
    assert said.startswith("waiting for another process that is making the same entry")
    assert "ended without it: making it here" in said
    assert list((directory.path / ".building").iterdir()) == []


OPEN = [(0o777, "everybody"), (0o757, "everybody"), (0o1777, "everybody")]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("use", ["find", "obtain", "entries", "check"])
@pytest.mark.parametrize(("mode", "who"), OPEN)
def test_a_directory_that_others_can_write_is_refused(directory, mode, who, use):
    directory.obtain("onnx", KEY, write())
    directory.path.chmod(mode)
    calls = {
        "find": lambda: directory.find("onnx", KEY),
        "obtain": lambda: directory.obtain("onnx", KEY | {"weights": "z"}, write()),
        "entries": directory.entries,
        "check": lambda: list(upkeep.check(directory)),
    }
    with pytest.raises(CacheError, match=f"is not safe: {who} can change it") as caught:
        calls[use]()
    assert f"chmod -R go-w {directory.path}, or" in caught.value.hint
    assert "--trust-engine-dir" in caught.value.hint
    assert len(EngineDirectory(directory.path, trust_others=True).entries()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_an_entry_that_others_can_change_is_passed_over_with_a_word_and_comes_back(directory, capsys):
    safe = directory.obtain("onnx", KEY | {"weights": "b"}, write())
    entry = directory.obtain("onnx", KEY, write())
    entry.path.chmod(0o777)
    assert directory.entries() == [safe]
    mend = f"chmod -R go-w {directory.path}"
    assert directory.unsafe() == {entry.name: mend}
    assert directory.warn_of_unsafe(Console())
    assert not directory.warn_of_unsafe(Console())
    said = capsys.readouterr().err
    assert said.startswith("warning: 1 of the entries of")
    assert said.endswith(f"{mend} mends that, if nobody has\n")
    subprocess.run(["sh", "-c", mend], check=True)
    assert directory.unsafe() == {}
    assert directory.find("onnx", KEY) == entry


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_an_entry_that_others_can_change_is_made_again_with_a_word(directory, capsys):
    other = directory.obtain("onnx", KEY | {"weights": "b"}, write())
    directory.obtain("onnx", KEY, write()).path.chmod(0o777)
    directory.obtain("onnx", KEY | {"weights": "c"}, write(), Console())
    assert capsys.readouterr().err == ""  # it has nothing to do with that one
    directory.obtain("onnx", KEY, write(), Console())
    assert "passed over" in capsys.readouterr().err
    assert len(directory.entries()) == 3
    assert other in directory.entries()


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_so_is_one_in_a_folder_where_others_can_rename_it(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    directory = EngineDirectory(tmp_path / "open" / "engines")
    with pytest.raises(CacheError, match=f"everybody can change {tmp_path / 'open'}") as caught:
        directory.obtain("onnx", KEY, write())
    assert caught.value.hint.startswith(f"chmod go-w {tmp_path / 'open'}, or")
    (tmp_path / "open").chmod(0o1777)  # as /tmp: nobody renames what is another's
    directory.obtain("onnx", KEY, write())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
def test_a_directory_of_another_user_is_refused_until_it_is_taken_over(tmp_path):
    directory = EngineDirectory(tmp_path / "my engines")
    entry = directory.obtain("onnx", KEY, write())
    for path in (directory.path, entry.path, *entry.path.iterdir()):
        os.chown(path, 12345, 12345)
    with pytest.raises(CacheError, match="its owner, user 12345") as caught:
        directory.entries()
    mend, rest = caught.value.hint.split(", or ")
    assert "--trust-engine-dir" in rest
    subprocess.run(["sh", "-c", mend], check=True)
    assert directory.entries() == [entry]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_above_that_is_another_users_is_left_to_them(tmp_path):
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", 12345, 12345)
    with pytest.raises(CacheError, match=r"its owner, user 12345 can change .*home") as caught:
        EngineDirectory(tmp_path / "home" / "engines").obtain("onnx", KEY, write())
    assert caught.value.hint == "name another --engine-dir; --trust-engine-dir takes it as it is"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root gives files away")
def test_a_group_with_others_in_it_is_refused(directory):
    directory.obtain("onnx", KEY, write())
    os.chown(directory.path, 0, 12345)
    directory.path.chmod(0o775)
    with pytest.raises(CacheError, match="the group 12345"):
        directory.entries()


def test_what_is_published_only_its_user_can_change(tmp_path):
    """Nor may others change the new folders above it, without which it would be refused at once."""
    directory = EngineDirectory(tmp_path / "above" / "all" / "engines")
    old = os.umask(0)
    try:
        entry = directory.obtain("onnx", KEY, write())
        directory.timing_cache("8.6")
    finally:
        os.umask(old)
    folders = (directory.path.parents[1], directory.path.parent, directory.path, *directory.path.iterdir())
    assert {".building", ".locks", ".timing"} < {path.name for path in folders}
    assert all(path.stat().st_mode & 0o022 == 0 for path in (*folders, *entry.path.iterdir()))
    assert directory.find("onnx", KEY) == entry


def test_everything_is_flushed_before_it_is_renamed_into_place(directory, monkeypatch):
    """In order: the files, their folder, the rename, the directory. So a power loss finds all of it or nothing."""
    happened = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor):
        happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_rename(path, target):
        result = rename(path, target)
        happened.append(f"-> {Path(target).name}")
        return result

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    entry = directory.obtain("onnx", KEY, write_two)
    moved = happened.index(f"-> {entry.name}")
    before = happened[:moved]
    assert {*entry.files, SIDECAR} <= set(before)
    assert before[-1].startswith(key_digest("onnx", KEY))
    assert directory.path.name in happened[moved:]


def test_named_takes_an_unambiguous_beginning(directory):
    one = directory.obtain("onnx", KEY, write())
    directory.obtain("onnx", KEY | {"weights": "z"}, write())
    assert directory.named(one.name) == one
    assert directory.named(one.name[:-4]) == one
    with pytest.raises(CacheError, match="has 2 entries that begin with 'unet'"):
        directory.named("unet")
    for name in ("nothing", ""):
        with pytest.raises(CacheError, match=f"has no entry named '{name}'"):
            directory.named(name)


def test_an_empty_name_is_not_the_only_entry(directory):
    directory.obtain("onnx", KEY, write())
    with pytest.raises(CacheError):
        directory.named("")


def test_remove(directory):
    entry = directory.obtain("onnx", KEY, write())
    directory.remove(entry)
    assert directory.entries() == []
    assert not entry.path.exists()


def test_an_entry_that_another_process_removes_meanwhile(directory):
    entry, other = (directory.obtain("onnx", KEY | {"weights": w}, write()) for w in "ab")
    EngineDirectory(directory.path).remove(entry)
    assert entry.last_used == entry.created
    assert entry.to_json()["last_used"] == entry.created
    directory.remove(entry)
    assert directory.entries() == [other]


def test_prune_goes_by_last_use_then_size(directory):
    old, new = (directory.obtain("onnx", KEY | {"weights": w}, write(b"1234")) for w in "ab")
    os.utime(old.path / SIDECAR, (time.time() - 10 * 86400,) * 2)
    keep = lambda entry: False  # noqa: E731
    assert upkeep.prunable(directory, PruneSpec(older_than_days=5), keep) == [old]
    assert upkeep.prunable(directory, PruneSpec(keep_bytes=4), keep) == [old]
    assert upkeep.prunable(directory, PruneSpec(keep_bytes=0), keep) == [old, new]
    assert upkeep.prunable(directory, PruneSpec(), keep) == []
    assert upkeep.prunable(directory, PruneSpec(foreign=True), lambda entry: entry == new) == [new]
    directory.find("onnx", old.key)  # a use renews it
    assert upkeep.prunable(directory, PruneSpec(older_than_days=5), keep) == []


def make_foreign(entry, **change):
    """Make an entry one of another format, as another version of sdtrt writes it."""
    data = json.loads((entry.path / SIDECAR).read_text())
    (entry.path / SIDECAR).write_text(json.dumps(data | (change or {"format": 99, "files": ["of", "another", "form"]})))


@pytest.mark.parametrize("change", [{"format": 0}, {"format": 99, "key": 1, "seal": None}, {"format": "two"}], ids=str)
def test_an_entry_of_another_format_is_listed_counted_and_pruned(directory, change):
    entry, other = (directory.obtain("onnx", KEY | {"weights": w}, write(b"1234")) for w in "ab")
    make_foreign(entry, **change)
    (foreign,) = (one for one in directory.all_entries() if isinstance(one, ForeignEntry))
    assert foreign.name == entry.name
    assert foreign.size_bytes == 4 + (entry.path / SIDECAR).stat().st_size
    assert directory.entries() == [other]
    assert directory.find("onnx", entry.key) is None
    with pytest.raises(CacheError, match="another version"):
        directory.named(entry.name)
    keep = lambda entry: False  # noqa: E731
    assert upkeep.prunable(directory, PruneSpec(), keep) == []
    assert upkeep.prunable(directory, PruneSpec(foreign=True), keep) == [foreign]
    assert upkeep.prunable(directory, PruneSpec(older_than_days=1), keep) == []
    os.utime(entry.path / SIDECAR, (time.time() - 10 * 86400,) * 2)
    assert upkeep.prunable(directory, PruneSpec(older_than_days=1), keep) == [foreign]
    assert upkeep.prunable(directory, PruneSpec(keep_bytes=5), keep) == [foreign]
    assert upkeep.prunable(directory, PruneSpec(keep_bytes=4 + foreign.size_bytes), keep) == []
    directory.remove(foreign.path)
    assert directory.all_entries() == [other]


def test_what_sdtrt_has_not_named_is_no_entry_of_another_format(directory, tmp_path):
    entry = directory.obtain("onnx", KEY, write())
    make_foreign(entry)
    shutil.copytree(entry.path, directory.path / "somebodys own folder")
    entry.path.rename(tmp_path / entry.name)
    entry.path.symlink_to(tmp_path / entry.name)
    assert directory.all_entries() == []


@pytest.fixture
def count_read(monkeypatch):
    """How many sidecars have been read."""
    read = []
    monkeypatch.setattr(trust, "entry_of", lambda folder, data: (read.append(folder.name), entry_of(folder, data))[1])
    return lambda: len(read)


def test_a_sidecar_is_read_once_until_it_changes(directory, count_read):
    made = [directory.obtain("engine", KEY | {"weights": w, "backend": "x"}, write()) for w in "abcd"]
    entries = sorted(made, key=lambda entry: entry.name)
    make_foreign(entries[3])
    directory, before = EngineDirectory(directory.path), count_read()
    for _ in range(3):
        assert directory.entries("engine") == entries[:3]
        assert directory.find("engine", entries[0].key) == entries[0]  # which touches it
    find.likely(directory, ModelSpec("test"), "auto")
    assert count_read() - before == 4 + 3
    directory.obtain("engine", entries[1].key, write(b"more of it"), force=True)
    assert directory.entries()[1].size_bytes == 10
    entries[2].file("model.onnx").chmod(0o666)
    assert len(directory.entries()) == 2, "others can change it now"
    entries[0].file("model.onnx").write_bytes(b"longer than it was")
    assert len(directory.entries()) == 1
    shutil.rmtree(entries[1].path)
    assert directory.entries() == []


def test_two_threads_that_look_read_a_sidecar_once(directory, count_read):
    for number in range(20):
        directory.obtain("engine", KEY | {"weights": number}, write())
    directory, before = EngineDirectory(directory.path), count_read()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: len(directory.entries()), range(8)))
    assert found == [20] * 8
    assert count_read() - before == 20


def test_digest_of_a_large_file_is_remembered_until_it_changes(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    first = directory.file_digest(weights)
    monkeypatch.setattr("sdtrt.engines.digests.sha256_file", lambda path: pytest.fail("hashed again"))
    assert directory.file_digest(weights) == first
    monkeypatch.undo()
    weights.write_bytes(b"another")
    assert directory.file_digest(weights) != first


def test_a_large_file_with_its_old_time_put_back_is_hashed_again(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    weights = tmp_path / "weights"
    weights.write_bytes(b"one")
    before = weights.stat()
    first = directory.file_digest(weights)
    time.sleep(0.05)  # longer than the steps of a file system's clock
    weights.write_bytes(b"two")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert directory.file_digest(weights) != first


def test_a_memo_that_cannot_be_written_leaves_nothing(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    (tmp_path / "weights").write_bytes(b"one")
    refuse(monkeypatch, Path, "replace", errno.ENOSPC, directory.path)
    directory.file_digest(tmp_path / "weights")
    assert list(directory.path.iterdir()) == []


def test_canonical_json_does_not_depend_on_order():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'


def test_default_directory_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SDTRT_ENGINE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_directory().parent == tmp_path / "cache" / "sdtrt"
    (tmp_path / "engines").mkdir()
    assert default_directory().name == "engines"
    monkeypatch.setenv("SDTRT_ENGINE_DIR", str(tmp_path / "named"))
    assert default_directory() == tmp_path / "named"


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """A user that the system doesn't know, as containers run them."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE", "HOMEPATH", "LOCALAPPDATA", "XDG_CACHE_HOME", "SDTRT_ENGINE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7, raising=False)


@pytest.mark.parametrize("named", [None, "~/x", "~nosuch/x"])
def test_without_a_home_directory_the_engine_directory_must_be_named(named, homeless, run, monkeypatch, tmp_path):
    if named:
        monkeypatch.setenv("SDTRT_ENGINE_DIR", named)
    wanted = named or str(Path("~", ".cache"))
    error = (
        f"error: the engine directory would be {wanted}, and no home directory is known for {wanted.split('/')[0]}\n"
    )
    hint = "hint: name a folder: --engine-dir FOLDER, or $SDTRT_ENGINE_DIR\n"
    for command in (("engines", "list"), ("doctor",), ("txt2img", "-p", "x", "-b", "torch")):
        assert run(*command) == (1, "", error + hint)
    assert run("engines", "list", "--engine-dir", str(tmp_path / "engines"))[0] == 0


def test_a_tilde_is_the_home_directory_wherever_it_comes_from(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SDTRT_ENGINE_DIR", "~/x")
    expected = (tmp_path / "x").absolute()
    assert default_directory() == expected
    assert json.loads(run("engines", "list", "--json", "--engine-dir=~/x")[1])["directory"] == str(expected)
    code, out, err = run("engines", "list", "--engine-dir=~nosuch/x")
    assert (code, out) == (1, "")
    assert "no home directory is known for ~nosuch" in err


def test_hints_are_commands_for_any_folder(tmp_path):
    directory = EngineDirectory(tmp_path / "my  engines")
    directory.obtain("onnx", KEY, write())
    with pytest.raises(CacheError, match="has no entry named 'b'") as caught:
        directory.named("b")
    command = caught.value.hint.removesuffix(" shows the names")
    assert shlex.split(command) == ["sdtrt", "engines", "list", "--engine-dir", str(directory.path)]
