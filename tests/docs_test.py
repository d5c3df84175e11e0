"""The code in the documentation runs, and prints what the documentation says."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_document(text):
    """Runs the python blocks in one namespace; yields (printed, shown) where text follows code."""
    namespace, printed = {}, None
    for language, body in _BLOCK.findall(text):
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(body, "<documentation>", "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            yield printed.strip(), body.strip()
            printed = None


@pytest.mark.tensorflow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_blocks_run_and_print_what_is_shown(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for printed, shown in run_document(path.read_text()):
        assert printed == shown


def test_a_wrong_output_is_noticed():
    pairs = list(run_document("```python\nprint(1 + 1)\n```\nso\n```text\n3\n```\n"))
    assert pairs == [("2", "3")]


def test_an_error_in_a_block_is_noticed():
    with pytest.raises(NameError):
        list(run_document("```python\nundefined\n```\n"))
