"""Comparisons with other libraries: which rows are compared, and the rows that a stopped run keeps."""

from __future__ import annotations

import json

import pytest

from benchmarks.peers.kept import Rows, kept_seconds
from benchmarks.peers.tables import behind, best_within, table


def row(size, psnr, **more):
    pictures = {"agreement": 1.0, "psnr": psnr, "ssim": 0.9, "frechet": 1.0}
    figures = {"does": "linear", "speedup": 1.0, "call_peak": 2**20, "seconds": 3.0}
    return {"bytes": size, "pictures": {"1": pictures, "4": pictures}} | figures | more


ROWS = {
    "large peer": row(4 << 20, 55.0),
    "small peer": row(2 << 20, 50.0),
    "tiny peer": row(1 << 19, 9.0),
    "broken peer": {"error": "ValueError: no GPU"},
    "ours, 4 bits": row(2 << 20, 52.0),
    "ours, 8 bits": row(3 << 20, 54.0),
}


def test_a_peer_stands_beside_the_best_of_no_more_bytes():
    ours = [ROWS["ours, 4 bits"], ROWS["ours, 8 bits"]]
    assert best_within(ROWS["large peer"], ours) is ours[1]
    assert best_within(ROWS["small peer"], ours) is ours[0]
    assert best_within(ROWS["tiny peer"], ours) is None
    assert best_within(row(4 << 20, 1.0), [row(2 << 20, 60.0), row(3 << 20, 54.0)])["bytes"] == 2 << 20


def test_who_is_behind():
    """A peer wins where it is better, or smaller than all of our rows; a peer that fails does not."""
    assert behind(ROWS) == ["large peer", "tiny peer"]
    assert behind(ROWS | {"large peer": row(4 << 20, 53.0)}) == ["tiny peer"]


def test_activations_are_compared_with_activations():
    """Weights multiplied in 16 bits are not compared with weights multiplied as integers."""
    peer, ours = row(2 << 20, 50.0, does="linear, activations"), row(2 << 20, 48.0, does="linear, activations")
    rows = {"peer": peer, "ours, 4 bits": ours, "ours, 4 bits, weights only": row(2 << 20, 60.0)}
    assert best_within(peer, list(rows.values())[1:]) is ours and behind(rows) == ["peer"]
    assert behind(rows | {"peer": row(2 << 20, 50.0)}) == []


def test_table():
    lines = table(ROWS).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(ROWS)
    assert "| 4.00 |" in lines[2] and "| 3.00 | 54.0 |" in lines[2]
    assert "ValueError: no GPU" in lines[5] and lines[6].startswith("| **ours, 4 bits** |")


def test_finished_rows_are_not_measured_again(tmp_path):
    shown = []
    rows = Rows(tmp_path / "rows.json", lambda name, found: shown.append(name))
    assert rows("a", lambda: {"x": 1}) == {"x": 1}

    def fails():
        raise ValueError("no GPU\nhere")

    assert rows("b", fails) == {"error": "ValueError: no GPU"}
    again = Rows(tmp_path / "rows.json", lambda name, found: shown.append(name))
    assert again("a", lambda: pytest.fail("measured again")) == {"x": 1} and again("b", fails)["error"]
    assert shown == ["a", "b"] and json.loads((tmp_path / "rows.json").read_text()).keys() == {"a", "b"}


def test_the_seconds_of_a_stopped_run_are_kept(tmp_path):
    path = tmp_path / "seconds.json"
    assert kept_seconds(path, 9.0) == 9.0 and kept_seconds(path, 0.1) == 9.0 and kept_seconds(path, 12.0) == 12.0
