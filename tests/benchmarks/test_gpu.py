"""The GPU script without a GPU: its steps, and the files it writes."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu import results, unet
from benchmarks.gpu import tiles as timed
from benchmarks.gpu.__main__ import main
from inductor_kernels import tiles, tuned
from inductor_kernels.roofline import Product

SMALL, LARGE = Product(77, 1280, 2048), Product(4096, 320, 2880, taps=9)


def test_what_was_timed_replaces_what_was_modelled(tmp_path, monkeypatch):
    path, (first, *_, last) = tmp_path / "tuned.json", map(tuned.Way, tiles.TILES[90])
    path.write_text(tuned.document({90: ("modelled, not measured", {tuned.key(p): first for p in (SMALL, LARGE)})}))
    monkeypatch.setattr(tuned, "PATH", path)
    timed._write(path, 90, "NVIDIA H200", {tuned.key(SMALL): last})
    assert tuned.read(path.read_text())[90] == {tuned.key(SMALL): last, tuned.key(LARGE): first}
    said = json.loads(path.read_text())["sm_90"]["source"]
    assert said == "NVIDIA H200; other shapes modelled, not measured"
    for _ in range(2):  # a second sweep does not lengthen what is said
        timed._write(path, 90, "NVIDIA H200", {tuned.key(LARGE): last})
    assert json.loads(path.read_text())["sm_90"]["source"] == said
    timed._write(path, 90, "NVIDIA H200", {tuned.key(p): last for p in (SMALL, LARGE)})
    assert json.loads(path.read_text())["sm_90"]["source"] == "NVIDIA H200"


def test_tiles_worth_timing_are_those_the_model_ranks_first():
    found = timed.ranked(90, SMALL)
    assert len(set(found)) == len(found) and sum(way.shares == 1 for way in found) == timed.TRIED
    assert sum(way.shares > 1 for way in found) == timed.SHARED
    assert tuned.Way(tuned.modelled(90, SMALL)) in found and tuned.modelled_way(90, SMALL) in found
    expected = [tuned.expected(90, SMALL, way) for way in found]
    assert expected == sorted(expected)


def test_the_page_has_a_table_for_every_step_and_leaves_other_files_alone(tmp_path):
    """Partial results: a step that stopped after its first row, one that measured nothing, the tiles of a dry run."""

    def cut_off():
        yield {"variant": "W8A8", "ms": 1.23456}
        raise TimeoutError

    with pytest.raises(TimeoutError):
        results.write(tmp_path, "unet-512-1", cut_off(), dry=True)
    results.write(tmp_path, "kernels", [{"what": "gemm"}, {"what": "conv", "error": "none"}], dry=False)
    (tmp_path / "tuned.json").write_text(
        tuned.document({90: ("modelled", {tuned.key(SMALL): tuned.Way(tiles.TILES[90][0])})})
    )
    page = results.report(tmp_path)
    assert page == (tmp_path / "results.md").read_text() and "tuned" not in page
    assert "| W8A8 | 1.235 |" in page and "| gemm |  |" in page and page.count("Dry run") == 1


def test_variants_are_compared_with_those_of_the_same_run(tmp_path):
    rows = [{"variant": "fp16 compiled", "ms": 3.0}, {"variant": "W8A8 compiled", "ms": 2.0}]
    results.write(tmp_path, "unet-512-1", [*rows, {"variant": "torchao-int8 compiled", "error": "none"}], dry=False)
    page = results.report(tmp_path)
    assert "| variant | ms | times fp16 compiled | error |" in page
    assert "| W8A8 compiled | 2 | 1.5 |  |" in page and "| torchao-int8 compiled |  |  | none |" in page


def test_a_machine_without_git_is_measured_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.machine()["commit"] == "unknown"


def test_what_torchao_sets_for_its_variants_is_not_set_for_the_next(monkeypatch):
    from torch._inductor import config

    def failing(_):
        config.coordinate_descent_tuning = True
        raise RuntimeError("none")

    monkeypatch.setitem(unet.VARIANTS, "torchao-int8", failing)
    with config.patch(coordinate_descent_tuning=False):  # another test's torchao config may have set it
        rows = list(unet.compare(512, 1, dry=True, only=("torchao-int8",)))
        assert rows[-1] == {"variant": "torchao-int8 compiled", "error": "RuntimeError: none"}
        assert not config.coordinate_descent_tuning


@pytest.mark.parametrize("step", ["unet-512", "tiles-512-1", "tiles-512:W8A8", "unet", "kernel"])
def test_steps_that_are_none_are_named(step, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu", step, "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert f"step {step!r}: expected kernels, tiles-<pixels>[:first shape]" in capsys.readouterr().err


def test_variants_that_are_none_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu", "unet-512-1:W8A8,W3A8", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "variants W3A8: expected some of fp16, torchao-int8, torchao-float8, W8A8" in capsys.readouterr().err
