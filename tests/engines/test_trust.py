"""Who could change an engine directory, by which way; and what is in it that must not be there: nothing is followed."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from pathlib import Path

import pytest

from sdtrt.common.errors import CacheError
from sdtrt.engines import upkeep
from sdtrt.engines.directory import EngineDirectory
from sdtrt.engines.entry import SIDECAR, key_digest
from sdtrt.specs import PruneSpec

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions, and links of its own")
only_root = pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="only root gives files away")

KEY = {"component": "unet", "precision": "fp32", "weights": "abc"}
STRANGER = 12345
OWNER, USER, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20


def make(folder):
    (folder / "model.onnx").write_bytes(b"engine")
    return {"model": "test"}


@pytest.fixture
def full(directory):
    """An engine directory with one entry."""
    directory.obtain("onnx", KEY, make)
    return directory


@pytest.fixture
def precious(tmp_path):
    """A folder of somebody's, which must stay as it is."""
    folder = tmp_path / "precious"
    (folder / f"{key_digest('onnx', KEY)}-dead").mkdir(parents=True)
    (folder / "trash-1").write_text("photos")
    (folder / SIDECAR).write_text("{}")
    return folder


def contents(folder):
    return {path: path.lstat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


def grant(path, rights=7, *, default=False, user=STRANGER):
    """Give a user rights to a file or folder by a POSIX access list; `default`: to what is made in it."""
    none = 2**32 - 1
    lines = [(OWNER, 7, none), (USER, rights, user), (GROUP, 5, none), (MASK, rights | 5, none), (OTHER, 5, none)]
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *line) for line in lines)
    try:
        os.setxattr(path, f"system.posix_acl_{'default' if default else 'access'}", data)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("no access lists here")


CALLS = {
    "sweep": lambda directory: upkeep.sweep(directory),
    "abandoned": lambda directory: upkeep.abandoned(directory),
    "obtain": lambda directory: directory.obtain("onnx", KEY | {"weights": "z"}, make),
    "force": lambda directory: directory.obtain("onnx", KEY, make, force=True),
    "remove": lambda directory: directory.remove(directory.entries()[0]),
    "timing": lambda directory: directory.timing_cache("8.6"),
}
OWN = [(call, ".building") for call in ("sweep", "abandoned", "obtain", "force", "remove")]
OWN += [("obtain", ".locks"), ("force", ".locks"), ("timing", ".timing")]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(("call", "name"), OWN)
def test_no_link_in_the_place_of_a_folder_of_its_own_is_followed(full, precious, call, name, trust):
    move_away(full.path / name)
    (full.path / name).symlink_to(precious)
    before = contents(precious)
    with pytest.raises(CacheError, match=f"{name} is a link, where sdtrt has a folder of its own") as caught:
        CALLS[call](EngineDirectory(full.path, trust_others=trust))
    assert caught.value.hint.startswith(f"move it out of the way: mv {full.path / name} {full.path / name}.old")
    assert contents(precious) == before
    assert len(full.entries()) == 1


def move_away(path):
    if path.exists():
        path.rename(path.with_name(f"{path.name}-moved"))


@pytest.mark.parametrize(("call", "name"), OWN)
def test_a_file_in_the_place_of_a_folder_of_its_own_is_an_error_with_the_mend(full, call, name):
    move_away(full.path / name)
    (full.path / name).write_text("mine")
    with pytest.raises(CacheError, match="is a file, where sdtrt has a folder"):
        CALLS[call](full)
    assert (full.path / name).read_text() == "mine"


@pytest.mark.parametrize("kind", ["a folder", "a link", "neither file nor folder"])
@pytest.mark.parametrize("call", ["sweep", "obtain", "timing"])
def test_a_lock_that_is_no_file_is_an_error_with_the_mend(full, tmp_path, call, kind):
    digest = key_digest("onnx", KEY | {"weights": "z"})
    folder, name = (".timing", "8.6.cache.lock") if call == "timing" else (".locks", f"{digest}.lock")
    (full.path / ".building" / f"{digest}-dead").mkdir()
    lock = full.path / folder / name
    lock.parent.mkdir(exist_ok=True)
    make_it = {"a folder": lock.mkdir, "a link": lambda: lock.symlink_to(tmp_path / "target")}
    make_it.get(kind, lambda: os.mkfifo(lock))()
    with pytest.raises(CacheError, match=f"{name} is {kind}, where sdtrt has a file of its own"):
        CALLS[call](full)
    assert not (tmp_path / "target").exists()


