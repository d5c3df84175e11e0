"""Who may import whom: the table of the architecture, and the test that holds the code to it.

The code is read with `ast`, never imported, so an import counts wherever it stands: at the top, in
a function, under `if TYPE_CHECKING`, or as the literal argument of `importlib.import_module`.

The units are the modules and packages directly under `keras_compaware`. A new unit needs a row in
`INTERNAL`; a new edge is a change of the architecture and is made here, in the open.
"""

import ast
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "keras_compaware"
INIT = "__init__"  # the unit of keras_compaware/__init__.py
ANYTHING = None

# unit -> the other units that it may import; a unit may always import itself.
INTERNAL: dict[str, set[str] | None] = {
    "base": set(),
    "schedules": {"base"},
    "_batches": {"_graph"},
    "_files": set(),
    "_graph": set(),
    "_math": set(),
    "_text": set(),
    "measure": {"base", "_graph"},
    "kernels": {"base", "_graph", "_math"},
    "compressors": {"base", "_math"},
    "regularizers": {"base", "_math"},
    "coupling": {"base", "kernels", "_graph", "_math", "_text"},
    "layers": {"base", "kernels", "_math"},
    "training": {"base", "kernels", "layers", "_graph", "_math"},
    "compaction": {
        "base",
        "coupling",
        "kernels",
        "layers",
        "_batches",
        "_graph",
        "_math",
        "_text",
    },
    "scores": {
        "base",
        "compaction",
        "compressors",
        "coupling",
        "kernels",
        "measure",
        "_batches",
        "_graph",
        "_math",
    },
    "recipe": {
        "base",
        "compaction",
        "coupling",
        "kernels",
        "layers",
        "rules",
        "training",
        "_graph",
    },
    "rules": {"base", "kernels", "training", "_text"},
    "export": {
        "base",
        "kernels",
        "layers",
        "measure",
        "_batches",
        "_files",
        "_graph",
        "_math",
    },
    "reporting": {"base", "kernels", "measure", "_files", "_math"},
    "search": {
        "base",
        "compaction",
        "compressors",
        "coupling",
        "export",
        "kernels",
        "measure",
        "recipe",
        "rules",
        "scores",
        "_batches",
        "_math",
        "_text",
    },
    "data": {"_files"},
    "models": set(),
    "cli": ANYTHING,
    "__main__": set(),
    INIT: ANYTHING,
}

# The third-party packages of every unit, and what some units may import beyond them.
CORE = {"keras", "numpy"}
EXTERNAL: dict[str, set[str]] = {
    "export": {
        "tensorflow",
        "ai_edge_litert",
        "ai_edge_quantizer",
        "ml_dtypes",
        "onnx",
        "onnxruntime",
        "rich",
        "safetensors",
        "tf2onnx",
    },
    "data": {"tensorflow", "tensorflow_datasets", "sklearn", "rich"},
    "reporting": {"matplotlib", "plotly", "rich", "tensorflow"},  # event files of TensorBoard
    "cli": {"tensorflow", "absl", "h5py", "ml_collections", "rich"},  # Keras saves by h5py
    "__main__": {f"{PACKAGE}_console"},  # the console command, which lies in apps/console
}
EXTERNAL_OF_FILE: dict[str, set[str]] = {
    f"{PACKAGE}/_math/backend.py": {"tensorflow", "jax", "torch"},
    f"{PACKAGE}/cli/distribution.py": {"tensorflow", "jax"},  # devices, processes
}

# Not installed with the core, hence imported only where they are used: inside a function.
LAZY = {
    *("tensorflow", "jax", "torch", "ai_edge_litert", "ai_edge_quantizer"),
    *("onnx", "onnxruntime", "tf2onnx"),
    *("tensorflow_datasets", "sklearn", "matplotlib", "plotly", "keras_hub", "torch_pruning"),
}

# Outside the package: folder -> the only names that its files may import, the standard library
# included. A config is data, and a program of apps/ is a few lines over keras_compaware.cli; a
# benchmark uses the package as anyone does.
OUTSIDE: dict[str, set[str]] = {
    "apps": {"os", "absl", f"{PACKAGE}.cli", "__future__"},
    "apps/console": set(sys.stdlib_module_names),  # it imports a program by its name
    "configs": {"ml_collections", "configs.common", "__future__"},
    "benchmarks": {
        *(PACKAGE, "benchmarks"),
        *("keras", "keras_hub", "matplotlib", "numpy", "sklearn", "torch", "torch_pruning"),
        *sys.stdlib_module_names,
    },
}

