"""Running .tflite files: predictions and latencies."""

import collections
import contextlib
import dataclasses
import gc
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_compaware.export._quiet import quiet

PathLike = str | os.PathLike[str]

_ROUND_SECONDS = 1e-3  # a timed round lasts at least this long, or the clock's steps would show


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time of one inference.

    Attributes:
        median_ms: median over the rounds, in milliseconds.
        p90_ms: 90th percentile over the rounds, in milliseconds.
        minimum_ms: fastest round, in milliseconds.
        repeats: number of rounds.
    """

    median_ms: float
    p90_ms: float
    minimum_ms: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms (p90 {self.p90_ms:.3f}, min {self.minimum_ms:.3f})"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output of a file: name, shape (None where it may be resized) and dtype."""

    name: str
    index: int
    shape: tuple[int | None, ...]
    dtype: np.dtype
    scale: float
    zero_point: int


class Program:
    """A .tflite file ready to run.

    Args:
        path: the file.
        num_threads: threads that one inference may use.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: neither LiteRT nor TensorFlow is installed.
        ValueError: the file is not a valid .tflite file.
    """

    def __init__(self, path: PathLike, *, num_threads: int = 1) -> None:
        if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
            raise ValueError(f"num_threads must be a positive integer, received {num_threads!r}.")
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f"There is no file {self.path!r}.")
        kind = _interpreter_class()
        try:
            with quiet():
                self.interpreter = kind(model_path=self.path, num_threads=num_threads)
                # Without a signature, the tensors' own names are used.
                runner = (
                    self.interpreter.get_signature_runner(_signature(self.interpreter))
                    if self.interpreter.get_signature_list()
                    else None
                )
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path!r} is not a valid .tflite file, or it is damaged. Export it again. "
                f"The interpreter says: {error}"
            ) from error
        if runner is None:
            self.inputs = [_info(d, d["name"]) for d in self.interpreter.get_input_details()]
            self.outputs = [_info(d, d["name"]) for d in self.interpreter.get_output_details()]
        else:
            self.inputs = [_info(d, n) for n, d in runner.get_input_details().items()]
            self.outputs = [_info(d, n) for n, d in runner.get_output_details().items()]
        self._shapes: tuple = ()

    @property
    def batch_size(self) -> int | None:
        """The batch size that the file fixes, or None where it may be chosen."""
        sizes = {info.shape[0] for info in self.inputs if info.shape} - {None}
        return max(sizes) if sizes else None

    def run(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            values: input name to array of real numbers (quantized inputs are quantized here).

        Returns:
            Output name to array (quantized outputs are dequantized here).

        Raises:
            RuntimeError: the file does not run on these shapes, or needs kernels that this
                interpreter lacks.
        """
        self.prepare({name: value.shape for name, value in values.items()})
        for info in self.inputs:
            self.interpreter.set_tensor(info.index, _quantized(values[info.name], info))
        self.interpreter.invoke()
        return {
            info.name: _dequantized(self.interpreter.get_tensor(info.index), info)
            for info in self.outputs
        }

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives the inputs their shapes and allocates, unless that is done already.

        Args:
            shapes: input name to shape.

        Raises:
            RuntimeError: the file does not take these shapes.
        """
        wanted = tuple(tuple(shapes[info.name]) for info in self.inputs)
        if wanted == self._shapes:
            return
        self._shapes = ()
        with quiet():
            for info, shape in zip(self.inputs, wanted, strict=True):
                if None in info.shape:
                    self.interpreter.resize_tensor_input(info.index, shape)
            try:
                self.interpreter.allocate_tensors()
            except ValueError as error:
                raise RuntimeError(str(error)) from error
        self._shapes = wanted


def predict(
    path: PathLike,
    x: Any,
    *,
    batch_size: int = 64,
    num_threads: int = 1,
    progress: bool = False,
) -> np.ndarray | dict[str, np.ndarray]:
    """Runs a .tflite file on arrays.

    Where the file fixes its batch size, or does not run on a larger one, the examples go through
    in batches of that size. Inputs of quantized files are quantized, outputs dequantized.

    Args:
        path: the file.
        x: an array of shape (num_examples, ...) for a file with one input. For several, a dict
            of input name to array; or a list, where shapes and dtypes say which array is whose
            (the converter does not keep the order of inputs, so positions say nothing).
        batch_size: examples per run, >= 1. The last batch may be smaller.
        num_threads: threads that one run may use, >= 1.
        progress: shows a progress bar.

    Returns:
        An array of shape (num_examples, ...) for a file with one output; otherwise a dict of
        output name to array.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: neither LiteRT nor TensorFlow is installed.
        RuntimeError: the file needs kernels that this interpreter lacks.
        ValueError: the file is damaged, or `x` does not fit its inputs.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, received {batch_size!r}.")
    program = Program(path, num_threads=num_threads)
    values = _named_inputs(program, x)
    num_examples = len(next(iter(values.values())))
    size = program.batch_size
    if size is None:
        size = batch_size if _runs_in_batches(program, values, batch_size) else 1
    bar = keras.utils.Progbar(num_examples) if progress else None
    pieces: dict[str, list[np.ndarray]] = {info.name: [] for info in program.outputs}
    for start in range(0, num_examples, size):
        batch = {name: value[start : start + size] for name, value in values.items()}
        length = min(size, num_examples - start)
        if program.batch_size is not None and length < size:
            batch = {name: _padded(value, size) for name, value in batch.items()}
        for name, value in program.run(batch).items():
            if value.ndim == 0 or len(value) not in (length, size):
                raise ValueError(
                    f"The output {name!r} of {program.path!r} has the shape {value.shape} for a "
                    f"batch of {size}; its first dimension is no batch dimension."
                )
            pieces[name].append(value[:length])
        if bar is not None:
            bar.update(start + length)
    results = {name: np.concatenate(parts) for name, parts in pieces.items()}
    return next(iter(results.values())) if len(results) == 1 else results


def latency(
    paths: Sequence[PathLike],
    *,
    num_threads: int = 1,
    repeats: int = 50,
    warmup: int = 5,
    batch_size: int = 1,
) -> dict[PathLike, Latency]:
    """Measures the time of one inference of several .tflite files, side by side.

    The files take turns, round by round, in alternating order, so that whatever else the machine
    does meets all of them alike: compare medians of one call of this function, not of two. A
    round of a fast model consists of as many inferences as fill a millisecond. Times are of the
    inference alone, without copying inputs in and outputs out.

    Args:
        paths: the files, each once.
        num_threads: threads that one inference may use, >= 1.
        repeats: timed rounds, >= 1.
        warmup: inferences before the first timed one, >= 0.
        batch_size: examples per inference, >= 1. A file that fixes another one is refused.

    Returns:
        Path (as given) to latency per inference of the whole batch.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: neither LiteRT nor TensorFlow is installed.
        RuntimeError: a file needs kernels that this interpreter lacks.
        ValueError: a file is damaged, has undefined dimensions besides the batch, or fixes
            another batch size; or an argument is out of range.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"Expected a list of paths, received the single path {paths!r}.")
    paths = list(paths)
    if len(set(paths)) != len(paths):
        raise ValueError(f"Expected every path once, received {paths!r}.")
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, received {value!r}.")
    programs = [_prepared(path, num_threads, batch_size) for path in paths]
    inner = [_num_inner(program, warmup) for program in programs]
    times: list[list[float]] = [[] for _ in programs]
    with _no_garbage_collection():
        for i in range(repeats):
            order = range(len(programs)) if i % 2 == 0 else reversed(range(len(programs)))
            for k in order:
                times[k].append(_seconds(programs[k], inner[k]) * 1e3)
    return {
        path: Latency(
            median_ms=statistics.median(samples),
            p90_ms=float(np.percentile(samples, 90)),
            minimum_ms=min(samples),
            repeats=repeats,
        )
        for path, samples in zip(paths, times, strict=True)
    }


