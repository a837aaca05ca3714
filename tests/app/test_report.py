"""The report: every section, nothing hostile let through, missing files dropped, broken ones named."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mixdq_ao.app.report import build
from mixdq_ao.app.report.environment import flatten
from mixdq_ao.app.report.grid import _psnr
from mixdq_ao.app.report.inputs import Figures, Point
from mixdq_ao.app.report.layers import u_shape
from mixdq_ao.app.report.names import block_of, ordinal, size
from mixdq_ao.app.report.pareto import dominated
from mixdq_ao.app.report.reasons import Reasons
from mixdq_ao.app.report.table import COLUMNS, best_names
from mixdq_ao.app.report.verdict import verdicts
from mixdq_ao.errors import MixDQError
from mixdq_ao.plan import LayerPlan
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity

from .synthetic import HOSTILE, grid, write

NAMES = ["conv_in", "down_blocks.0.attentions.0.attn2.to_k", "mid_block.ff.net.2", "up_blocks.0.conv", "conv_out"]
VOID = {"meta", "img", "input", "br", "wbr", "link", "hr"}


class Balanced(HTMLParser):
    """Raises AssertionError on an element that is not closed where it should be; collects ids and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        assert not any(name.startswith("on") for name in found), found
        self.ids += [i] if (i := found.get("id")) else []
        self.addresses += [a for name in ("href", "src") if (a := found.get(name))]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def _folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("results"), NAMES)


@pytest.fixture
def folder(_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_folder, tmp_path / "results"))


def page_of(folder: Path) -> str:
    return build(folder).read_text(encoding="utf-8")


def change(folder: Path, name: str, edit) -> None:
    document = json.loads((folder / name).read_text())
    edit(document)
    (folder / name).write_text(json.dumps(document))


def test_every_section_in_one_file_without_a_network(folder):
    page = Balanced(page_of(folder))
    assert {"results", "pictures", "ablation", "pareto", "prediction", "layers", "environment"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in page.addresses)
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert not {"link", "iframe", "object"} & set(page.tags)
    text = (folder / "report.html").read_text()
    assert not re.search(r"url\(|@import|https?://", text)


def test_what_a_reader_looks_for(folder):
    text = page_of(folder).replace("\u00a0", " ")
    assert "breaks the pipeline: 3.1 %" in text
    assert "12.6 dB closer to the originals than with uniform 4 bit" in text
    assert all(caption in text for caption in ("a large red circle", "MixDQ W4A8", "Imaginary CPU 9000"))
    assert text.count("<polyline") == 3
    assert "Measured over predicted, 24 plans: 1.1 in the middle, from 1.1 to 1.1." in text
    assert "most sensitive of" in text


def test_plans_that_were_measured(folder):
    """Plans of ``mixdq allocate --check`` alone, without a front."""
    (folder / "pareto.json").unlink()
    assert 'id="prediction"' not in page_of(folder)
    agreement = {"plans": 12, "rank": 0.987, "log_correlation": 0.99, "ratio": 1.1, "spread": 0.2}
    measured = {"predicted_error": 2e-4, "measured_error": 3e-4, "prediction_agreement": agreement}
    change(folder, "plan_w4a8.json", lambda d: d["metadata"].update(measured))
    text = page_of(folder)
    assert "Measured over predicted, one plan: 1.5." in text
    said = "12 random plans, measured too: rank correlation {} with their predictions; measured over predicted 1.1 in "
    assert said.format("0.987") + "the middle, spread 20 %." in text
    for rank, shown in ((0, "0.000"), (-0.25, "-0.250")):
        change(folder, "plan_w4a8.json", lambda d, r=rank: d["metadata"]["prediction_agreement"].update(rank=r))
        assert said.format(shown) in page_of(folder)
    few = {"ratio": None, "spread": None}
    change(folder, "plan_w4a8.json", lambda d: d["metadata"]["prediction_agreement"].update(few))
    assert "rank correlation -0.250 with their predictions." in page_of(folder)
    change(folder, "plan_w4a8.json", lambda d: d["metadata"].update(measured_error="much", prediction_agreement=[1]))
    assert 'id="prediction"' not in page_of(folder)


@pytest.mark.parametrize(
    ("files", "gone"),
    [
        (["results.json"], {"results", "ablation"}),
        (["grid.json"], {"pictures"}),
        (["grid.png"], {"pictures"}),
        (["pareto.json"], {"pareto", "prediction"}),
        (["sensitivity.json"], set()),
        (["plan_w8a8.json", "plan_w4a8.json", "plan_w3a8.json"], set()),
        (["sensitivity.json", "plan_w8a8.json", "plan_w4a8.json", "plan_w3a8.json"], {"layers"}),
    ],
)
def test_a_missing_file_drops_its_section(folder, files, gone):
    for name in files:
        (folder / name).unlink()
    ids = set(Balanced(page_of(folder)).ids)
    sections = {"results", "pictures", "ablation", "pareto", "prediction", "layers", "environment"}
    assert sections - ids == gone


