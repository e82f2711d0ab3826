"""Files: opened once, of bounded size, and nothing that is no file is waited for; folders of any depth."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sdtrt.common.files import make_folders, open_regular, read_small_file
from sdtrt.exports.to_file import _draft_folder
from sdtrt.pipeline.runs.saving import write_files


def test_a_small_file_is_read_up_to_the_limit_and_no_larger_one(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_small_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_small_file(path, 4)
    with pytest.raises(FileNotFoundError):
        read_small_file(tmp_path / "nothing", 4)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "zero", tmp_path):
        with pytest.raises(OSError, match="no regular file"):
            read_small_file(path, 1000)
    with pytest.raises(OSError, match="no regular file"):
        open_regular(tmp_path / "fifo", "rb+")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such flag")
def test_links_are_followed_only_where_they_may_be(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert read_small_file(tmp_path / "link", 9) == b"x"
    with pytest.raises(OSError, match="symbolic link"):
        read_small_file(tmp_path / "link", 9, follow=False)


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """A path of more folders than Python calls functions, relative to the working folder; it is gone at the end."""
    monkeypatch.chdir(tmp_path)
    yield Path("a/" * 1200)
    subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)  # Python itself can't


def test_folders_are_made_at_any_depth(deep):
    assert len(make_folders(deep)) == 1200
    assert make_folders(deep) == []
    (path,) = write_files(deep, {"x": b"x"}, overwrite=False)
    assert path.read_bytes() == b"x"
    with pytest.raises(FileExistsError):
        make_folders(path)


def test_results_go_into_folders_at_any_depth(deep):
    (path,) = write_files(deep, {"x": b"x"}, overwrite=False)
    assert path.read_bytes() == b"x"
    with _draft_folder(deep.parent / "b" / "unet.onnx") as draft:
        assert draft.is_dir()
