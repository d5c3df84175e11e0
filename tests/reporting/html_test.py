"""The page of a report: what it holds, what it escapes, what it refuses."""

import copy
import json
import re
import sys

import pytest

pytest.importorskip("plotly")

from keras_compaware.reporting import REPORT_FORMAT, checked, figures, html, page
from tests.reporting.helpers import Page, history, report, side

LIBRARY = "/* the library */"
NASTY = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&lt;%{x}"


@pytest.fixture(autouse=True)
def _short_library(monkeypatch):
    """The library is five megabytes, which these tests need not read."""
    monkeypatch.setattr(page, "_library", lambda: LIBRARY)


def charts_of(parsed):
    ((_, text),) = parsed.all("script", id="charts")
    return json.loads(text)


def row_of(parsed, start):
    """The first row of a table that starts so, its cells apart."""
    for _, text in parsed.all("tr"):
        if text.startswith(start):
            return text
    raise AssertionError(f"no row starts with {start}")


def test_the_sections():
    parsed = Page(html(report()))
    titles = [text for _, text in parsed.all("h2")]
    assert titles == [
        *("Results", "Plan", "Layer by layer", "Training", "Distortion"),
        *("Spectra of the kernels", "Reproduce"),
    ]
    assert [text for _, text in parsed.all("h1")] == ["digits, tiny"]
    targets = {attributes["href"] for attributes, _ in parsed.all("a")}
    assert targets == {f"#{attributes['id']}" for attributes, _ in parsed.all("section")} | {
        "#main"
    }


def test_the_headline():
    parsed = Page(html(report()))
    assert row_of(parsed, "accuracy") == "accuracy90.00 %88.00 %−2.00 points"
    assert row_of(parsed, "parameters") == "parameters1,000280" + "3.57 × fewer"
    assert row_of(parsed, "latency") == "latency, 1 thread10 µs2.8 µs3.57 × faster"
    tiles = [text for attributes, text in parsed.all("li", class_=None) if "class" in attributes]
    assert tiles[1] == f"LiteRT file{(4 * 280 + 1024) / 1024:.1f} KB2.34 × smallerdense 4.9 KB"
    assert "seed 7" in parsed.text()


@pytest.mark.parametrize(
    ("small", "expected"),
    [
        ({"parameters": 1000}, "1,0001,000unchanged"),
        ({"parameters": 2000}, "1,0002,0002.00 × more"),
        ({"parameters": 1001}, "1,0001,001about the same"),
        ({"parameters": 0}, "1,0000from 1,000"),
    ],
)
def test_what_did_not_become_smaller_is_said(small, expected):
    one = report()
    one["compact"] |= small
    assert row_of(Page(html(one)), "parameters") == f"parameters{expected}"


def test_the_plan_has_the_reasons():
    one = report()
    one["plan"][0]["reason"] = "a regularizer does not fit"
    parsed = Page(html(one))
    told = "Every(every=10, constraint=LowRank(ratio=0.25))left out: a regularizer does not fit"
    assert row_of(parsed, "hidden/kernel") == f"hidden/kernelDense16×32{told}"
    told = "left alone it produces the model's output"
    assert row_of(parsed, "out/kernel") == f"out/kernelDense32×10{told}"
    assert "1 of 2 kernels and channel spaces are compressed" in parsed.text()


def test_the_layers():
    parsed = Page(html(report()))
    told = "900 → 180890 → 17032 → 242 of 3rank 4 of 16"
    assert told in [text.removeprefix("hiddenDense") for _, text in parsed.all("tr")]
    assert "space3224" in [text for _, text in parsed.all("tr")]
    charts = charts_of(parsed)
    dense, compact = charts["layers-macs"][0]["data"]
    assert (dense["x"], compact["x"]) == ([890, 90], [170, 90])
    assert dense["text"] == ["hidden", "out"]
    dense, compact = charts["layers-channels"][0]["data"]
    assert (dense["x"], compact["x"]) == ([32, 32], [24, 24])
    full, rank = charts["layers-rank"][0]["data"]
    assert (full["name"], rank["name"], rank["text"]) == ("full rank", "rank", ["hidden/kernel"])
    assert (full["x"], rank["x"]) == ([3], [2])
    assert rank["hovertemplate"] == "%{text}<br>rank: %{x:,}<extra></extra>"
    plots = {attributes["id"]: attributes for attributes, _ in parsed.all("div", role="img")}
    for name in ("layers-channels", "layers-rank"):
        assert plots[name]["aria-label"].endswith("A table holds the numbers.")