def test_hostile_names_are_text(tmp_path):
    names = [
        HOSTILE,
        'a" onmouseover="alert(1)',
        "b$css${js}",
        "c</script><style>",
        "up_blocks.0.<img src=x onerror=y>",
    ]
    folder = write(tmp_path / "r", names)
    change(folder, "pareto.json", lambda d: d["points"][0].update(objective=HOSTILE))

    def poison(document):
        document["variants"][HOSTILE] = document["variants"]["fp32"]
        document["ablation"]['x"><img src=x>'] = document["variants"]["fp32"]
        document["environment"][HOSTILE] = {'"><script>': [HOSTILE, None, 1.5]}

    change(folder, "results.json", poison)
    grid(folder, ["fp32", HOSTILE], [HOSTILE, '"><script>'])
    page = Balanced(page_of(folder))
    assert page.tags.count("script") == 1 and page.tags.count("style") == 1
    assert page.tags.count("img") == 4


def _set(key, value):
    return lambda d: d.__setitem__(key, value)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("results.json", _set("variants", [1]), "variants is list"),
        ("results.json", _set("variants", {"a": 3}), "'a': is int"),
        ("results.json", _set("variants", {"a": {"psnr": "high"}}), "psnr is 'high'"),
        ("results.json", _set("variants", {"a": {"psnr": 10**400}}), "psnr is"),
        ("results.json", _set("variants", {"a": {"agreement": 98.8}}), "expected a fraction"),
        ("results.json", _set("environment", "here"), "environment is str"),
        ("pareto.json", _set("points", {}), "points is dict"),
        ("pareto.json", _set("points", [{"objective": 3}]), "point 0"),
        ("pareto.json", _set("points", [{"objective": "x", "weight_bits": 4, "weight_bytes": 0}]), "weight_bytes is 0"),
        ("grid.json", _set("rows", []), "rows is []"),
        ("grid.json", _set("cell", [900, 900]), "expected 8 columns and 3 rows"),
        ("grid.json", _set("gap", -1), "gap is -1"),
        ("sensitivity.json", _set("layers", {}), "layers is empty"),
        ("plan_w4a8.json", _set("layers", {"x": {"weight_bits": 5}}), "weight_bits is 5"),
    ],
)
def test_a_broken_file_is_one_clear_error(folder, name, edit, words):
    change(folder, name, edit)
    with pytest.raises(MixDQError, match=re.escape(words)) as caught:
        build(folder)
    assert Path(name).stem in str(caught.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["results.json", "pareto.json", "grid.json", "sensitivity.json", "plan_w8a8.json", "grid.png"]
)
@pytest.mark.parametrize(
    "content", [b"", b'{"variants": {', b'{"x": 1, "x": 2}', b"\xff\xfe\x00", b"[NaN]", b"[" * 100_000]
)
def test_broken_bytes_are_one_clear_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(MixDQError, match=re.escape(name)):
        build(folder)


def test_nothing_to_report(tmp_path):
    with pytest.raises(MixDQError, match="nothing to report"):
        build(tmp_path)
    with pytest.raises(MixDQError, match="is no folder"):
        build(tmp_path / "none")


def test_figures_may_all_be_null(folder):
    def empty(document):
        for table in ("variants", "variants_1_step", "ablation"):
            document[table] = {name: dict.fromkeys(v) for name, v in document[table].items()}

    change(folder, "results.json", empty)
    change(folder, "pareto.json", lambda d: [p.update(psnr=None) for p in d["points"]])
    text = page_of(folder)
    assert "predicted SQNR" in text and "breaks" not in text


def test_a_grid_of_unknown_geometry_is_shown_whole(folder):
    change(folder, "grid.json", lambda d: d.pop("cell"))
    page = Balanced(page_of(folder))
    assert page.tags.count("img") == 1


def test_the_best_ignores_the_reference_and_what_failed():
    column = next(c for c in COLUMNS if c.key == "latency_ms")
    variants = {
        "fp32": Figures(agreement=1.0, latency_ms=1.0),
        "broken": Figures(agreement=0.1, latency_ms=2.0),
        "a": Figures(agreement=0.9, latency_ms=3.04),
        "b": Figures(agreement=0.9, latency_ms=3.01),
        "c": Figures(agreement=0.9, latency_ms=9.0),
    }
    assert best_names(variants, column) == {"a", "b"}
    assert best_names({n: variants[n] for n in ("fp32", "a", "b")}, column) == set()