def operators(path: PathLike) -> dict[str, int]:
    """Counts the operators in a .tflite file.

    Args:
        path: the file.

    Returns:
        Operator name ("CONV_2D"; custom ones by their own name, such as "FlexMatrixInverse") to
        count, over all subgraphs, most frequent first.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: neither LiteRT nor TensorFlow is installed.
        ValueError: the file is not a valid .tflite file.
    """
    Program(path)  # refuses missing and damaged files
    with open(path, "rb") as file:
        model = schema().Model.GetRootAs(file.read())
    codes = _operator_codes(model)
    counts: collections.Counter[str] = collections.Counter()
    for i in range(model.SubgraphsLength()):
        graph = model.Subgraphs(i)
        counts.update(
            codes[graph.Operators(k).OpcodeIndex()] for k in range(graph.OperatorsLength())
        )
    return dict(counts.most_common())


def tensor_names(content: bytes, kind: str, number: int) -> list[tuple[list[str], list[str]]]:
    """Finds operators of a .tflite file by their place.

    Args:
        content: the file.
        kind: name of the operator, as `operators` tells it.
        number: its place in its subgraph.

    Returns:
        For each subgraph that has such an operator there the names of its results, and those of
        the constants that it reads.
    """
    model = schema().Model.GetRootAs(content)
    codes = _operator_codes(model)
    found = []
    for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
        operator = graph.Operators(number) if number < graph.OperatorsLength() else None
        if operator is None or codes[operator.OpcodeIndex()] != kind:
            continue
        results = map(graph.Tensors, map(operator.Outputs, range(operator.OutputsLength())))
        places = map(operator.Inputs, range(operator.InputsLength()))
        read = [graph.Tensors(place) for place in places if place >= 0]
        # Data stand in their buffer, or behind the rest of the file.
        data = [model.Buffers(tensor.Buffer()) for tensor in read]
        constants = [t for t, of in zip(read, data, strict=True) if of.DataLength() or of.Size()]
        found.append(([t.Name().decode() for t in results], [t.Name().decode() for t in constants]))
    return found