PRIVATE = "keras.src"


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name: absolute and dotted, with where and how it is imported."""

    name: str
    line: int
    in_function: bool
    for_typing: bool


def _last_name(node: ast.expr) -> str:
    """Returns `c` of the expressions `c` and `a.b.c`, and an empty string for any other."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class _Collector(ast.NodeVisitor):
    """Collects the imports of one module; `package` is what its relative imports start from."""

    def __init__(self, package: str):
        self.imports: list[Import] = []
        self._package = package.split(".")
        self._function_depth = 0
        self._typing_depth = 0
        self._keras_names: set[str] = set()

    def _add(self, name: str, node: ast.AST) -> None:
        self.imports.append(
            Import(name, node.lineno, self._function_depth > 0, self._typing_depth > 0)
        )

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)
            if alias.name == "keras":
                self._keras_names.add(alias.asname or "keras")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parts = self._package[: len(self._package) - (node.level - 1)] if node.level else []
        parts = parts + (node.module.split(".") if node.module else [])
        for alias in node.names:
            self._add(".".join(parts if alias.name == "*" else [*parts, alias.name]), node)

    def visit_Call(self, node: ast.Call) -> None:
        if _last_name(node.func) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(name.value, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # `import keras` makes keras.src reachable without an import of its own.
        value = node.value
        if node.attr == "src" and isinstance(value, ast.Name) and value.id in self._keras_names:
            self._add(PRIVATE, node)
        self.generic_visit(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Decorators, defaults and annotations run where the function is defined.
        for child in [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]:
            self.visit(child)
        self._function_depth += 1
        for child in node.body:
            self.visit(child)
        self._function_depth -= 1

    visit_FunctionDef = _visit_function
    visit_AsyncFunctionDef = _visit_function

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.visit(node.args)
        self._function_depth += 1
        self.visit(node.body)
        self._function_depth -= 1

    def visit_If(self, node: ast.If) -> None:
        typing_only = _last_name(node.test) == "TYPE_CHECKING"
        self.visit(node.test)
        self._typing_depth += typing_only
        for child in node.body:
            self.visit(child)
        self._typing_depth -= typing_only
        for child in node.orelse:
            self.visit(child)


def imports_of(source: str, path: str) -> list[Import]:
    """Returns the imports of `source`, the text of the file at `path` (relative, with slashes)."""
    collector = _Collector(".".join(pathlib.PurePosixPath(path).parent.parts))
    collector.visit(ast.parse(source, filename=path))
    return collector.imports


def unit_of(path: str) -> str:
    """Returns the unit that a file of the package belongs to."""
    return pathlib.PurePosixPath(path).parts[1].removesuffix(".py")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names, key=str.lower)) or "nothing"


def problems_of(source: str, path: str) -> list[str]:
    """Returns one line for every import of `source` that the tables above do not allow."""
    if not path.startswith(f"{PACKAGE}/"):
        return _problems_outside(source, path)
    unit = unit_of(path)
    if unit not in INTERNAL:
        return [f"{path}:1: unit {unit!r} has no row in INTERNAL, which has {_listed({*INTERNAL})}"]

    allowed = INTERNAL[unit]
    external = CORE | EXTERNAL.get(unit, set()) | EXTERNAL_OF_FILE.get(path, set())
    problems = []
    for entry in imports_of(source, path):
        top, *rest = entry.name.split(".")
        where = f"{path}:{entry.line}: {unit} -> "
        if top == PACKAGE:
            target = rest[0] if rest and rest[0] in INTERNAL else INIT
            if target != unit and allowed is not ANYTHING and target not in allowed:
                shown = target if target != INIT else f"{entry.name} (the package itself)"
                problems.append(
                    f"{where}{shown} is not allowed; {unit} may import {_listed(allowed)}"
                )
        elif f"{entry.name}.".startswith(f"{PRIVATE}."):
            problems.append(f"{where}{PRIVATE} is private to Keras; nobody may import it")
        elif top not in sys.stdlib_module_names:
            if top not in external:
                problems.append(
                    f"{where}{top} is not allowed; the third-party packages of this file are "
                    f"{_listed(external)}"
                )
            elif top in LAZY and not (entry.in_function or entry.for_typing):
                problems.append(
                    f"{where}{top} must be imported inside a function, for it may not be installed"
                )
    return problems


