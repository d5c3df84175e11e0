"""The code in the documentation runs, and prints what the documentation says; the site builds."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import keras_compaware
from tests.laws import compressor_laws_test as laws
from tests.laws.kernels_under_test import NAMES

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GUIDES = [
    path
    for path in sorted(DOCS.glob("**/*.md"))
    if not path.relative_to(DOCS).parts[0].startswith("_")
]
DOCUMENTS = [ROOT / "README.md", *GUIDES]
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LONGEST = 600  # seconds that a cell may take; they take tens on an idle core


def has_code(path):
    return any(language == "python" for language, _ in _BLOCK.findall(path.read_text()))


def run_document(text, namespace=None):
    """Runs the python blocks in one namespace; yields (printed, shown) where text follows code."""
    namespace, printed = {} if namespace is None else namespace, None
    for language, body in _BLOCK.findall(text):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(body, "<documentation>", "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            yield printed.strip(), body.strip()
            printed = None


@pytest.fixture
def tables():
    """Puts the tables of layers back as they were: documents register layers of their own."""
    from keras_compaware import kernels
    from keras_compaware.coupling import flow

    found = (kernels._RULES, flow.LAYER_RULES, flow.OPERATION_RULES)
    before = [dict(table) for table in found]
    yield
    for table, entries in zip(found, before, strict=True):
        table.clear()
        table.update(entries)


# These take half a minute each.
LONG = {ROOT / "docs/export.md", ROOT / "docs/from_tfmot.md"}


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path in LONG else [])
        for path in filter(has_code, DOCUMENTS)
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_code_blocks_run_and_print_what_is_shown(path, tmp_path, monkeypatch, tables):
    monkeypatch.chdir(tmp_path)
    for printed, shown in run_document(path.read_text()):
        assert printed == shown


def test_a_wrong_output_is_noticed():
    pairs = list(run_document("```python\nprint(1 + 1)\n```\nso\n```text\n3\n```\n"))
    assert pairs == [("2", "3")]


def test_an_error_in_a_block_is_noticed():
    with pytest.raises(NameError):
        list(run_document("```python\nundefined\n```\n"))


# ---- how to add a method ----------------------------------------------------------------------


@pytest.fixture
def added(tmp_path, monkeypatch, tables):
    """The row of the table that the guide ends with, for the method that it adds."""
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "architecture.md").read_text()
    section = text.split("\n## How to add a method\n")[1].split("\n## ")[0]
    namespace = {}
    list(run_document(section, namespace))
    return namespace["case"]


@pytest.mark.tensorflow
def test_the_method_of_the_guide_obeys_every_law(added):
    for name in NAMES:
        laws.test_the_map_is_decoding_of_encoding(added, name)
        laws.test_the_map_is_what_numpy_finds(added, name)
        laws.test_the_bits_are_those_counted_by_hand(added, name)
        laws.test_no_compression_is_worse_than_zero(added, name)
    for name in ("conv2d grouped", "depthwise conv2d", "conv2d transpose"):
        laws.test_compiled_and_repeated_it_finds_the_same(added, name)
        laws.test_many_applications_neither_shrink_nor_grow(added, name)
        laws.test_a_kernel_in_other_units_is_compressed_alike(added, name)
        laws.test_settling_keeps_the_result_and_fixes_the_budget(added, name)
        laws.test_what_belongs_to_a_dead_channel_stays_zero(added, name)
    for shape in laws.SHAPES:
        laws.test_plain_arrays_of_awkward_shapes_and_values(added, shape)
    for dtype in ("float16", "bfloat16"):
        laws.test_shape_and_dtype_are_kept(added, dtype)
    laws.test_the_configuration_is_the_constructor(added)
    laws.test_it_cannot_be_changed(added)


# ---- results ----------------------------------------------------------------------------------


def test_the_results_quote_rows_of_the_pages_of_benchmarks():
    pages = [path.read_text() for path in (ROOT / "benchmarks").glob("*/*.md")]
    known = {line for page in pages for line in page.splitlines() if line.startswith("|")}
    quoted = [line for line in (DOCS / "results.md").read_text().splitlines() if line[:1] == "|"]
    assert len(quoted) > 50
    assert [line for line in quoted if line not in known] == []


# ---- the reference ----------------------------------------------------------------------------


def test_the_reference_has_every_public_name():
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    entries = set(re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", text, re.MULTILINE))
    modules = set(re.findall(r"^\.\. automodule:: keras_compaware\.(\w+)", text, re.MULTILINE))
    names = set(keras_compaware.__all__)
    names -= {name for name in names if inspect.ismodule(getattr(keras_compaware, name))}
    assert names - entries == set()
    assert {"export", "measure", "reporting", "scores", "search"} <= modules
    for name in ("compressors", "layers", "regularizers", "scores", "search"):
        public = set(importlib.import_module(f"keras_compaware.{name}").__all__)
        constants = {found for found in public if found.isupper()} - {"L1", "L2"}
        assert public - constants - entries == set(), name


def test_every_page_is_in_the_contents():
    listed = set()
    for path in GUIDES:
        for body in re.findall(r"^```{toctree}\n(.*?)^```$", path.read_text(), re.M | re.S):
            entries = [line for line in body.split("\n") if line and not line.startswith(":")]
            listed.update((path.parent / entry).relative_to(DOCS).as_posix() for entry in entries)
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in [*GUIDES, *NOTEBOOKS]}
    assert pages - listed == {"index"}


# ---- the site, the notebooks: slow ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.tensorflow
def test_the_site_builds_without_a_warning_and_every_link_leads_somewhere(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("furo", "myst_nb", "sphinx")):
        pytest.skip("needs the extra docs")
    # Pages are generated beside the others, so that a copy is built.
    for part in ("docs", "benchmarks", "configs", "apps", "keras_compaware", "tests"):
        shutil.copytree(
            ROOT / part,
            tmp_path / part,
            ignore=shutil.ignore_patterns("_build", "_generated", "__pycache__"),
        )
    for part in ("README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / part, tmp_path / part)
    result = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "site"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    for page in ("index", "quickstart", "faq", "from_tfmot", "architecture", "api/compressors"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    assert 'id="keras_compaware.LowRank"' in (tmp_path / "site/api/compressors.html").read_text()
    targets = broken_targets(tmp_path / "site")
    assert targets == []


def broken_targets(site):
    """Links within the site that lead to no file, or to no place in it."""
    texts = {page: page.read_text() for page in site.glob("**/*.html")}
    places = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    broken = []
    for page, text in texts.items():
        body = text.split('role="main"')[-1]
        for target in re.findall(r'href="([^"]+)"', body):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, place = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists() or (place and file in places and place not in places[file]):
                broken.append(f"{page.relative_to(site)}: {target}")
    return broken


def test_a_broken_link_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here"><a href="c.html"><a href="b.html#no">')
    (tmp_path / "b.html").write_text('<p id="here"><a href="https://example.org/none">')
    assert broken_targets(tmp_path) == ["a.html: c.html", "a.html: b.html#no"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_their_outputs_and_no_paths(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    printed = "".join(
        "".join(output["text"]) for output in outputs if output["output_type"] == "stream"
    )
    assert "/tmp" not in printed
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=_LONGEST, resources=resources).execute()
