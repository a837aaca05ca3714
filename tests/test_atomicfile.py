"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import stat

import pytest

from mixdq_ao.atomicfile import obstacle, replacing


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_not_written_whole_is_not_there(tmp_path, error):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["plan.json"]


def test_it_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (done.append(name), real(*a)))
    with replacing(tmp_path / "plan.json") as file:
        file.write(b"new")
    assert done == ["fsync", "replace", "fsync"]  # the content, the name, the folder


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_it_is_up_to_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replacing(tmp_path / "plan.json") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_and_the_file_it_leads_to_is_replaced(tmp_path):
    folder, link = tmp_path / "real", tmp_path / "plan.json"
    folder.mkdir()
    link.symlink_to(folder / "plan.json")
    for content in (b"first", b"second"):  # where the link leads to nothing yet, and to a file
        with replacing(link) as file:
            file.write(content)
        assert link.is_symlink() and (folder / "plan.json").read_bytes() == content
    assert os.listdir(folder) == ["plan.json"]


def test_an_old_files_mode_stays(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with replacing(path) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        file.write(b"new")
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_file_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "folder").mkdir()
    for name, words in (("fifo", "is a pipe, device or socket"), ("link", "pipe, device"), ("folder", "is a folder")):
        before = (tmp_path / name).lstat()
        with pytest.raises(OSError, match=words), replacing(tmp_path / name):
            pytest.fail("the block ran")
        assert (tmp_path / name).lstat() == before
        if name != "folder":
            assert "pipe, device" in (obstacle(tmp_path / name, is_file=True) or "")
            assert "pipe, device" in (obstacle(tmp_path / name, is_file=None) or "")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder", "link"]


def test_obstacles_to_a_file_are_those_of_its_folder(tmp_path, monkeypatch):
    path, other = tmp_path / "plan.json", tmp_path / "other"
    path.write_bytes(b"old")
    other.mkdir()
    link = other / "link.json"
    link.symlink_to(path)
    assert obstacle(path, is_file=True) is None and obstacle(link, is_file=True) is None
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    for place in (path, link):
        assert obstacle(place, is_file=True) == f"{tmp_path} is not writable"
