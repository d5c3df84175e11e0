"""Builds the documentation: `make docs`.

Docstrings of this project are plain text in Google's style: code stands in single backticks,
formulas are indented. `_as_restructured_text` turns them into what Sphinx reads. Links to files of
the project outside this folder (benchmarks, configs) lead to pages made of them, or download them.
"""

import os
import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GENERATED = DOCS / "_generated"

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

project = "keras_compaware"
author = "The keras_compaware authors"
copyright = author
version = release = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "keras_compaware/__init__.py").read_text(), re.MULTILINE
).group(1)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
default_role = "py:obj"
nitpicky = False

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # else every compressor repeats what Compressor says
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # levels of headings that pages of benchmarks leave out
nb_execution_mode = "off"  # the notebooks are stored with their outputs, and a test runs them

html_theme = "furo"
html_title = "keras_compaware"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


# ---- links to files outside docs/ ------------------------------------------------------------

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def _relinked(text, source_folder, page_folder):
    """Returns Markdown of `source_folder` whose links work from a page in `page_folder`."""

    def relink(match):
        before, target, anchor, after = match.groups()
        if re.match(r"[a-z]+:", target):
            return match.group()
        path = pathlib.Path(os.path.normpath(source_folder / target))
        if path.suffix == ".md" and ROOT / "benchmarks" in path.parents:
            path = GENERATED / path.relative_to(ROOT)
        elif path == ROOT / "README.md":
            path = DOCS / "index.md"
        elif path.is_dir():
            path = DOCS / "programs.md" if path == ROOT / "configs" else DOCS / "benchmarks.md"
        return f"{before}{os.path.relpath(path, page_folder)}{anchor or ''}{after}"

    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_LINK.sub(relink, text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, _LINK.sub(relink, text[end:])])


def _relink_source(app, docname, source):
    path = pathlib.Path(app.env.doc2path(docname))
    if path.suffix == ".md" and GENERATED not in path.parents:
        source[0] = _relinked(source[0], path.parent, path.parent)


def _generate(app):
    """Writes the pages that are made of other files of the project."""
    shutil.rmtree(GENERATED, ignore_errors=True)
    for page in sorted((ROOT / "benchmarks").glob("*/*.md")):
        copy = GENERATED / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = _relinked(page.read_text(), page.parent, copy.parent)
        copy.write_text(text if page.name == "README.md" else f"---\norphan: true\n---\n\n{text}")
    readme = (ROOT / "README.md").read_text()
    for name, begin, end in [
        ("architecture", "\n## Architecture\n", "\n## "),
        ("what_works", "\n## What works\n", "\n## "),
        ("what_acts_when", "\n## What acts when\n", "\n## "),
        ("sources", "\n## Sources\n", "\nApache-2.0"),
    ]:
        section = readme.split(begin, 1)[1].split(end, 1)[0]
        (GENERATED / f"{name}.txt").write_text(_relinked(section, ROOT, DOCS))
    text = _relinked((ROOT / "CHANGELOG.md").read_text(), ROOT, GENERATED)
    (GENERATED / "changelog.md").write_text(text)


# ---- docstrings ------------------------------------------------------------------------------

_SECTION = re.compile(r"^[A-Z][a-z]+:$")
_NAME = re.compile(r"[\w.]+(\(\))?")


def _as_restructured_text(app, what, name, obj, options, lines):
    """Escapes what reStructuredText would take for markup; indented formulas become literal."""
    result, prose = [], []
    in_doctest, literal, section = False, None, 0

    def end_prose():
        result.extend(_escaped("\n".join(prose)).split("\n") if prose else [])
        prose.clear()

    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        before = lines[number - 1] if number else ""
        if literal is not None and line.strip() and indent < literal:
            literal = None
            result.append("")
        if line.lstrip().startswith(">>>") and not in_doctest:
            end_prose()
            in_doctest = True
            if before.strip():
                result.append("")
        elif in_doctest and not line.strip():
            in_doctest = False
        if in_doctest or literal is not None:
            result.append(line)
            continue
        if _SECTION.match(line):
            section = 4
        elif line.strip() and indent == 0:
            section = 0
        if line.strip() and not before.strip() and _is_formula(line, lines[:number], section):
            end_prose()
            literal = indent
            result += [" " * section + ".. code-block:: text", "", line]
        else:
            prose.append(line)
    end_prose()
    lines[:] = result


def _is_item(line):
    return line.lstrip().startswith(("- ", "* "))


def _is_formula(line, above, section):
    """Whether a line is indented below plain text: by at least four, and below no list."""
    indent = len(line) - len(line.lstrip())
    text = [line for line in above if line.strip()]
    outer = len(text[-1]) - len(text[-1].lstrip()) if text else 0
    paragraph = "\n".join(above).rstrip().rsplit("\n\n", 1)[-1].split("\n")
    inside_list = any(map(_is_item, [line, *paragraph]))
    return indent >= section + 4 and outer <= indent - 4 and not inside_list


def _escaped(text):
    """Single backticks around a name become a reference, around anything else code."""
    parts = text.split("`")
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"`{part}`" if _NAME.fullmatch(part) else f"``{' '.join(part.split())}``"
            continue
        part = re.sub(r"([*|])", r"\\\1", part)
        part = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part)
        parts[index] = rf"\ {part}" if index and part[:1].isalnum() else part  # `Rule`s
    return "".join(parts)


def setup(app):
    """Connects the functions above with Sphinx."""
    app.connect("builder-inited", _generate)
    app.connect("source-read", _relink_source)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)
