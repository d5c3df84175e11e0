"""Plots of a sweep are written, in both formats, and the same every time."""

import types

import pytest

pytest.importorskip("matplotlib")

from keras_compaware.reporting import plots
from keras_compaware.search import BASELINES, aggregate, distortions
from tests.search.helpers import record

RECORDS = [
    record(kind="dense", test=0.95),
    *(record(n, test=0.5 + n / 1000, seed=s) for n in (1, 10, 100) for s in (0, 1)),
    record(1, budget="1/8", status="diverged"),
    record(10, budget="1/8", distortions=[[10, 0.5], [20, 0.0]]),
    record(100, budget="1/8", distortions=[[100, 0.5]]),
    record(kind="held_pruning", test=0.7),
    record(kind="straight_through", test=0.8, budget="1/8"),
]


def draw(folder, records=RECORDS):
    rows = aggregate(records)
    labels = {"low_rank": "low rank"}
    return [
        *plots.plot_periods(rows, folder, labels, BASELINES),
        *plots.plot_heatmap(rows, folder, labels),
        *plots.plot_distortions(distortions(records), folder, labels),
    ]


def test_files(tmp_path):
    files = draw(tmp_path)
    names = ("accuracy-low_rank", "heatmap", "distortion-low_rank")
    assert [file.name for file in files] == [f"{n}.{e}" for n in names for e in ("png", "svg")]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for file in files:
        start = b"\x89PNG" if file.suffix == ".png" else b"<?xml"
        content = file.read_bytes()
        assert content.startswith(start)
        assert len(content) > 5000
    before = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in draw(tmp_path)] == before


def drawn(monkeypatch, tmp_path, draw_panel, function, rows):
    """The axes that a function of `plots` draws on, closed figures included."""
    seen = []
    original = getattr(plots, draw_panel)

    def keep(axis, *arguments):
        original(axis, *arguments)
        seen.append(axis)

    monkeypatch.setattr(plots, draw_panel, keep)
    function(rows, tmp_path)
    return seen


def test_a_curve_has_the_means_and_deviations_of_its_periods(monkeypatch, tmp_path):
    records = [record(n, test=0.5 + s / 10, seed=s) for n in (10, 1) for s in (0, 1)]
    rows = aggregate([*records, record(kind="dense", test=0.9)])
    (axis,) = drawn(monkeypatch, tmp_path, "_draw_periods", plots.plot_periods, rows)
    (curve,) = axis.containers
    assert curve.lines[0].get_xydata().tolist() == [[1, pytest.approx(55)], [10, pytest.approx(55)]]
    low, high = curve.lines[2][0].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 100 * 0.005**0.5)
    level = [line for line in axis.lines if line.get_label() == "dense, cosine"]
    assert [line.get_ydata()[0] for line in level] == [90]


def test_a_schedule_has_one_colour_and_stands_in_the_legend(monkeypatch, tmp_path):
    """Also where a study under way has other schedules of one budget than of another."""
    records = [record(1, test=0.5, schedule=schedule) for schedule in ("constant", "cosine")]
    records += [record(n, test=0.4, budget="1/16", schedule="cosine") for n in (1, 10)]
    rows = aggregate(records)
    first, last = drawn(monkeypatch, tmp_path, "_draw_periods", plots.plot_periods, rows)
    assert {text.get_text() for text in last.get_legend().texts} == {"constant", "cosine"}
    colours = {curve.get_label(): curve.lines[0].get_color() for curve in first.containers}
    (curve,) = last.containers
    assert curve.lines[0].get_color() == colours[curve.get_label()] != colours["constant"]


def test_a_heatmap_shows_what_diverged(monkeypatch, tmp_path):
    rows = aggregate([record(1, status="diverged"), record(10, test=0.5)])
    (axis,) = drawn(monkeypatch, tmp_path, "_draw_heatmap", plots.plot_heatmap, rows)
    assert [text.get_text() for text in axis.texts] == ["diverged", "50.0"]


def test_nothing_to_draw(tmp_path):
    assert draw(tmp_path, [record(kind="dense")]) == []
    assert draw(tmp_path, [record(1, status="failed")])


def test_sensitivities(tmp_path):
    found = types.SimpleNamespace(
        measure="change of the outputs",
        baseline=0.5,
        channels={f"space{n}": {2: 0.6 + n, 4: 0.55 + n / 9, 8: 0.5} for n in range(15)},
        ranks={"dense/kernel": {1: 3.0, 16: 0.6}},
    )
    files = plots.plot_sensitivity(found, tmp_path)
    assert [file.name for file in files] == ["sensitivity.png", "sensitivity.svg"]
    text = files[1].read_text()
    assert "growth of change of the outputs" in text
    assert "space14 -->" in text  # the most sensitive ones are named
    assert "space0 -->" not in text
    for file in (tmp_path / "own.png", tmp_path / "own.svg"):
        assert plots.plot_sensitivity(found, file) == [file]
        assert b"space14" in file.read_bytes() or file.read_bytes() == files[0].read_bytes()
    found.channels, found.ranks = {}, {}
    assert plots.plot_sensitivity(found, tmp_path)