def test_a_link_among_what_builds_left_is_removed_itself_at_most(full, precious):
    building = full.path / ".building"
    (building / f"{key_digest('onnx', KEY)}-dead").symlink_to(precious)
    (building / "elsewhere").symlink_to(precious)
    before = contents(precious)
    assert upkeep.sweep(full) == 1
    assert contents(precious) == before
    assert (building / "elsewhere").is_symlink()


@pytest.mark.parametrize("way", ["remove", "force"])
def test_a_link_in_the_place_of_an_entry_is_replaced_itself(full, precious, way):
    (entry,) = full.entries()
    entry.path.rename(full.path / "moved")
    entry.path.symlink_to(precious)
    before = contents(precious)
    if way == "remove":
        full.remove(full.folder_named(entry.name))
    else:
        assert full.obtain("onnx", KEY, make).path == entry.path
    assert contents(precious) == before
    assert not entry.path.is_symlink()


def test_a_memo_that_is_a_link_is_neither_read_nor_written_through(full, tmp_path, monkeypatch):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    (tmp_path / "weights").write_bytes(b"weights")
    (tmp_path / "target").write_text("{}")
    memo = full.path / ".digests.json"
    memo.symlink_to(tmp_path / "target")
    digest = full.file_digest(tmp_path / "weights")
    assert (tmp_path / "target").read_text() == "{}"
    memo.chmod(0o666)
    memo.write_text(memo.read_text().replace(digest, "0" * 64))
    later = EngineDirectory(full.path)  # one that has hashed nothing yet
    assert later.file_digest(tmp_path / "weights") == digest  # others could have written it
    assert stat.S_IMODE(memo.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["fifo", "endless"])