def test_verdicts_follow_the_figures():
    full = Figures(agreement=0.99, weight_bytes=100.0)
    good = verdicts({"fp32": full, "naive_w8a8": Figures(agreement=0.98)})
    assert [v.tone for v in good] == ["plain"] and "breaks" not in good[0].text
    worse = verdicts({"fp32": full, "mixdq_w4a8": Figures(agreement=0.9, psnr=30.0), "bos_w4a8": Figures(psnr=34.0)})
    text = worse[0].text.replace("\u00a0", " ")
    assert worse[0].tone == "plain" and "9.0 points below" in text and "4.0 dB further from" in text
    slow = verdicts({"fp32": full, "mixdq_w8a8": Figures(agreement=0.99, weight_bytes=25.0, speedup=0.8)})
    assert "25 % of their fp32 bytes" in slow[0].text and "slower" in slow[0].text
    assert verdicts({}) == []


def test_domination():
    point = Point(objective="x", weight_bits=4, weight_bytes=1)
    placed = [(point, 1.0, 10.0), (point, 2.0, 9.0), (point, 2.0, 12.0), (point, 1.0, 10.0)]
    assert dominated(placed) == [False, True, False, False]


def test_reasons_say_what_a_step_would_change():
    def layer(low: float) -> LayerSensitivity:
        scores = {2: low, 4: 30.0, 8: 50.0}
        return LayerSensitivity(group="quality", weight_size=2048, act_size=1, weight_scores=scores)

    reasons = Reasons(Sensitivity({"a": layer(20.0), "b": layer(10.0)}))
    text = reasons.weight("a", LayerPlan(weight_bits=4)).replace("\u00a0", " ")
    assert text == (
        "2nd most sensitive of 2 quality layers at 2 bit; 2 bit would save 512 B and lose 10.0 dB; "
        "8 bit would add 1.00 KiB and gain 20.0 dB"
    )
    assert reasons.weight("a", LayerPlan()) == "kept in full precision"
    assert reasons.weight("other", LayerPlan(weight_bits=4)) == "not measured at these bits"


def test_words():
    assert [ordinal(n) for n in (1, 2, 3, 4, 11, 12, 21, 112)] == "1st 2nd 3rd 4th 11th 12th 21st 112th".split()
    assert [size(n) for n in (12, 2048, 50 * 2**20)] == ["12\u00a0B", "2.00\u00a0KiB", "50.0\u00a0MiB"]
    assert [block_of(n) for n in ("conv_in", "down_blocks.2.x", "mid_block.y", "other.z")] == [
        "input",
        "down_blocks.2",
        "mid_block",
        "other",
    ]
    nested = {"a": {"b": {"c": {"d": {"e": 1}}}}, "x_y": [1, True, None]}
    assert dict(flatten(nested)) == {"a b c d": "...", "x y": "1, yes, none"}


@pytest.mark.parametrize(
    "metadata, scores, text",
    [({}, {4: 0.9, 8: 0.95}, "0.0500\u00a0SSIM"), ({"content_score": "psnr"}, {4: 40.0, 8: 45.5}, "5.5\u00a0dB")],
)
def test_content_scores_name_their_metric(metadata, scores, text):
    """One layer at a time gives SSIM, probes give PSNR; the reason says which."""
    layer = LayerSensitivity(group="content", weight_size=2048, act_size=1, weight_scores=scores)
    assert text in Reasons(Sensitivity({"a": layer}, metadata)).weight("a", LayerPlan(weight_bits=4))


def test_the_map_is_drawn_like_a_unet():
    blocks = ["input", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "output"]
    assert u_shape(blocks) == {
        "input": "grid-row:1;grid-column:1",
        "down_blocks.0": "grid-row:2;grid-column:1",
        "down_blocks.1": "grid-row:3;grid-column:1",
        "mid_block": "grid-row:4;grid-column:1 / -1",
        "up_blocks.0": "grid-row:3;grid-column:2",
        "up_blocks.1": "grid-row:2;grid-column:2",
        "output": "grid-row:1;grid-column:2",
    }
    assert u_shape(["input", "transformer_blocks.0", "output"]) == {}


def test_psnr_of_pictures_in_the_grid():
    from PIL import Image

    black, grey = (Image.new("RGB", (4, 4), (v, v, v)) for v in (0, 51))
    assert _psnr(black, black) is None
    assert _psnr(grey, black) == pytest.approx(20 * math.log10(255 / 51))