def _operator_codes(model: Any) -> list[str]:
    """The names of the operators that a file uses, in the order of its table of them."""
    names = {value: name for name, value in vars(schema().BuiltinOperator).items()}
    found = []
    for code in map(model.OperatorCodes, range(model.OperatorCodesLength())):
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        custom = code.CustomCode()
        found.append(custom.decode() if custom else names.get(builtin, f"BUILTIN_{builtin}"))
    return found


def _interpreter_class() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        try:
            with quiet():
                from tensorflow.lite import Interpreter
        except ImportError as error:
            raise ImportError(
                "Running .tflite files needs LiteRT. Install it: pip install ai-edge-litert"
            ) from error
    return Interpreter


def schema() -> Any:
    """Returns the module of the classes that read a .tflite file."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError:
        with quiet():
            from tensorflow.lite.python import schema_py_generated
    return schema_py_generated


def _signature(interpreter: Any) -> str:
    keys = list(interpreter.get_signature_list())
    return "serving_default" if "serving_default" in keys else keys[0]


def _info(detail: Mapping[str, Any], name: str) -> TensorInfo:
    signature = detail.get("shape_signature", detail["shape"])
    scale, zero_point = detail["quantization"]
    return TensorInfo(
        name=name,
        index=detail["index"],
        shape=tuple(None if n < 0 else int(n) for n in signature),
        dtype=np.dtype(detail["dtype"]),
        scale=float(scale),
        zero_point=int(zero_point),
    )


def _quantized(value: np.ndarray, info: TensorInfo) -> np.ndarray:
    if info.scale and np.issubdtype(info.dtype, np.integer):
        limits = np.iinfo(info.dtype)
        value = np.round(value / info.scale) + info.zero_point
        value = np.clip(value, limits.min, limits.max)
    return np.ascontiguousarray(value, dtype=info.dtype)


def _dequantized(value: np.ndarray, info: TensorInfo) -> np.ndarray:
    if info.scale and np.issubdtype(info.dtype, np.integer):
        return ((value.astype(np.float32) - info.zero_point) * info.scale).astype(np.float32)
    return value


def _fits(value: np.ndarray, info: TensorInfo) -> bool:
    """Says whether an array fits an input, its number of examples aside."""
    if value.ndim != len(info.shape):
        return False
    pairs = zip(value.shape[1:], info.shape[1:], strict=True)
    return all(want is None or have == want for have, want in pairs)


def _named_inputs(program: Program, x: Any) -> dict[str, np.ndarray]:
    names = [info.name for info in program.inputs]
    expected = ", ".join(f"{info.name}: {info.shape} {info.dtype}" for info in program.inputs)
    if isinstance(x, Mapping):
        if set(x) != set(names):
            raise ValueError(
                f"Expected the inputs {sorted(names)} of {program.path!r}, received {sorted(x)}."
            )
        values = {name: np.asarray(x[name]) for name in names}
    elif isinstance(x, list | tuple):
        arrays = [np.asarray(value) for value in x]
        if len(arrays) != len(names):
            raise ValueError(
                f"{program.path!r} has {len(names)} inputs ({expected}), received {len(arrays)}. "
                "Stack the examples of a single input into one array."
            )
        values = _matched(program, arrays, expected)
    elif len(names) == 1:
        values = {names[0]: np.asarray(x)}
    else:
        raise ValueError(
            f"{program.path!r} has {len(names)} inputs; pass a dict with the keys {names}."
        )
    for info in program.inputs:
        value = values[info.name]
        if not _fits(value, info) or value.dtype.kind not in "fiub":
            raise ValueError(
                f"Expected an array that fits {expected} (the first dimension is the batch), "
                f"received {value.shape} {value.dtype} for {info.name!r}."
            )
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"Expected the same number >= 1 of examples everywhere, got {lengths}.")
    return values


def _matched(program: Program, arrays: list[np.ndarray], expected: str) -> dict[str, np.ndarray]:
    """Finds out which array is for which input, if there is only one way."""
    values: dict[str, np.ndarray] = {}
    for info in program.inputs:
        fitting = [a for a in arrays if _fits(a, info)]
        if len(fitting) > 1:
            alike = [a for a in fitting if a.dtype.kind == info.dtype.kind]
            fitting = alike or fitting
        if len(fitting) != 1:
            raise ValueError(
                f"It is not clear which of {[(a.shape, str(a.dtype)) for a in arrays]} is for the "
                f"input {info.name!r} (inputs: {expected}). Pass a dict of input name to array."
            )
        values[info.name] = fitting[0]
    if len({id(value) for value in values.values()}) != len(values):
        raise ValueError(
            f"One array would serve several inputs ({expected}). Pass a dict of input name to "
            "array."
        )
    return values


def _runs_in_batches(program: Program, values: dict[str, np.ndarray], batch_size: int) -> bool:
    """Tries the batch size on the first examples: some graphs fix what their inputs leave open."""
    if batch_size == 1:
        return False
    batch = {name: value[:batch_size] for name, value in values.items()}
    length = len(next(iter(batch.values())))
    try:
        outputs = program.run(batch)
    except RuntimeError:
        return False
    return all(value.ndim > 0 and len(value) == length for value in outputs.values())


def _padded(value: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([value, np.repeat(value[-1:], size - len(value), axis=0)])


def _prepared(path: PathLike, num_threads: int, batch_size: int) -> Program:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, received {batch_size!r}.")
    program = Program(path, num_threads=num_threads)
    random = np.random.default_rng(0)
    values = {}
    for info in program.inputs:
        if None in info.shape[1:]:
            raise ValueError(
                f"The input {info.name!r} of {program.path!r} has the shape {info.shape}; the "
                "latency depends on its undefined dimensions. Export the model with a full shape."
            )
        if info.shape and info.shape[0] not in (None, batch_size):
            raise ValueError(
                f"{program.path!r} takes batches of {info.shape[0]}, received "
                f"batch_size={batch_size}."
            )
        # In [0, 1): as an index it is 0, which every table has.
        values[info.name] = random.random((batch_size, *info.shape[1:])[: len(info.shape)])
    program.run(values)
    return program


def _num_inner(program: Program, warmup: int) -> int:
    for _ in range(warmup):
        program.interpreter.invoke()
    fastest = min(_seconds(program, 1) for _ in range(3))
    return max(1, math.ceil(_ROUND_SECONDS / max(fastest, 1e-7)))


def _seconds(program: Program, inner: int) -> float:
    invoke = program.interpreter.invoke
    start = time.perf_counter()
    for _ in range(inner):
        invoke()
    return (time.perf_counter() - start) / inner


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
