"""The store: continues after a cut, refuses what is not its own, survives a full disk."""

from __future__ import annotations

import os

import pytest

from mixdq_ao import SensitivityError
from mixdq_ao.search.store import Store


def fill(path, n=3):
    with Store(path, "print") as store:
        for i in range(n):
            store.put(f"k{i}", {"error": float(i)})


def test_results_come_back(tmp_path):
    fill(tmp_path / "s")
    with Store(tmp_path / "s", "print") as store:
        assert store.results == {f"k{i}": {"error": float(i)} for i in range(3)}
        assert store.get("k9") is None


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path):
    path = tmp_path / "s"
    fill(path)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Store(path, "print") as store:
            n = len(store.results)
            store.put("new", {"error": 1.0})
        with Store(path, "print") as store:
            assert len(store.results) == n + 1


def test_another_fingerprint(tmp_path):
    fill(tmp_path / "s")
    with pytest.raises(SensitivityError, match="another model"), Store(tmp_path / "s", "other"):
        pass


NO_STORES = ["hello\n", '{"format": "x"}\n', "[]\n", "a note without an end", "a note\nwithout an end", '{"form at']


@pytest.mark.parametrize("text", NO_STORES)
def test_a_file_that_is_no_store_is_left_alone(tmp_path, text):
    (tmp_path / "s").write_text(text)
    with pytest.raises(SensitivityError), Store(tmp_path / "s", "print"):
        pass
    with pytest.raises(SensitivityError), Store(None, "print") as store:
        store.merge([tmp_path / "s"])
    assert (tmp_path / "s").read_text() == text


def test_values_must_be_finite_numbers(tmp_path):
    fill(tmp_path / "s", 0)
    header = (tmp_path / "s").read_text()
    for value in ('"x"', "true", "NaN", "1e999", "1" * 400, "[" * 100_000, None):
        figures = "{}" if value is None else f'{{"error": {value}}}'
        (tmp_path / "s").write_text(f'{header}{{"key": "k", "value": {figures}}}\n')
        with pytest.raises(SensitivityError, match="line 2"), Store(tmp_path / "s", "print"):
            pass


def figures(tmp_path, name: str, **values: float):
    with Store(tmp_path / name, "print") as store:
        store.put("k", values)
    return tmp_path / name


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"error": 3.1e-14, "ssim": 1.0}, {"error": 4.4e-14, "ssim": 1.0}),
        ({"error": 0.0}, {"error": 9e-13}),
        ({"x|act|8|output": 3e-9, "power": 1e5}, {"x|act|8|output": 4e-9, "power": 1e5}),
    ],
)
def test_results_at_the_noise_of_the_arithmetic_are_the_same(tmp_path, ours, theirs):
    with Store(figures(tmp_path, "a", **ours), "print") as store:
        assert store.merge([figures(tmp_path, "b", **theirs)]) == 0 and store.results == {"k": ours}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"error": 1e-12}, {"error": 4e-12}),
        ({"x|act|8|output": 1e-9, "power": 10.0}, {"x|act|8|output": 2e-9, "power": 10.0}),
    ],
)
def test_results_above_it_are_not(tmp_path, ours, theirs):
    with Store(figures(tmp_path, "a", **ours), "print") as store, pytest.raises(SensitivityError, match="faulty"):
        store.merge([figures(tmp_path, "b", **theirs)])


def test_one_writer_at_a_time(tmp_path):
    with (
        Store(tmp_path / "s", "print"),
        pytest.raises(SensitivityError, match="another process"),
        Store(tmp_path / "s", "print"),
    ):
        pass


def test_a_full_disk_keeps_what_was_stored(tmp_path, monkeypatch):
    with Store(tmp_path / "s", "print") as store:
        store.put("k0", {"error": 0.0})

        def full(handle: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(SensitivityError, match="No space left on device; 1 results are safe"):
                store.put("k1", {"error": 1.0})
        store.put("k2", {"error": 2.0})
    with Store(tmp_path / "s", "print") as store:
        assert set(store.results) == {"k0", "k2"}


@pytest.mark.parametrize("path", ["/dev/zero", "."])
def test_a_path_that_is_no_file(path):
    """/dev/zero never ends: reading it for results would fill the memory."""
    with pytest.raises(SensitivityError, match="regular file"), Store(path, "print"):
        pass