def test_a_report_without_a_record_of_layers_shows_what_compaction_told():
    one = report()
    del one["layers"], one["spectra"]
    parsed = Page(html(one))
    assert "hiddenDense900 → 1804 of 16rank 4 of 16" in [text for _, text in parsed.all("tr")]
    charts = charts_of(parsed)
    assert "layers-macs" not in charts
    full, rank = charts["layers-rank"][0]["data"]
    assert (full["x"], rank["x"], rank["text"]) == ([16], [4], ["hidden"])
    before, after = charts["layers-channels"][0]["data"]
    assert (before["x"], after["x"], after["text"]) == ([32], [24], ["space"])


def test_no_bars_of_ranks_and_channels_that_are_not_told():
    one = report()
    del one["spectra"], one["compact"]["channels"]
    for row in one["layers"]:
        row["channels"] = [None, None]
    for row in one["compact"]["layers"]:
        row["note"] = "as it is"
    assert {"layers-rank", "layers-channels"}.isdisjoint(charts_of(Page(html(one))))


def test_many_layers_only_the_largest_are_drawn():
    one = report()
    row = one["layers"][0]
    one["layers"] = [{**row, "name": f"l{i}", "parameters": [i, i]} for i in range(60)]
    parsed = Page(html(one))
    shown = charts_of(parsed)["layers-parameters"][0]["data"][0]["text"]
    assert shown == [f"l{i}" for i in range(28, 60)]
    assert "The 32 largest of 60 layers" in parsed.text()
    assert len([text for _, text in parsed.all("tr") if re.match(r"l\d", text)]) == 60


def test_many_kernels_only_the_largest_ranks_are_drawn():
    one = report()
    row = one["spectra"][0]
    one["spectra"] = [{**row, "name": f"k{i}", "full_rank": i + 1, "rank": 1} for i in range(40)]
    parsed = Page(html(one))
    shown = charts_of(parsed)["layers-rank"][0]["data"][0]["text"]
    assert shown == [f"k{i}" for i in range(8, 40)]
    assert "The 32 largest of 40 kernels" in parsed.text()