def _problems_outside(source: str, path: str) -> list[str]:
    folders = map(str, pathlib.PurePosixPath(path).parents)  # the innermost first
    allowed = next(OUTSIDE[folder] for folder in folders if folder in OUTSIDE)
    return [
        f"{path}:{entry.line}: {entry.name} is not allowed; this folder may import only "
        f"{_listed(_without_standard_library(allowed))}"
        for entry in imports_of(source, path)
        if not any(f"{entry.name}.".startswith(f"{name}.") for name in allowed)
    ]


def _without_standard_library(names: set[str]) -> set[str]:
    if not names >= sys.stdlib_module_names:
        return names
    return (names - sys.stdlib_module_names) | {"the standard library"}


@pytest.mark.parametrize("folder", [PACKAGE, *OUTSIDE])
def test_imports_keep_to_the_table(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no Python files under {ROOT / folder}"
    problems = []
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        problems += problems_of(file.read_text(encoding="utf-8"), path)
    assert not problems, "imports outside the table:\n  " + "\n  ".join(problems)


def test_table_is_acyclic():
    done: set[str] = set()
    remaining = {unit: row for unit, row in INTERNAL.items() if row is not ANYTHING}
    while remaining:
        ready = {unit for unit, row in remaining.items() if row <= done}
        assert ready, f"these units import each other in a circle: {_listed({*remaining})}"
        done |= ready
        remaining = {unit: row for unit, row in remaining.items() if unit not in ready}


# The checker itself, on sources small enough to see what it must say.


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("base.py", "import numpy as np\nimport keras\nimport math"),
        ("compressors/pruning.py", "from keras_compaware.base import Compressor"),
        ("compressors/pruning.py", "from keras_compaware import base\nfrom .._math import views"),
        ("compressors/__init__.py", "from .pruning import A\nfrom . import low_rank"),
        ("export/litert.py", "def f():\n  import tensorflow as tf"),
        ("export/litert.py", "class A:\n  async def f(self):\n    import ai_edge_litert"),
        (
            "export/litert.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import tensorflow",
        ),
        ("_math/backend.py", "def f():\n  import jax.numpy\n  import torch"),
        ("_math/backend.py", "import importlib\ndef f():\n  return importlib.import_module('jax')"),
        ("cli/train.py", "import keras_compaware as kc\nfrom absl import app"),
        ("__init__.py", "from keras_compaware import base, cli, recipe"),
        ("base.py", "import keras\nclass A:\n  src = 1\nA.src"),
    ],
)
def test_checker_accepts(path, source):
    assert problems_of(source, f"{PACKAGE}/{path}") == []


