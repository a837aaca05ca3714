"""An analysis in parts on machines that share nothing: merged stores give what one process gives, one killed or not."""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest

from mixdq_ao import Sampling, SensitivityError, analyze
from mixdq_ao.search import analyze as analyze_module
from mixdq_ao.search.analysis import Analysis
from mixdq_ao.search.analyze import AnalyzeOptions, analyze_part
from mixdq_ao.search.part import Part
from mixdq_ao.search.store import Store

from .test_distributed import PROMPTS, Pipe, options


@pytest.mark.parametrize("method", [{}, {"method": "probe", "probes": 6}])
def test_merged_parts_are_the_whole(tmp_path, method):
    pipe = Pipe()
    settings: dict[str, Any] = {**options(pipe), **method}
    local = analyze(pipe, PROMPTS, store=tmp_path / "local", **settings)
    stores = [tmp_path / f"part{i}" for i in (1, 2, 3)]
    counts = [analyze_part(pipe, PROMPTS, Part(i, 3), store=s, **settings) for i, s in enumerate(stores, 1)]
    need = len((tmp_path / "local").read_bytes().splitlines()) - 1
    assert [n for _, n in counts] == [need] * 3 and sum(have for have, _ in counts) == need
    assert max(have for have, _ in counts) - min(have for have, _ in counts) <= 1

    class Idle(Pipe):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().__call__(*args, **kwargs)

    idle = Idle()
    found = analyze(idle, PROMPTS, store=tmp_path / "merged", merge=stores, **settings)
    assert found.to_json() == local.to_json()
    assert idle.calls <= 2, "only the reference run of two batches is left to do"
    lines = [sorted((tmp_path / n).read_bytes().splitlines()) for n in ("local", "merged")]
    assert lines[0] == lines[1]


def works(pipe: Pipe, store: Path, settings: dict[str, Any]) -> None:
    analyze_part(pipe, PROMPTS, Part(1, 2), store=store, **settings)


def test_a_killed_part_goes_on_where_it_was(tmp_path):
    """A process that dies in its part loses what it had in hand; nothing is done twice, and nothing is missing."""
    settings = options(Pipe())
    local = analyze(Pipe(), PROMPTS, **settings)
    store = tmp_path / "part1"
    given = Pipe(deadly=6), store, settings
    child = multiprocessing.get_context("spawn").Process(target=works, args=given)  # a fork would share torch's threads
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    done = store.read_bytes().splitlines()
    assert 1 < len(done) < 4
    assert analyze_part(Pipe(), PROMPTS, Part(1, 2), store=store, **settings) == (3, 6)
    assert store.read_bytes().splitlines()[: len(done)] == done
    found = analyze(Pipe(), PROMPTS, store=tmp_path / "whole", merge=[store], **settings)  # and works on the rest
    assert found.to_json() == local.to_json()


def test_parts_that_cannot_be(tmp_path):
    for text in ("0/2", "3/2", "x", "1/2/3", ""):
        with pytest.raises(SensitivityError, match="part is"):
            Part.parse(text)
    settings = {**options(Pipe()), "method": "probe"}
    with pytest.raises(SensitivityError, match="give probes"):
        analyze_part(Pipe(), PROMPTS, Part.parse("1/2"), store=tmp_path / "s", **settings)


def test_options_of_a_part_are_those_of_the_whole(tmp_path):
    """Names and defaults: ``analyze`` spells them out, ``analyze_part`` has them from the classes they end up in."""
    whole = {n: p.default for n, p in inspect.signature(analyze).parameters.items() if n not in ("pipe", "prompts")}
    assert AnalyzeOptions.__optional_keys__ == whole.keys() - {"store", "part"}
    own = inspect.signature(analyze_module._prepared).parameters
    classes = {f.name: f.default for kind in (Analysis, Sampling) for f in dataclasses.fields(kind)}
    for name, default in whole.items():
        assert default == (own[name].default if name in own else classes[name]), name
    with pytest.raises(TypeError, match="unexpected keyword argument 'step'"):
        analyze_part(Pipe(), PROMPTS, Part(1, 2), store=tmp_path / "s", **{"step": 1})  # type: ignore[arg-type]


def fill(path: Any, key: str, value: float, print: str = "print") -> None:
    with Store(path, print) as store:
        store.put("shared", {"error": 1.0})
        store.put(key, {"error": value})


def test_merging_stores(tmp_path):
    """A torn line of a store that is still written to is left to its writer; one's own results stay."""
    fill(tmp_path / "a", "a", 1.0)
    fill(tmp_path / "b", "b", 2.0)
    torn = (tmp_path / "b").read_bytes() + b'{"key": "c", "va'
    (tmp_path / "b").write_bytes(torn)
    with Store(tmp_path / "a", "print") as store, Store(tmp_path / "d", "print"):
        assert store.merge([tmp_path / "b", tmp_path / "d"]) == 1
        assert store.merge([tmp_path / "b"]) == 0
    assert (tmp_path / "b").read_bytes() == torn
    with Store(tmp_path / "a", "print") as store:
        assert store.results == {"shared": {"error": 1.0}, "a": {"error": 1.0}, "b": {"error": 2.0}}


def test_stores_that_do_not_belong_together(tmp_path):
    fill(tmp_path / "a", "x", 1.0)
    fill(tmp_path / "b", "x", 1.5)
    fill(tmp_path / "c", "y", 1.0, "other")
    before = (tmp_path / "a").read_bytes()
    with Store(tmp_path / "a", "print") as store:
        for name, message in (("b", "'x' is .*1.5.*other software"), ("c", "another model"), ("none", "is no file")):
            with pytest.raises(SensitivityError, match=message):
                store.merge([tmp_path / name])
    assert (tmp_path / "a").read_bytes() == before