def test_the_training_curves_and_the_firings():
    charts = charts_of(Page(html(report())))
    *curves, marks = charts["training-loss"][0]["data"]
    assert [curve["name"] for curve in curves] == [
        f"{who}, {split}"
        for who in ("dense twin", "compact")
        for split in ("training", "validation")
    ]
    assert curves[0]["y"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert charts["training-loss"][0]["layout"]["yaxis"]["type"] == "log"
    assert marks["x"] == pytest.approx([10 / 13, 20 / 13, 30 / 13, 3])
    assert marks["text"][0] == "firing at step 10, mean distortion 0.15"
    assert charts["training-accuracy"][0]["data"][3]["y"][0] == pytest.approx(45)
    assert [curve["name"] for curve in charts["training-learning-rate"][0]["data"]] == ["compact"]


def test_epochs_that_diverged_are_left_out_of_curves():
    one = report()
    one["compact"]["history"][1]["loss"] = None
    one["compact"]["history"][2]["loss"] = float("nan")
    charts = charts_of(Page(html(one)))
    curve = next(c for c in charts["training-loss"][0]["data"] if c["name"] == "compact, training")
    assert (curve["x"], curve["y"]) == ([1], [1.0])


def test_distortion_kernel_by_kernel_or_all_together():
    charts = charts_of(Page(html(report())))
    first, second = charts["distortion-chart"][0]["data"]
    assert (first["name"], first["x"], first["y"][0]) == ("hidden/kernel", [10, 20, 30, 39], 0.1)
    assert second["y"][-1] == pytest.approx(2 / 39)
    one = report()
    for row in one["compact"]["firings"]:
        row["distortion"] = {f"k{i}": float(i) for i in range(8)}
    parsed = Page(html(one))
    together, *alone = charts_of(parsed)["distortion-chart"]
    assert [(c["name"], c["y"][0]) for c in together["data"]] == [
        *(("largest", 7), ("mean", 3.5), ("smallest", 0))
    ]
    assert [c["data"][0]["name"] for c in alone] == [f"k{i}" for i in range(8)]
    options = [text for _, text in parsed.all("option")]
    assert options == ["all kernels: mean and range", *(f"k{i}" for i in range(8))]


def test_many_firings_are_thinned():
    one = report()
    row = one["compact"]["firings"][0]
    one["compact"]["firings"] = [{**row, "step": step} for step in range(1, 20_001)]
    page_text = html(one)
    steps = charts_of(Page(page_text))["distortion-chart"][0]["data"][0]["x"]
    assert len(steps) <= figures.POINTS + 1
    assert (steps[0], steps[-1]) == (1, 20_000)
    assert len(page_text) < 400_000


def test_the_spectra():
    charts = charts_of(Page(html(report())))
    dense, trained = charts["spectrum"][0]["data"]
    assert (dense["y"], trained["y"]) == ([3.0, 2.0, 1.0], [3.0, 2.0])  # without what is rounding
    assert charts["spectrum"][0]["layout"]["shapes"][0]["x0"] == 2.5


def test_the_command_and_the_configuration():
    parsed = Page(html(report()))
    command, config = (text for _, text in parsed.all("pre"))
    assert command == report()["command"]
    assert json.loads(config) == report()["config"]
    assert row_of(parsed, "python") == "python3.11.7"


def test_cut_channels_and_early_compaction():
    one = report()
    row = {"what": "cut to 50 %", "keras_accuracy": 0.75, "parameters": 500, "macs": 400}
    one["compact"]["shrink"] = [row]
    one["compact"]["early"] = {
        "epoch": 2,
        "parameters": 500,
        "seconds_per_epoch": {"before": 2.0, "after": 1.0},
    }
    parsed = Page(html(one))
    assert row_of(parsed, "cut to") == "cut to 50 %75.00 %500400"
    assert "Compacted after epoch 2 of 3: 500 of 1,000 parameters" in parsed.text()


def test_the_smallest_report():
    """What every report has, and nothing else."""
    one = report()
    one = {key: one[key] for key in ("name", "config", "command")}
    one |= {"dense": side(), "compact": side(0.8, 500)}
    parsed = Page(html(one))
    assert [text for _, text in parsed.all("h2")] == ["Results", "Reproduce"]
    assert parsed.all("script") == []
    assert "script-src 'none'" in parsed.all("meta")[1][0]["content"]


@pytest.mark.parametrize("part", ["plan", "layers", "spectra", "data", "versions", "machine"])
@pytest.mark.parametrize("value", ["missing", None, "empty"])
def test_any_part_may_be_missing(part, value):
    one = report()
    if value == "missing":
        del one[part]
    else:
        one[part] = None if value is None else type(one[part])()
    Page(html(one))


@pytest.mark.parametrize("part", ["history", "firings", "layers", "channels"])
def test_any_part_of_the_compact_model_may_be_missing(part):
    one = report()
    del one["compact"][part]
    Page(html(one))


def test_without_validation_and_twin():
    one = report()
    del one["dense"]["history"], one["steps_per_epoch"]
    for row in one["compact"]["history"]:
        del row["val_loss"], row["val_accuracy"]
    charts = charts_of(Page(html(one)))
    assert [curve["name"] for curve in charts["training-loss"][0]["data"]] == ["compact, training"]


# ---- several runs -------------------------------------------------------------------------------


def test_several_runs():
    other = report("digits, tiny", compact=side(0.91, 600), dense=side())
    bad = report("digits, tiny", compact=side(0.5, 700), dense=side())
    parsed = Page(html(report(), [other, bad], ["one", "two", "three"]))
    charts = charts_of(parsed)
    assert len(charts["tradeoff"]) == 6
    front, twins, runs = charts["tradeoff"][0]["data"]
    assert [label.strip() for label in runs["text"]] == ["one", "two", "three"]
    assert len(twins["x"]) == 1  # the same one
    assert front["y"] == pytest.approx([88, 91])
    assert row_of(parsed, "two").startswith("two91.00 %◆on the front:  3.3 KB")
    assert "◆" not in row_of(parsed, "three")
    assert [text for _, text in parsed.all("h2")][1] == "Several runs"
    assert [text for _, text in parsed.all("option")][:2] == ["LiteRT file", "encoded weights"]


def test_labels_must_be_one_for_each_run():
    with pytest.raises(ValueError, match=r"one for each run\. Received: 1 for 2 runs"):
        html(report(), [report()], ["one"])


# ---- what readers rely on -----------------------------------------------------------------------


def everywhere(value, nasty):
    """A value with a text added to every text and name in it."""
    if isinstance(value, dict):
        return {f"{key}{nasty}": everywhere(item, nasty) for key, item in value.items()}
    if isinstance(value, list):
        return [everywhere(item, nasty) for item in value]
    return f"{value}{nasty}" if isinstance(value, str) else value


def hostile():
    """A report with markup in everything that a user chooses."""
    one = report(NASTY)
    kept = {key: one["config"][key] for key in ("model", "seed", "epochs")}
    for part in ("data", "versions"):
        one[part] = everywhere(one[part], NASTY)
    one["config"] = everywhere(one["config"], NASTY) | {**kept, "model": NASTY, "seed": NASTY}
    for key in ("backend", "machine", "command"):
        one[key] += NASTY
    one["plan"] = [
        {**row, "name": row["name"] + NASTY, "layer": NASTY, "reason": NASTY, "shape": [NASTY]}
        for row in one["plan"]
    ]
    one["plan"][0]["actions"] = [NASTY]
    for rows in (one["layers"], one["spectra"], one["compact"]["layers"]):
        for row in rows:
            row["name"] += NASTY
    for row in one["compact"]["layers"]:
        row["note"] = row["layer"] = NASTY
    one["layers"][0]["class"] = NASTY
    one["compact"]["channels"][0]["name"] = NASTY
    for row in one["compact"]["firings"]:
        row["distortion"] = {name + NASTY: value for name, value in row["distortion"].items()}
    for row in one["compact"]["history"]:
        row[NASTY] = 1.0
    one["compact"]["shrink"] = [
        {"what": NASTY, "keras_accuracy": 0.5, "parameters": 1, "macs": 1},
    ]
    return one


def test_texts_are_escaped():
    text = html(hostile(), [hostile()], [NASTY, NASTY])
    parsed = Page(text)
    assert len(parsed.all("script")) == 3  # the charts, the library, the page's own
    assert parsed.all("img") == []
    handlers = [name for _, found, _ in parsed.elements for name in found if name.startswith("on")]
    assert handlers == []
    assert parsed.text().count(NASTY) > 30  # as it is, for people to read
    for chart in charts_of(parsed).values():
        assert "<" not in re.sub(r"<(br|extra|/extra)>", "", json.dumps(chart))


def test_only_known_scripts_may_run():
    (policy,) = (
        found["content"]
        for found, _ in Page(html(report())).all("meta")
        if found.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    script = next(rule for rule in policy.split("; ") if rule.startswith("script-src"))
    assert "unsafe" not in script
    assert len(script.split()) == 3


def test_nothing_is_loaded():
    parsed = Page(html(report(), [report()]))
    for tag, found, _ in parsed.elements:
        assert not {"src", "srcset", "data", "action"} & set(found), tag
        assert found.get("href", "#").startswith("#"), tag
    assert "@import" not in parsed.text("style")
    assert "url(" not in parsed.text("style")


def test_tables_and_charts_can_be_read_without_seeing():
    parsed = Page(html(report(), [report()]))
    assert parsed.all("html")[0][0]["lang"] == "en"
    assert len(parsed.all("caption")) == len(parsed.all("table"))
    assert all(text for _, text in parsed.all("caption"))
    assert all(found.get("scope") in ("row", "col") for found, _ in parsed.all("th"))
    assert all(text for _, text in parsed.all("th"))
    plots = parsed.all("div", role="img")
    assert len(plots) == len(charts_of(parsed)) == 11
    assert all("A table holds the numbers" in found["aria-label"] for found, _ in plots)
    labels = {found["aria-labelledby"] for found, _ in parsed.all("section")}
    assert labels <= {found.get("id") for found, _ in parsed.all("h2")}
    names = [found["id"] for _, found, _ in parsed.elements if "id" in found]
    assert len(names) == len(set(names))


def test_odd_characters_can_be_written():
    text = html(report("a\x00\x1b[31m\ud800b"))
    assert "a��[31m�b" in text
    text.encode("utf-8")


def test_the_same_report_gives_the_same_page():
    one = report()
    before = copy.deepcopy(one)
    assert html(one) == html(one)
    assert one == before


def test_charts_are_what_plotly_takes():
    go = pytest.importorskip("plotly.graph_objects")

    def with_colours(value, key=""):
        if isinstance(value, dict):
            return {name: with_colours(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [with_colours(item, key) for item in value]
        return "red" if key == "color" and str(value).startswith("--") else value

    charts = charts_of(Page(html(hostile(), [report()], ["a", "b"])))
    for variants in charts.values():
        for chart in variants:
            go.Figure(with_colours(chart))


# ---- what is refused ----------------------------------------------------------------------------


def changed(path, value):
    one = report()
    *folders, last = path
    place = one
    for name in folders:
        place = place[name]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return one


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "expected an object, received a list"),
        (None, "expected an object, received null"),
        (3, "expected an object, received a number"),
        (changed(["dense"], KeyError), "it is no report of a run: it lacks 'dense'"),
        (changed(["compact", "macs"], KeyError), "it lacks compact.macs. Run `train` again"),
        (changed(["config", "seed"], KeyError), "it lacks config.seed"),
        (changed(["dense"], []), "its part dense is damaged: expected an object, received \\[\\]"),
        (changed(["compact", "accuracy"], "0.9"), "compact.accuracy .* received '0.9'"),
        (changed(["compact", "macs"], float("nan")), "compact.macs .* received nan"),
        (changed(["compact", "macs"], 10**400), "compact.macs .* at least 0"),
        (changed(["dense", "latency_ms"], -1), "dense.latency_ms .* received -1"),
        (changed(["plan"], "x" * 200), "part plan .* expected a list, received 'x{56}\\.\\.\\.\\."),
        (changed(["plan", 1], 3), r"plan\[1\] is damaged: expected an object, received 3"),
        (changed(["plan", 0, "name"], 3), r"plan\[0\].name is damaged: expected a text"),
        (changed(["layers", 0, "macs"], [1]), r"layers\[0\].macs .* before and after"),
        (changed(["spectra", 0, "trained"], []), r"spectra\[0\].trained .* pairs of numbers"),
        (changed(["compact", "firings", 0, "distortion"], 1), "distortion .* an object"),
        (changed(["compact", "history"], {}), "compact.history .* a list, received {}"),
        (changed(["compact", "early"], {"epoch": 1}), "compact.early.parameters"),
        (changed(["format"], 0), "format must be an integer from 1 on, received 0"),
        (changed(["format"], "1"), "format must be an integer from 1 on, received '1'"),
        (changed(["format"], REPORT_FORMAT + 1), "later version .* reads formats up to 1. Upgrade"),
    ],
)
def test_damaged_reports(broken, message):
    with pytest.raises(ValueError, match=message):
        checked(broken)
    with pytest.raises(ValueError, match=message):
        html(report(), [broken], ["a", "b"])


def test_a_report_without_a_format_is_read():
    one = report()
    del one["format"]
    assert checked(one) is one


def test_without_plotly(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-compaware\[report\]'"):
        html(report())


def test_histories_are_as_long_as_they_are():
    one = report()
    one["compact"]["history"] = history(500)
    parsed = Page(html(one))
    rows = [text for _, text in parsed.all("tr") if text.startswith("5000.002")]
    assert len(rows) == 1
    assert len(parsed.all("tr")) < 300