@pytest.mark.parametrize(
    ("path", "source", "line", "edge"),
    [
        ("base.py", "from keras_compaware._math import axes", 1, "base -> _math"),
        ("compressors/a.py", "import keras_compaware.regularizers", 1, "compressors -> regular"),
        ("regularizers/a.py", "from ..compressors.pruning import A", 1, "regularizers -> compres"),
        ("compressors/a.py", "from .. import kernels", 1, "compressors -> kernels"),
        ("schedules.py", "from .training import A", 1, "schedules -> training"),
        ("schedules.py", "from . import training", 1, "schedules -> training"),
        ("compaction/__init__.py", "from .. import recipe", 1, "compaction -> recipe"),
        ("_math/__init__.py", "from ..base import *", 1, "_math -> base"),
        ("kernels.py", "import math\ndef f():\n  from .layers import A", 3, "kernels -> layers"),
        ("kernels.py", "class A:\n  from .layers import B", 2, "kernels -> layers"),
        ("kernels.py", "try:\n  import math\nexcept E:\n  from .layers import B", 4, "-> layers"),
        ("recipe.py", "import keras_compaware as kc", 1, "recipe -> keras_compaware (the package"),
        ("recipe.py", "from keras_compaware import Rule", 1, "recipe -> keras_compaware.Rule (the"),
        ("planner/a.py", "", 1, "unit 'planner' has no row"),
        ("base.py", "import rich", 1, "base -> rich"),
        ("_math/svd.py", "def f():\n  import jax", 2, "_math -> jax"),
        ("training/a.py", "def f():\n  import tensorflow", 2, "training -> tensorflow"),
        ("export/a.py", "import math\nimport tensorflow.lite", 2, "tensorflow must be imported in"),
        ("export/a.py", "class A:\n  import tensorflow", 2, "tensorflow must be imported inside"),
        ("export/a.py", "def f(x=__import__('tensorflow')): pass", 1, "tensorflow must be import"),
        ("export/a.py", "if T.TYPE_CHECKING: pass\nelse: import tensorflow", 2, "tensorflow must"),
        ("_math/backend.py", "import jax", 1, "jax must be imported inside a function"),
        ("_math/svd.py", "import importlib\nimportlib.import_module('jax')", 2, "_math -> jax"),
        ("base.py", "from keras.src import ops", 1, "keras.src is private"),
        ("base.py", "from keras import src", 1, "keras.src is private"),
        ("cli/a.py", "def f():\n  import keras.src.ops", 2, "keras.src is private"),
        ("base.py", "import keras as k\n\nk.src.ops.add", 3, "keras.src is private"),
    ],
)
def test_checker_reports(path, source, line, edge):
    (problem,) = problems_of(source, f"{PACKAGE}/{path}")
    assert problem.startswith(f"{PACKAGE}/{path}:{line}: ")
    assert edge in problem


def test_checker_reports_each_name_and_the_allowed_set():
    source = "from keras_compaware import base, training, recipe"
    assert problems_of(source, f"{PACKAGE}/compressors/a.py") == [
        f"{PACKAGE}/compressors/a.py:1: compressors -> {target} is not allowed; "
        "compressors may import _math, base"
        for target in ("training", "recipe")
    ]


@pytest.mark.parametrize(
    ("path", "source", "refused"),
    [
        ("apps/train.py", "from absl import app\nfrom keras_compaware import cli", []),
        ("apps/train.py", "from keras_compaware.cli import train", []),
        ("apps/train.py", "from keras_compaware import recipe", ["keras_compaware.recipe"]),
        ("apps/train.py", "import keras_compaware", ["keras_compaware"]),
        ("apps/train.py", "import sys\nimport absl", ["sys"]),
        ("apps/train.py", "import keras_compaware.client", ["keras_compaware.client"]),
        ("configs/a.py", "import ml_collections\nfrom configs import common", []),
        ("configs/a.py", "from . import common\nfrom .common import rules", []),
        ("configs/a.py", "from configs import digits", ["configs.digits"]),
        ("configs/a.py", "import keras\nimport keras_compaware", ["keras", "keras_compaware"]),
        ("benchmarks/a/run.py", "import os\nimport keras\nimport keras_compaware as kc", []),
        ("benchmarks/a/run.py", "from benchmarks.common import table\nimport numpy", []),
        ("benchmarks/a/run.py", "import tensorflow\nimport apps", ["tensorflow", "apps"]),
    ],
)
def test_checker_outside_the_package(path, source, refused):
    problems = problems_of(source, path)
    assert [problem.split(": ")[1].split(" ")[0] for problem in problems] == refused


def test_public_names_exist():
    package = importlib.import_module(PACKAGE)
    names = package.__all__
    assert len(set(names)) == len(names), "keras_compaware.__all__ repeats a name"
    missing = [name for name in names if not hasattr(package, name)]
    assert not missing, f"in keras_compaware.__all__ but not in the package: {missing}"


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX")
@pytest.mark.parametrize("hidden", [False, True], ids=["installed", "not installed"])
def test_package_does_not_need_tensorflow(hidden):
    # None in sys.modules makes an import fail as it does where the package is missing.
    program = f"""
import sys
if {hidden}:
    sys.modules["tensorflow"] = None
import {PACKAGE} as package
for name in package.__all__:
    getattr(package, name)
loaded = sorted(name for name in sys.modules if name.split(".")[0] == "tensorflow")
sys.exit(f"imported: {{loaded[:3]}}" if loaded and not {hidden} else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