@pytest.mark.parametrize("name", [SIDECAR, ".digests.json"])
def test_what_is_no_file_is_not_waited_for(full, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr("sdtrt.engines.digests.MEMO_BYTES", 1)
    (tmp_path / "weights").write_bytes(b"weights")
    (entry,) = full.entries()
    path = entry.path / name if name == SIDECAR else full.path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero")
    assert len(full.entries()) == (name != SIDECAR)
    assert [one.state for one in upkeep.check(full)] == ["damaged" if name == SIDECAR else "ok"]
    assert full.file_digest(tmp_path / "weights")
    if name == SIDECAR:
        assert not full.is_in_use(entry.path)
        with pytest.raises(CacheError, match="can't be read"):
            entry.hold()


def test_a_sidecar_without_end_is_damaged_and_not_read(full, monkeypatch):
    (entry,) = full.entries()
    with (entry.path / SIDECAR).open("ab") as file:
        file.truncate(2**40)
    (found,) = upkeep.check(full)
    assert (found.state, found.problem) == ("damaged", "it can't be read: it is larger than 16777216 bytes")


@pytest.mark.parametrize("name", ["", "model.onnx", SIDECAR])
def test_an_entry_that_an_access_list_lets_others_write_is_passed_over(full, name):
    (entry,) = full.entries()
    grant(entry.path / name, 5)
    assert full.entries() == [entry]
    grant(entry.path / name)
    assert full.entries() == []
    (found,) = upkeep.check(full)
    assert (found.state, found.problem.split(" can ")[1]) == (
        "unsafe",
        "be changed by those whom its access list names",
    )
    os.system(full.unsafe()[entry.name])
    assert full.entries() == [entry]


@pytest.mark.parametrize("where", ["", ".building", ".."])
def test_a_folder_that_an_access_list_lets_others_write_is_refused(full, where):
    grant(full.path / where)
    with pytest.raises(CacheError, match="those whom its access list names can change") as caught:
        upkeep.sweep(full)
    assert caught.value.hint.startswith("chmod ")
    assert upkeep.sweep(EngineDirectory(full.path, trust_others=True)) == 0


@pytest.mark.parametrize("where", ["", ".building"])
def test_a_folder_whose_default_access_list_gives_away_what_is_made_in_it_is_refused(full, where):
    grant(full.path / where, default=True, user=os.geteuid())
    grant(full.path / where, 5, default=True)
    assert upkeep.sweep(full) == 0
    grant(full.path / where, default=True)
    with pytest.raises(CacheError, match="those whom its default access list names can change what is made") as caught:
        upkeep.sweep(full)
    assert caught.value.hint.startswith(f"setfacl -R -k {full.path}, or")


def engines_behind(folder, *links):
    """An engine directory in `folder` that is reached by links, the last of which is taken."""
    target = folder / "engines"
    EngineDirectory(target).obtain("onnx", KEY, make)
    for link in links:
        link.symlink_to(target)
        target = link
    return EngineDirectory(target)


@only_root
@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_strangers_link_on_the_way_is_refused(tmp_path, mode):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    link = tmp_path / "open" / "link"
    directory = engines_behind(tmp_path, link, tmp_path / "own")
    assert len(directory.entries()) == 1
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(CacheError, match=f"its owner, user {STRANGER} can change {link}") as caught:
        directory.entries()
    assert caught.value.hint.startswith("name another --engine-dir")
    assert len(EngineDirectory(directory.path, trust_others=True).entries()) == 1


def test_a_link_in_a_folder_that_everybody_can_write_is_refused_wherever_it_leads(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    directory = engines_behind(tmp_path, tmp_path / "open" / "link", tmp_path / "own")
    with pytest.raises(CacheError, match=f"everybody can change {tmp_path / 'open'}") as caught:
        directory.entries()
    assert caught.value.hint.startswith(f"chmod go-w {tmp_path / 'open'}, or")
    (tmp_path / "open").chmod(0o1777)
    assert len(directory.entries()) == 1


def test_a_folder_left_again_on_the_way_counts_too(tmp_path):
    (tmp_path / "open" / "in").mkdir(parents=True)
    (tmp_path / "link").symlink_to("open/in/../..")
    directory = engines_behind(tmp_path)
    (tmp_path / "open").chmod(0o777)
    assert len(directory.entries()) == 1
    with pytest.raises(CacheError, match=f"everybody can change {tmp_path / 'open'}"):
        EngineDirectory(tmp_path / "link" / "engines").entries()


def test_links_in_a_circle_are_an_error_with_a_hint(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(CacheError, match="can't be read: Too many levels") as caught:
        EngineDirectory(tmp_path / "a" / "engines")
    assert "--engine-dir FOLDER" in caught.value.hint


@pytest.mark.parametrize("length", [4000, 4090, 5000])
def test_a_path_too_long_is_an_error_with_a_hint(tmp_path, length, monkeypatch):
    path = str(tmp_path)
    while len(path) < length - 200:
        path += "/" + "x" * 199
    path += "/" + "x" * (length - 1 - len(path))
    with pytest.raises(CacheError, match="File name too long") as caught:
        EngineDirectory(Path(path)).obtain("onnx", KEY, make)
    assert "--engine-dir FOLDER" in caught.value.hint


def without_files():
    """Leave this process no file to open; returns what undoes it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
@pytest.mark.parametrize("call", ["entries", "check", "prunable", "is_in_use", "obtain", "remove", "verified", "hold"])
def test_too_many_open_files_say_nothing_of_an_entry(full, call):
    (entry,) = full.entries()
    calls = CALLS | {
        "entries": lambda directory: directory.entries(),
        "check": lambda directory: list(upkeep.check(directory)),
        "prunable": lambda directory: upkeep.prunable(directory, PruneSpec(damaged=True), lambda entry: False),
        "is_in_use": lambda directory: directory.is_in_use(entry.path),
        "remove": lambda directory: directory.remove(entry),
        "verified": lambda directory: entry.verified("model.onnx"),
        "hold": lambda directory: entry.hold(),
    }
    undo = without_files()
    try:
        with pytest.raises(CacheError) as caught:
            calls[call](full)
    finally:
        undo()
    assert "ulimit -n" in caught.value.hint
    assert "engines rm" not in caught.value.hint
    assert full.entries() == [entry]
    assert list((full.path / ".building").iterdir()) == []


@pytest.mark.parametrize("words", ["another library's", "our own", "the linker's", "the system's"])
def test_too_many_open_files_are_two_lines_whatever_a_library_makes_of_it(run, monkeypatch, tmp_path, words):
    told = {
        "another library's": RuntimeError("Failed to import x (look up to see its\ntraceback)"),
        "our own": CacheError("a file is damaged", hint="sdtrt engines rm x"),
        "the linker's": ImportError("libx.so: cannot open shared object file: Too many open files"),
        "the system's": OSError(errno.EMFILE, "Too many open files", "x"),
    }

    def failing(directory):
        raise told[words] from OSError(errno.EMFILE, "Too many open files", "x")

    monkeypatch.setattr(EngineDirectory, "all_entries", failing)
    code, out, err = run("engines", "list", "--engine-dir", str(tmp_path / "engines"))
    assert (code, out) == (1, "")
    assert err.count("\n") == 2
    assert err.endswith("hint: allow more open files: ulimit -n 4096; or end other programs\n")
