"""The program `report`: the page it writes and what it refuses."""

import json
import sys

import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("plotly")

from tests.reporting.helpers import Page, report

pytestmark = pytest.mark.tensorflow


@pytest.fixture
def run(tmp_path):
    """Returns a function that makes a folder of a run: its name, its report."""

    def make(name="run", content=None):
        folder = tmp_path / name
        folder.mkdir()
        text = content if isinstance(content, str) else json.dumps(content or report())
        (folder / "report.json").write_text(text)
        return folder

    return make


def fails(programs, *arguments):
    outcome = programs("report", *arguments)
    assert outcome.status == 1, outcome
    assert "Traceback" not in outcome.err
    return outcome.err


def test_a_page_of_a_run_that_was_trained(programs, finished, tmp_path):
    out = tmp_path / "it's a report.html"
    printed = programs.succeeds("report", f"--workdir={finished.path}", f"--out={out}")
    assert printed.splitlines()[-1].startswith("written to ")
    assert "LiteRT on the test split" in printed
    text = out.read_text(encoding="utf-8")
    parsed = Page(text)
    assert [title for _, title in parsed.all("h2")] == [
        *("Results", "Plan", "Layer by layer", "Training", "Distortion"),
        *("Spectra of the kernels", "Reproduce"),
    ]
    assert "Plotly" in text
    rows = [row for _, row in parsed.all("tr")]
    assert "dense1Dense2,080 → 4162,048 → 384324 of 32rank 4 of 32" in rows


def test_the_records_of_layers_and_spectra(finished):
    assert finished.report["format"] == 1
    assert finished.report["layers"] == [
        {
            "name": name,
            "class": "Dense",
            "channels": [units, units],
            "parameters": [before + units, after + units],
            "macs": [before, after],
        }
        for name, units, before, after in (
            *(("dense1", 32, 64 * 32, 4 * 96), ("dense2", 16, 32 * 16, 4 * 48)),
            ("head", 10, 160, 160),
        )
    ]
    spectra = finished.report["spectra"]
    assert [(row["name"], row["rank"], row["full_rank"]) for row in spectra] == [
        *(("dense1/kernel", 4, 32), ("dense2/kernel", 4, 16), ("head/kernel", 10, 10))
    ]
    assert [k for k, _ in spectra[0]["dense"]] == list(range(1, 33))


def test_compare_may_be_a_list_or_given_twice(programs, run, tmp_path):
    paths = [run(name) for name in "abc"]
    out = tmp_path / "page.html"
    for further in ([f"--compare={paths[1]},{paths[2]}"], [f"--compare={p}" for p in paths[1:]]):
        programs.succeeds("report", f"--workdir={paths[0]}", *further, f"--out={out}")
        rows = [text for _, text in Page(out.read_text(encoding="utf-8")).all("tr")]
        assert [row[0] for row in rows if row[1:].startswith("88.00 %")] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "report.json is damaged: Expecting property name"),
        ("[" * 100_000, "report.json is damaged: "),
        ("[]", "report.json: it is no report of a run: expected an object, received a list"),
        (json.dumps(report(plan=3)), "its part plan is damaged: expected a list, received 3"),
        (json.dumps(report(format=2)), "it has format 2 and was written by a later version"),
    ],
)
def test_the_old_page_stays(programs, run, tmp_path, content, message):
    out = tmp_path / "page.html"
    out.write_text("old")
    broken = run("broken", content)
    arguments = [f"--workdir={run()}", f"--compare={broken}", f"--out={out}"]
    assert message in fails(programs, *arguments)
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"broken", "run", "page.html"}


def test_without_the_library_the_old_page_stays(programs, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    out = tmp_path / "page.html"
    out.write_text("old")
    error = fails(programs, f"--workdir={run()}", f"--out={out}")
    assert "pip install 'keras-compaware[report]'" in error
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("page.txt", "--out must end in .html"),
        ("nowhere/page.html", "--out: there is no folder"),
        ("", "--out is missing"),
    ],
)
def test_where_a_page_can_be_written(programs, run, tmp_path, out, message):
    path = f"{tmp_path}/{out}" if out else ""
    assert message in fails(programs, f"--workdir={run()}", f"--out={path}")


def test_runs_that_are_missing(programs, tmp_path):
    assert "no run is there" in fails(programs, f"--workdir={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "it was not finished: run train again" in fails(programs, f"--workdir={tmp_path}")
