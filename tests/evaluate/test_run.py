"""Runs: stopped and continued, divided, in batches of any size, on the bundled pipeline and on a stand-in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import (
    FID,
    SSIM,
    Batch,
    CLIPScore,
    Figure,
    Gaussian,
    Interval,
    Metric,
    Prompts,
    Results,
    Run,
    Settings,
    Shard,
)
from mixdq_ao.evaluate.metric import MeanMetric, column
from mixdq_ao.evaluate.run import Reference
from mixdq_ao.evaluate.settings import claim
from mixdq_ao.evaluate.shard import numbers_of
from mixdq_ao.evaluate.table import differences, rows_of

COUNT = 11
PROMPTS = Prompts(tuple(f"prompt {'x' * i}" for i in range(COUNT)), None, "text")
SETTINGS = Settings(
    pipeline="a stand-in", prompts=PROMPTS.digest, count=COUNT, steps=1, guidance_scale=0.0, seed=5, dtype="float32"
)


class Brightness(MeanMetric):
    """Counts what it is asked."""

    name = "brightness"
    better = "higher"

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def measure(self, batch: Batch):
        self.seen += len(batch.images)
        return column(batch.images.double().mean((1, 2, 3)))


def means(images):
    """[B, 4] features."""
    return images.float().unflatten(2, (2, -1)).mean((3, 4))[:, :2].flatten(1)


def metrics(clip) -> list[Metric]:
    rng = np.random.default_rng(0)
    real = Gaussian.of(100 + 9 * rng.normal(size=(60, 4)))
    return [FID(means, real, identity="means"), CLIPScore(clip.model, clip.tokenizer, source="random"), Brightness()]


def run(directory, painter, found, settings=SETTINGS, **options) -> Run:
    return Run(directory, settings, PROMPTS, found, lambda: painter, **options)


@pytest.fixture
def whole(tmp_path, painter, clip):
    """The figures of one run in batches of 4."""
    job = run(tmp_path / "whole", painter, metrics(clip))
    assert job.work(batch_size=4) == COUNT
    return job.figures()


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].value == pytest.approx(b[name].value, rel=1e-5), name  # float32, by batches of other sizes
        assert (a[name].interval, a[name].count) == (pytest.approx(b[name].interval, rel=1e-5), b[name].count)


def test_figures_are_those_of_all_pictures_at_once(whole, tmp_path, clip):
    images = Reference(tmp_path / "whole").load(range(COUNT))
    direct = metrics(clip)
    for metric in direct:
        metric.update(Batch(images=images, prompts=PROMPTS.texts))
    same(whole, {m.name: m.compute() for m in direct})
    assert whole["fid"].interval is not None and whole["clip"].interval is not None


def test_a_second_run_draws_and_judges_nothing(whole, tmp_path, painter, clip):
    painter.drawn.clear()
    again = metrics(clip)
    job = Run(tmp_path / "whole", SETTINGS, PROMPTS, again, lambda: pytest.fail("the pipeline is loaded"))
    assert job.work() == 0 and again[-1].seen == 0 and not painter.drawn
    same(whole, job.figures())


def test_a_stopped_run_loses_its_batch_at_most(whole, tmp_path, painter, clip):
    painter.drawn.clear()
    painter.dies_after = 6
    job = run(tmp_path / "stopped", painter, metrics(clip))
    with pytest.raises(KeyboardInterrupt):
        job.work(batch_size=3)
    assert len(painter.drawn) == 6 and job.figures() is None and job.done() == 6
    painter.dies_after = None
    again = metrics(clip)
    job = run(tmp_path / "stopped", painter, again)
    assert job.work(batch_size=3) == COUNT - 6 and again[-1].seen == COUNT - 6
    assert sorted(painter.drawn) == sorted(PROMPTS.texts)
    same(whole, job.figures())


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_torn_files_are_mended(whole, tmp_path, painter, clip, cut):
    """As a power cut leaves them: half a record, a header without its end, a picture without its rows."""
    rows = tmp_path / "whole" / "rows"
    fid, brightness = (rows / f"{name}.1-of-1.bin" for name in ("fid", "brightness"))
    fid.write_bytes(fid.read_bytes()[:-cut])
    brightness.write_bytes(brightness.read_bytes()[:20])
    painter.drawn.clear()
    again = metrics(clip)
    job = run(tmp_path / "whole", painter, again)
    assert job.figures() is None
    job.work(batch_size=4)
    assert not painter.drawn and again[-1].seen == COUNT
    same(whole, job.figures())


def test_shards_put_together_equal_one_run(whole, tmp_path, painter, clip):
    """Each on a machine of its own, with batches of its own; then all files in one directory."""
    ranges = [numbers_of(Shard(k, 3), COUNT) for k in (1, 2, 3)]
    assert [n for r in ranges for n in r] == list(range(COUNT)) and all(a.stop == b.start for a, b in pairwise(ranges))
    painter.drawn.clear()
    for k, size in ((2, 1), (3, 8), (1, 2)):
        job = run(tmp_path / f"shard{k}", painter, metrics(clip))
        assert job.work(Shard(k, 3), size) == len(ranges[k - 1]) and job.figures() is None
        shutil.copytree(tmp_path / f"shard{k}", tmp_path / "merged", dirs_exist_ok=True)
    assert sorted(painter.drawn) == sorted(PROMPTS.texts)
    job = run(tmp_path / "merged", painter, metrics(clip))
    assert job.work() == 0
    same(whole, job.figures())
    for k, of in ((3, 2), (0, 2), (1, 0)):
        with pytest.raises(MixDQError, match=f"part is {k}/{of}"):
            job.work(Shard(k, of))


def test_a_metric_more_judges_the_pictures_that_are_there(whole, tmp_path, painter):
    painter.drawn.clear()
    other = run(tmp_path / "other", painter, [], settings=replace(SETTINGS, pipeline="another"))
    other.work()
    painter.drawn.clear()
    job = run(tmp_path / "whole", painter, [SSIM()], reference=tmp_path / "other")
    job.work()
    figures = job.figures()
    assert not painter.drawn and figures is not None and figures["ssim"].value == pytest.approx(1, abs=1e-12)
    with pytest.raises(MixDQError, match="has seen no picture"):  # its rows are on disk, and not in memory as well
        job.metrics["ssim"].compute()


def test_a_larger_reference_of_the_same_prompts_is_taken(tmp_path, painter):
    """Its prompts are told by their first, as long as those that follow are given; the rest of it does not matter."""

    def part(name: str, count: int, prompts=PROMPTS, reference=None) -> Run:
        settings, compared = replace(SETTINGS, prompts=PROMPTS.first(count).digest, count=count), [SSIM()]
        job = Run(
            tmp_path / name, settings, prompts, compared if reference else [], lambda: painter, reference=reference
        )
        job.work()
        return job

    larger, equal = part("larger", COUNT).directory, part("equal", 4).directory
    for reference in (larger, equal, larger):  # in one directory: what is judged stays
        figure = part("four", 4, reference=reference).figures()["ssim"]
        assert figure.value == pytest.approx(1, abs=1e-12) and figure.count == 4
    other = Prompts((*PROMPTS.texts[:4], "another", *PROMPTS.texts[5:]), None, "text")
    for prompts in (other, PROMPTS.first(4)):
        with pytest.raises(MixDQError, match=r"larger: prompts is .* give both the same prompts, of which fewer may"):
            part("new", 4, reference=larger, prompts=prompts)
    with pytest.raises(MixDQError, match="equal: holds 4 pictures, expected at least 11"):
        part("new", COUNT, reference=equal)
    with pytest.raises(MixDQError, match="4 prompts are given and count is 11, expected as many at least"):
        part("new", COUNT, prompts=PROMPTS.first(4))
    assert not (tmp_path / "new").exists()


def test_a_shard_may_begin_while_another_one_does(tmp_path):
    """The second finds what the first is still writing, or just has written."""
    (tmp_path / ".run.json.1234").write_text("{")
    claim(tmp_path, SETTINGS)
    claim(tmp_path, SETTINGS)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "picture.png").touch()
    with pytest.raises(MixDQError, match="is not empty"):
        claim(tmp_path / "strange", SETTINGS)


def test_what_does_not_belong_together_is_refused(whole, tmp_path, painter, clip):
    with pytest.raises(MixDQError, match=r"run\.json: seed is 5 there and 6 here"):
        run(tmp_path / "whole", painter, [], settings=replace(SETTINGS, seed=6))
    with pytest.raises(MixDQError, match="ssim compares with full precision"):
        run(tmp_path / "new", painter, [SSIM()])
    run(tmp_path / "steps", painter, [], settings=replace(SETTINGS, steps=2))
    with pytest.raises(MixDQError, match="steps is 2 in the reference and 1 here"):
        run(tmp_path / "new", painter, [SSIM()], reference=tmp_path / "steps")
    with pytest.raises(MixDQError, match="expected each once"):
        run(tmp_path / "new", painter, [Brightness(), Brightness()])
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(MixDQError, match="is not empty and holds no run.json"):
        run(tmp_path / "full", painter, [])
    empty = run(tmp_path / "empty", painter, [])
    with pytest.raises(MixDQError, match="has no picture 0; finish that run first"):
        run(tmp_path / "new", painter, [SSIM()], reference=empty.directory).work()
    other = FID(means, Gaussian.of(np.random.default_rng(0).normal(size=(9, 4))), identity="other features")
    with pytest.raises(MixDQError, match=r"fid\.1-of-1\.bin: holds rows of .*means.*, expected .*other features"):
        run(tmp_path / "whole", painter, [other]).work()


def test_damage_in_the_middle_is_named(whole, tmp_path, painter, clip):
    path = tmp_path / "whole" / "rows" / "brightness.1-of-1.bin"
    data = bytearray(path.read_bytes())
    data[data.index(b"\n") + 30] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(MixDQError, match=r"brightness\.1-of-1\.bin: record 1 of 11 is damaged"):
        run(tmp_path / "whole", painter, [Brightness()]).figures()
    picture = tmp_path / "whole" / "pictures" / "000" / "000003.png"
    picture.write_bytes(picture.read_bytes()[:50])
    path.unlink()
    with pytest.raises(MixDQError, match=r"000003\.png: cannot be read"):
        run(tmp_path / "whole", painter, [Brightness()]).work()


def test_pictures_that_are_not_finite_are_refused(tmp_path):
    def broken(prompt, **options):
        return SimpleNamespace(images=torch.full((len(prompt), 3, 8, 8), torch.nan))

    with pytest.raises(MixDQError, match="picture 0 of the batch is not finite"):
        Run(tmp_path / "x", SETTINGS, PROMPTS, [], lambda: broken).work()


def test_results_are_read_back_and_compared(whole, tmp_path, painter, clip):
    """A second run whose brightness differs by a little that every picture shares: only the paired interval sees it."""
    brighter = {**whole, "brightness": replace_figure(whole["brightness"], 0.5)}
    found = {}
    for name, figures in (("first", whole), ("second", brighter)):
        made = {m.name: m for m in metrics(clip)}
        Results.of(figures, made, SETTINGS, command="test").save(tmp_path / name)
        found[name] = Results.load(tmp_path / name)
    assert found["first"].figures["fid"].value == whole["fid"].value
    assert found["first"].figures["clip"].linear == pytest.approx(whole["clip"].linear)
    gaps = differences(found["first"], found["second"])
    low, high = found["first"].figures["brightness"].interval
    assert high - low > 1 and gaps["brightness"].sure and gaps["brightness"].value == pytest.approx(0.5)
    assert gaps["brightness"].interval == pytest.approx((0.5, 0.5)) and not gaps["clip"].sure
    header, rows = rows_of(found)
    assert header[:3] == ["run", "pictures", "fid ↓"] and header[-1] == "brightness - first"
    assert rows[1][-1] == "+0.5 [+0.5, +0.5] *" and rows[0][-1] == ""
    document = json.loads((tmp_path / "first" / "results.json").read_text())
    assert document["command"] == "test" and document["metrics"]["fid"]["pictures"] == COUNT
    document["identities"]["fid"] = {"features": "others"}
    (tmp_path / "second" / "results.json").write_text(json.dumps(document))
    with pytest.raises(MixDQError, match="measure both in the same way"):
        differences(found["first"], Results.load(tmp_path / "second"))


def test_figures_against_others_are_not_compared(whole, tmp_path, painter):
    """FID to other real pictures, SSIM to another run; a kind that only one of them names is not compared."""
    others = {"first": [0, 0], "again": [0, 0], "real": [1, 0], "reference": [0, 1]}
    for k in (0, 1):
        run(tmp_path / f"reference{k}", painter, [], settings=replace(SETTINGS, pipeline=f"{k}")).work()
    found = {}
    for name, (real, reference) in others.items():
        given = Gaussian.of(100 + 9 * np.random.default_rng(real).normal(size=(60, 4)))
        made: list[Metric] = [FID(means, given, identity="means"), SSIM()]
        job = run(tmp_path / name, painter, made, reference=tmp_path / f"reference{reference}")
        job.work()
        Results.of(job.figures(), job.metrics, SETTINGS).save(tmp_path / name)
        found[name] = Results.load(tmp_path / name)
    assert set(differences(found["first"], found["again"])) == {"fid", "ssim"}
    for name, words in (("real", "fid is against real pictures "), ("reference", "ssim is against reference ")):
        with pytest.raises(MixDQError, match=f"{words}.* in another, expected the same; measure both against one"):
            differences(found["first"], found[name])
        path = tmp_path / name / "results.json"
        document = json.loads(path.read_text())
        for figure in document["metrics"].values():
            assert figure["against"]
            figure["against"] = {}
        path.write_text(json.dumps(document))
        assert len(rows_of({"first": found["first"], name: Results.load(path.parent)})[1]) == 2


def test_figures_saved_later_keep_what_each_is_against(whole, tmp_path):
    fid, clip = (replace(whole[name], against={"real pictures": "a"}) for name in ("fid", "clip"))
    saved(tmp_path, {"fid": fid, "clip": clip}, identities={"fid": {"features": "x"}, "clip": {"network": "y"}})
    saved(tmp_path, {"fid": replace(fid, against={"real pictures": "b"})})
    found = Results.load(tmp_path)
    assert [found.figures[name].against for name in ("fid", "clip")] == [{"real pictures": text} for text in "ba"]
    assert found.metadata["identities"] == {"clip": {"network": "y"}}  # not that of the figure that was replaced


def saved(directory, figures, **more) -> Results:
    results = Results(figures, dict.fromkeys(figures, ("higher", "")), SETTINGS, more)
    results.save(directory)
    return results


def test_a_crash_while_results_are_saved_is_noticed(tmp_path, whole, monkeypatch):
    """What each picture adds is never read beside the figures of another save; saving again mends it."""
    old, new = ({"brightness": replace_figure(whole["brightness"], shift)} for shift in (0.0, 1.0))
    new["brightness"] = replace(new["brightness"], linear=whole["brightness"].linear[::-1])
    saved(tmp_path, {**old, "clip": whole["clip"]})
    path = tmp_path / "linear" / "brightness.npy"
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            saved(tmp_path, new)
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr("mixdq_ao.evaluate.results.write_document", lambda *args: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            saved(tmp_path, new)
    with pytest.raises(MixDQError, match=r"brightness\.npy: is not what results\.json was written with; measure"):
        Results.load(tmp_path)
    saved(tmp_path, new)
    found = Results.load(tmp_path)
    assert found.figures["brightness"].value == new["brightness"].value
    assert (found.figures["brightness"].linear == new["brightness"].linear).all() and found.figures["clip"].count
    path.write_bytes(before[:90])
    with pytest.raises(MixDQError, match=r"brightness\.npy: cannot be read"):
        Results.load(tmp_path)
    saved(tmp_path, {"brightness": replace(new["brightness"], interval=None, linear=None)})
    assert Results.load(tmp_path).figures["brightness"].linear is None and not path.exists()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("value", "high", "'clip': value is 'high', expected a finite number"),
        pytest.param("value", 10**400, "'clip': value is 1000", id="beyond float64"),
        ("interval", 5, "'clip': interval is 5, expected two finite numbers"),
        ("interval", [1.0], r"'clip': interval is \[1.0\]"),
        ("interval", [2.0, 1.0], r"'clip': interval is \[2.0, 1.0\]"),
        ("interval", [1.0, None], "'clip': interval is"),
        ("pictures", "two", "'clip': pictures is 'two', expected a whole number of at least 1"),
        ("pictures", 0, "'clip': pictures is 0"),
        ("pictures", True, "'clip': pictures is True"),
        ("better", 7, "'clip': better is 7, expected 'higher' or 'lower'"),
        ("unit", None, "'clip': unit is None, expected a text"),
        ("against", {"real": 1}, "'clip': against is {'real': 1}, expected an object of texts"),
        ("extra", 1, "'clip': expected an object with"),
        (None, {"identities": []}, r"identities is \[\], expected an object"),
        (None, {"linear": "x"}, "linear is 'x', expected an object"),
    ],
)
def test_broken_results_are_named(tmp_path, whole, field, value, words):
    saved(tmp_path, {"clip": whole["clip"]})
    document = json.loads((tmp_path / "results.json").read_text())
    document.update(value) if field is None else document["metrics"]["clip"].update({field: value})
    (tmp_path / "results.json").write_text(json.dumps(document))
    with pytest.raises(MixDQError, match=f"results.json: {words}"):
        Results.load(tmp_path)


def replace_figure(figure, shift):
    low, high = figure.interval
    return Figure(figure.value + shift, Interval(low + shift, high + shift), figure.count, figure.linear)


def test_batches_of_any_size_draw_the_same_pictures(tmp_path, bundled):
    """Of the real pipeline: products of other sizes may round another way, by one level of 256 at most."""
    prompts = Prompts(tuple(bundled.prompts[:5]), None, "text")
    settings = replace(SETTINGS, prompts=prompts.digest, count=5, steps=2)
    drawn = []
    for name, size, shard in (("five", 5, 1), ("two", 2, 1), ("one", 1, 2)):
        job = Run(tmp_path / name, settings, prompts, [], lambda: bundled.pipe)
        for k in range(shard):
            job.work(Shard(k + 1, shard), size)
        drawn.append(Reference(tmp_path / name).load(range(5)).int())
    for other in drawn[1:]:
        assert (drawn[0] - other).abs().max() <= 1 and (drawn[0] != other).float().mean() < 1e-3
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 100  # other prompt, other picture
