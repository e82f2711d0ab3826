"""Files: opened once, of bounded size, and nothing that is no file is waited for; folders of any depth."""

from __future__ import annotations

import os

import pytest

from sdtrt.files import open_regular, read_small_file


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
