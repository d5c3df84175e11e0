"""Channel spaces and cuts of all architectures of keras.applications, and of some others.

Of every architecture, with random weights and for its smallest input: which channel spaces there
are and why some are frozen; what is left when at most half of the multiply-accumulates (MACs) are
kept; and whether the smaller model computes what the whole one computes when nothing is read from
the channels that were removed. Each is measured in a process of its own and written at once.

  KERAS_BACKEND=tensorflow python -m benchmarks.architectures.run

Backbones of KerasHub are measured where the package keras-hub is installed (the extra `hub`).
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_compaware as kc
from benchmarks.common import environment, table, write_results
from keras_compaware.coupling import ChannelSpaces

TOLERANCE = 1e-5  # of the outputs, for what is measured in float64
LIMITS = {False: 0.95, True: 0.85}  # least coverage, without and with layer normalisation
_ATTENTION = (layers.MultiHeadAttention, layers.GroupQueryAttention)
_RECURRENT = (layers.RNN, layers.Bidirectional)
_NORMALISATION = (layers.LayerNormalization, layers.RMSNormalization)
VOCABULARY = 64  # number of tokens of the networks that read text
_STEPS = 32
_WIDTH = 64
_BLOCKS = 2
_SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # pixels, of others 32
_LARGE = (
    "EfficientNetB6",
    "InceptionResNetV2",
    "EfficientNetB7",
    "EfficientNetV2L",
    "NASNetLarge",
    "ConvNeXtLarge",
    "ConvNeXtXLarge",
)
_MARKS = r"(<!-- report -->\n).*?(\n<!-- end of report -->)"


# ---- architectures ------------------------------------------------------------------------------

# In networks that are not in keras.applications, the layers that write the hidden units of an MLP
# are called `..._hidden`, and those of its gate `..._gate`.


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A network that is measured.

    Args:
        name: Its name in the table.
        build: Function without arguments that returns it, with random weights.
        round_to: What the numbers of kept channels are multiples of.
        is_application: Whether it is one of keras.applications.
    """

    name: str
    build: Callable[[], keras.Model]
    round_to: int
    is_application: bool


def architectures() -> dict[str, Architecture]:
    """Returns all by their names, in the order in which they are measured: large ones last."""
    names = [name for name in dir(keras.applications) if name[0].isupper()]
    names.sort(key=lambda name: (_LARGE.index(name) if name in _LARGE else -1, name))
    found = [Architecture(name, lambda n=name: application(n), 8, True) for name in names]
    others = {**OTHERS, **KERAS_HUB}  # so small that multiples of 8 would be coarse
    found += [Architecture(name, build, 1, False) for name, build in others.items()]
    return {architecture.name: architecture for architecture in found}


def application(name: str) -> keras.Model:
    """Builds a model of keras.applications for the smallest images that it takes.

    It returns logits: a softmax of random weights can hide how the outputs differ.
    """
    size = _SMALLEST.get(name, 32)
    kind = getattr(keras.applications, name)
    return kind(weights=None, input_shape=(size, size, 3), classifier_activation=None)


def vision_transformer() -> keras.Model:
    """Patches of a convolution, attention and MLPs, the class from the average over all patches."""
    images = keras.Input((32, 32, 3))
    x = layers.Conv2D(_WIDTH, 4, strides=4, name="patches")(images)
    x = layers.Reshape((64, _WIDTH), name="sequence")(x)
    for i in range(_BLOCKS):
        y = layers.LayerNormalization(name=f"{i}_norm_1")(x)
        y = layers.MultiHeadAttention(8, 8, name=f"{i}_attention")(y, y)
        x = layers.Add(name=f"{i}_add_1")([x, y])
        y = layers.LayerNormalization(name=f"{i}_norm_2")(x)
        x = layers.Add(name=f"{i}_add_2")([x, _mlp(y, i)])
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.GlobalAveragePooling1D(name="average")(x)
    return keras.Model(images, layers.Dense(10, name="head")(x), name="vit")


def bert() -> keras.Model:
    """An encoder of text, normalised after each addition; a logit for every token."""
    inputs, x = _embedded()
    x = layers.LayerNormalization(name="norm")(x)
    for i in range(_BLOCKS):
        y = layers.MultiHeadAttention(8, 8, name=f"{i}_attention")(x, x)
        x = layers.LayerNormalization(name=f"{i}_norm_1")(layers.Add(name=f"{i}_add_1")([x, y]))
        y = layers.Add(name=f"{i}_add_2")([x, _mlp(x, i)])
        x = layers.LayerNormalization(name=f"{i}_norm_2")(y)
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="head")(x), name="bert")


def _decoder(attention: Callable, name: str) -> keras.Model:
    """A causal decoder with RMS normalisation and gated MLPs; a logit for every token."""
    inputs, x = _embedded()
    for i in range(_BLOCKS):
        y = layers.RMSNormalization(name=f"{i}_norm_1")(x)
        y = attention(name=f"{i}_attention")(y, y, use_causal_mask=True)
        x = layers.Add(name=f"{i}_add_1")([x, y])
        y = layers.RMSNormalization(name=f"{i}_norm_2")(x)
        x = layers.Add(name=f"{i}_add_2")([x, _gated_mlp(y, i)])
    x = layers.RMSNormalization(name="norm")(x)
    return keras.Model(inputs, layers.Dense(VOCABULARY, name="head")(x), name=name)


def gpt() -> keras.Model:
    """A causal decoder with a head of keys and values for every head of queries."""
    return _decoder(lambda name: layers.MultiHeadAttention(8, 8, name=name), "gpt")


def grouped_decoder() -> keras.Model:
    """A causal decoder with 4 heads of keys and values for 8 heads of queries."""
    return _decoder(lambda name: layers.GroupQueryAttention(8, 8, 4, name=name), "gqa")


def recurrent(layer: Callable, name: str) -> keras.Model:
    """A stack of two recurrent layers on text, the class from the last state."""
    tokens = keras.Input((_STEPS,), dtype="int32", name="tokens")
    x = layers.Embedding(VOCABULARY, _WIDTH, name="embedding")(tokens)
    x = layer(name="0_recurrent", return_sequences=True)(x)
    x = layer(name="1_recurrent", return_sequences=False)(x)
    return keras.Model(tokens, layers.Dense(10, name="head")(x), name=name)


def convolutional_lstm() -> keras.Model:
    """Two layers of ConvLSTM2D on frames, between convolutions."""
    frames = keras.Input((4, 16, 16, 3))
    x = layers.TimeDistributed(layers.Conv2D(16, 3, name="stem"), name="stems")(frames)
    x = layers.ConvLSTM2D(16, 3, return_sequences=True, name="0_recurrent")(x)
    x = layers.ConvLSTM2D(16, 3, name="1_recurrent")(x)
    x = layers.Conv2D(16, 3, activation="relu", name="conv")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    return keras.Model(frames, layers.Dense(10, name="head")(x), name="convlstm")


def _embedded():
    """Returns the inputs, tokens and their positions, and the sum of what stands for them."""
    tokens = keras.Input((_STEPS,), dtype="int32", name="tokens")
    positions = keras.Input((_STEPS,), dtype="int32", name="positions")
    words = layers.Embedding(VOCABULARY, _WIDTH, name="words")(tokens)
    places = layers.Embedding(VOCABULARY, _WIDTH, name="places")(positions)
    return [tokens, positions], layers.Add(name="embedded")([words, places])


def _mlp(x, i):
    x = layers.Dense(4 * _WIDTH, activation="gelu", name=f"{i}_hidden")(x)
    return layers.Dense(_WIDTH, name=f"{i}_output")(x)


def _gated_mlp(x, i):
    gate = layers.Dense(3 * _WIDTH, activation="silu", name=f"{i}_gate")(x)
    x = layers.Dense(3 * _WIDTH, name=f"{i}_hidden")(x)
    x = layers.Multiply(name=f"{i}_gated")([gate, x])
    return layers.Dense(_WIDTH, name=f"{i}_output")(x)


def _lstm(**kwargs):
    return layers.LSTM(_WIDTH, **kwargs)


def _gru(**kwargs):
    return layers.GRU(_WIDTH, **kwargs)


def _bidirectional(name, return_sequences):
    return layers.Bidirectional(_lstm(return_sequences=return_sequences), name=name)


OTHERS = {
    "ViT": vision_transformer,
    "BERT": bert,
    "GPT with gated MLP": gpt,
    "GPT with grouped queries": grouped_decoder,
    "LSTM": lambda: recurrent(_lstm, "lstm"),
    "GRU": lambda: recurrent(_gru, "gru"),
    "Bidirectional LSTM": lambda: recurrent(_bidirectional, "bidirectional"),
    "ConvLSTM2D": convolutional_lstm,
}


def hub_backbone(name: str, **sizes) -> keras.Model:
    """A small backbone of KerasHub, with random weights, and logits behind it."""
    import keras_hub

    backbone = getattr(keras_hub.models, name)(**sizes)
    if isinstance(backbone.input, dict):
        inputs = {key: keras.Input((_STEPS,), dtype="int32", name=key) for key in backbone.input}
    else:
        inputs = keras.Input((32, 32, 3), name="images")
    x = backbone(inputs)
    x = x["pooled_output"] if isinstance(x, dict) else x
    if len(x.shape) == 4:
        x = layers.GlobalAveragePooling2D(name="average")(x)
    inputs = list(inputs.values()) if isinstance(inputs, dict) else inputs
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name=f"with_{backbone.name}")


_TEXT = {
    "vocabulary_size": VOCABULARY,
    "num_layers": _BLOCKS,
    "num_heads": 8,
    "hidden_dim": _WIDTH,
    "intermediate_dim": 4 * _WIDTH,
    "max_sequence_length": _STEPS,
}
_PATCHES = {
    "image_shape": (32, 32, 3),
    "patch_size": 4,
    "num_layers": _BLOCKS,
    "num_heads": 8,
    "hidden_dim": _WIDTH,
    "mlp_dim": 4 * _WIDTH,
}
_RESIDUAL = {
    "image_shape": (32, 32, 3),
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 128],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_strides": [1, 2],
    "block_type": "basic_block",
}
KERAS_HUB = {
    "KerasHub BERT": lambda: hub_backbone("BertBackbone", num_segments=VOCABULARY, **_TEXT),
    "KerasHub GPT-2": lambda: hub_backbone("GPT2Backbone", **_TEXT),
    "KerasHub ResNet": lambda: hub_backbone("ResNetBackbone", **_RESIDUAL),
    "KerasHub ViT": lambda: hub_backbone("ViTBackbone", **_PATCHES),
}


def reason_not_to_run(name: str) -> str | None:
    """Returns what a network lacks here, or None."""
    if name in KERAS_HUB and importlib.util.find_spec("keras_hub") is None:
        return "keras_hub is not installed"
    return None


# ---- measuring --------------------------------------------------------------------------------


def measure(architecture: Architecture, fraction: float) -> dict:
    """Measures one architecture.

    Args:
        architecture: What to measure.
        fraction: Of the MACs that may be left.

    Returns:
        Its row. What goes wrong stands there as `failure`, beside what was found before.
    """
    row = {"name": architecture.name, "is_application": architecture.is_application}
    try:
        _fill(row, architecture, fraction)
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {error}"
    return row


def _fill(row: dict, architecture: Architecture, fraction: float) -> None:
    _warm_up()
    model = randomise(architecture.build())
    row["input"] = ", ".join(" x ".join(map(str, t.shape[1:])) for t in model.inputs)
    row["layer_normalization"] = any(
        isinstance(layer, _NORMALISATION) for layer in model._flatten_layers()
    )
    spaces, row["analysis_seconds"] = timed(lambda: kc.channel_spaces(model))
    row["spaces"], row["free"] = len(spaces), len(spaces.free)
    row["frozen"] = collections.Counter(short(s.frozen) for s in spaces if s.frozen)
    row["coverage"] = spaces.coverage()
    row["offered"] = offered(model, spaces)
    row["parameters"] = kc.measure.parameters(model)
    row["macs"] = kc.measure.macs(model)
    counts = kc.measure.macs_by_layer(model).values()
    row["layers_without_macs"] = sum(count is None for count in counts)
    if not spaces.free:
        return
    budget, keep = choose(model, fraction, architecture.round_to)
    row["is_least"] = budget > fraction
    small, row["shrink_seconds"] = timed(lambda: kc.shrink(model, keep))
    row["parameters_after"] = kc.measure.parameters(small)
    row["macs_after"] = kc.measure.macs(small)
    if row["macs_after"] > budget * row["macs"]:
        raise AssertionError(f"{row['macs_after']:,} MACs are left, of the budget {budget}")
    inputs = example(model)
    whole, received = outputs(model, inputs), outputs(small, inputs)
    del small
    stop_reading(spaces, keep)
    expected = outputs(model, inputs)
    row["error"], row["effect"] = difference(received, expected), difference(whole, expected)
    if not row["error"] <= TOLERANCE:
        raise AssertionError(f"the outputs differ by {row['error']:.2g} of the largest")
    if keep and not row["effect"] > 10 * TOLERANCE:
        raise AssertionError("the outputs do not depend on the removed channels")


def _warm_up() -> None:
    """Loads what the first cut of a process loads."""
    warm = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.Dense(2)])
    kc.shrink(warm, {"a": [0, 1]})


def timed(call: Callable) -> tuple:
    """Returns what a function returns, and the wall and CPU seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives every weight random values: biases and statistics are not zero, scales not tiny."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        shape = tuple(variable.shape)
        if "float" not in variable.dtype:
            continue
        if variable.name in ("variance", "moving_variance", "gamma", "scale"):
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) > 1:
            value = rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
        else:
            value = rng.normal(size=shape) / 2
        variable.assign(value)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()  # it computes with constants made of its weights
    return model


def choose(model: keras.Model, fraction: float, round_to: int) -> tuple[float, dict]:
    """Chooses the channels that stay for a budget of MACs, or for the least one that can be met.

    Returns:
        `(budget, keep)`; the least budget is found in steps of one per cent.
    """

    def chosen(budget):
        return kc.choose_channels(model, "l2", {"macs": budget}, round_to=round_to)

    try:
        return fraction, chosen(fraction)
    except ValueError:  # it cannot be met; anything else is raised again at the end
        low, high = int(100 * fraction), 100
    while high - low > 1:
        middle = (low + high) // 2
        try:
            chosen(middle / 100)
            high = middle
        except ValueError:
            low = middle
    return high / 100, chosen(high / 100)


def example(model: keras.Model, seed: int = 0) -> list[np.ndarray]:
    """Returns a random batch of two."""
    rng = np.random.default_rng(seed)

    def one(tensor):
        shape = (2, *tensor.shape[1:])
        values = rng.integers(VOCABULARY, size=shape) if "int" in tensor.dtype else None
        values = rng.normal(size=shape) if values is None else values
        return values.astype(tensor.dtype)

    return [one(tensor) for tensor in model.inputs]


def outputs(model: keras.Model, inputs: list[np.ndarray]) -> np.ndarray:
    """Returns the only output of a model."""
    inputs = inputs[0] if len(inputs) == 1 else inputs
    return keras.ops.convert_to_numpy(model(inputs, training=False))


def stop_reading(spaces: ChannelSpaces, keep: dict) -> None:
    """Sets to zero what consumers read from all channels but those that are kept."""
    for name, kept in keep.items():
        dropped = np.ones(spaces[name].size, bool)
        dropped[kept] = False
        for member in spaces[name].members:
            if member.role == "consumer":
                kernel = np.array(keras.ops.convert_to_numpy(member.variable))
                entries = (member.index_map >= 0) & dropped[member.index_map]
                np.moveaxis(kernel, member.axis, 0)[entries] = 0
                member.variable.assign(kernel)


def difference(received: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference over the largest expected value."""
    return float(np.max(np.abs(received - expected)) / np.max(np.abs(expected)))


def offered(model: keras.Model, spaces: ChannelSpaces) -> list[dict]:
    """Tells of what a transformer or a recurrent network is made whether it can be cut.

    Returns:
        An entry for each layer of attention, of an MLP's hidden units and of recurrence: how many
        channels can be cut, or the reason why not.
    """
    found = []
    for layer in model.layers:
        if isinstance(layer, _ATTENTION):
            kind = "heads"
        elif isinstance(layer, _RECURRENT):
            kind = "recurrent units"
        elif layer.name.endswith(("_hidden", "_gate")):
            kind = "hidden units"
        else:
            continue
        found.append({"layer": layer.name, "kind": kind, **_written_by(layer, spaces)})
    return found


def _written_by(layer: layers.Layer, spaces: ChannelSpaces) -> dict:
    weights = {id(weight) for weight in layer.weights}
    for space in spaces:
        for member in space.members:
            if member.role == "producer" and id(member.variable) in weights:
                return {"channels": space.size, "reason": space.frozen}
    reasons = [space.frozen for space in spaces if f"'{layer.name}'" in (space.frozen or "")]
    return {"channels": 0, "reason": next(iter(reasons), "they are in no channel space")}


def short(reason: str) -> str:
    """Returns a reason without the names of layers and without what it says beyond the cause."""
    reason = re.sub(r"(, (which|of which|for its) |: (register_|write it)).*", "", reason)
    reason = re.sub(r"(model's input) '.*'", r"\1", reason)
    reason = re.sub(r"(?<!\w)'[^']*' \((\w+)\)", r"\1", reason)
    return re.sub(r"(?<!\w)'[^']*'", "a layer", reason).removeprefix("it is ")


def measure_elsewhere(name: str, fraction: float) -> dict:
    """As `measure`, in a fresh process; if it dies, that is the failure."""
    command = [sys.executable, "-m", "benchmarks.architectures.run"]
    command += [f"--measure={name}", f"--fraction={fraction}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {
        "name": name,
        "is_application": architectures()[name].is_application,
        "failure": f"the process ended with the status {done.returncode}",
    }


# ---- report -----------------------------------------------------------------------------------


def number(value: int) -> str:
    """Returns a number with a unit."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f} {unit}"
    return str(value)


def summary(rows: Iterable[dict]) -> str:
    """Returns the tables, what the other networks offer, and the rows below the limits."""
    rows = sorted(rows, key=lambda row: row["name"])
    applications = [row for row in rows if row["is_application"]]
    others = [row for row in rows if not row["is_application"]]
    parts = ["### keras.applications", _table(applications)]
    parts += ["### Other networks", _table(others), _offers(others), _verdict(rows)]
    return "\n\n".join(parts)


def _table(rows: list[dict]) -> str:
    header = ["architecture", "input", "free / spaces", "why the others are frozen", "coverage"]
    header += ["parameters", "MACs", "MACs left", "error", "analysis", "cutting"]
    return table(header, [_cells(row) for row in rows])


def _cells(row: dict) -> list[str]:
    cells = [row["name"], row.get("input", "")]
    if "coverage" in row:
        frozen = sorted(row["frozen"].items(), key=lambda item: (-item[1], item[0]))
        cells += [
            f"{row['free']} / {row['spaces']}",
            "; ".join(f"{count} x {reason}" for reason, count in frozen),
            f"{100 * row['coverage']:.1f} %",
        ]
    else:
        cells += [""] * 3
    macs = _before_and_after(row, "macs")
    if row.get("layers_without_macs"):
        macs += f", without {row['layers_without_macs']} layers"
    cells += [_before_and_after(row, "parameters"), macs]
    cells += [_left(row), f"{row['error']:.0e}" if "error" in row else ""]
    cells += [_seconds(row, "analysis_seconds"), _seconds(row, "shrink_seconds")]
    return cells


def _before_and_after(row: dict, field: str) -> str:
    values = [row[key] for key in (field, f"{field}_after") if key in row]
    return " → ".join(map(number, values))


def _left(row: dict) -> str:
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    if "failure" in row:
        return f"FAILED: {' '.join(row['failure'].split())}".replace("|", "\\|")
    if "macs_after" not in row:
        return "nothing to cut"
    least = " (the least)" if row["is_least"] else ""
    return f"{row['macs_after'] / row['macs']:.2f}{least}"


def _seconds(row: dict, field: str) -> str:
    return f"{row[field]['cpu']:.2f} s" if field in row else ""


def _offers(rows: list[dict]) -> str:
    lines = ["What can be cut in them:", ""]
    for row in rows:
        by_kind = collections.defaultdict(list)
        for entry in row.get("offered", ()):
            by_kind[entry["kind"]].append(entry)
        parts = []
        for kind, entries in by_kind.items():
            free = [entry for entry in entries if entry["reason"] is None]
            part = f"{kind} of {len(free)} of {len(entries)} layers"
            if free:
                part += f" ({', '.join(str(entry['channels']) for entry in free)})"
            reasons = dict.fromkeys(short(e["reason"]) for e in entries if e["reason"])
            if reasons:
                part += f", why not all: {', '.join(reasons)}"
            parts.append(part)
        nothing = "no layers of these kinds" if "offered" in row else "not measured"
        lines.append(f"- {row['name']}: {'; '.join(parts) or nothing}.")
    return "\n".join(lines)


def _verdict(rows: list[dict]) -> str:
    parts = []
    for normalised, limit in LIMITS.items():
        below = [
            f"{row['name']} ({100 * row['coverage']:.1f} %)"
            for row in rows
            if row.get("layer_normalization") is normalised and row["coverage"] < limit
        ]
        kind = "with" if normalised else "without"
        parts.append(
            f"Coverage below {100 * limit:.0f} % {kind} layer normalisation: "
            f"{', '.join(below) or 'none'}."
        )
    failed = [row["name"] for row in rows if "failure" in row]
    return " ".join([*parts, f"Failures: {', '.join(failed) or 'none'}."])


def report(out: pathlib.Path, results: dict) -> str:
    """Writes the tables into the README, between its two marks, and returns them."""
    text = summary(results["rows"].values())
    readme = out / "README.md"
    if readme.exists():
        old = readme.read_text("utf-8")
        new, found = re.subn(_MARKS, lambda m: f"{m[1]}{text}{m[2]}", old, flags=re.DOTALL)
        if not found:
            raise ValueError(f"{readme} lacks the marks between which the report belongs.")
        readme.write_text(new, "utf-8")
    return text


def main() -> None:
    """Runs the benchmark."""
    known = architectures()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=folder, help="folder of results.json")
    parser.add_argument("--only", help="names with commas between them, which are measured anew")
    parser.add_argument("--fraction", type=float, default=0.5, help="of the MACs that may be left")
    parser.add_argument("--report", action="store_true", help="write the tables, measure nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        keras.config.set_dtype_policy("float64")
        print(json.dumps(measure(known[flags.measure], flags.fraction)))
        return
    path = flags.out / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}
    for name in () if flags.report else wanted(known, flags.only, results["rows"]):
        print(f"{name} ...", file=sys.stderr, flush=True)
        reason = reason_not_to_run(name)
        if reason is None:
            results["rows"][name] = measure_elsewhere(name, flags.fraction)
        else:
            missing = {"name": name, "is_application": False, "not_run": reason}
            results["rows"].setdefault(name, missing)  # what was measured elsewhere stays
        results |= {"environment": environment(), "fraction": flags.fraction}
        write_results(path, results)
    print(report(flags.out, results))


def wanted(known: Iterable[str], only: str | None, rows: dict[str, dict]) -> list[str]:
    """Returns the names to measure: those asked for, or all without a row that is complete."""
    if only is None:
        again = {"failure", "not_run"}
        return [name for name in known if name not in rows or again & set(rows[name])]
    names = only.split(",")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"There is no architecture {unknown[0]!r}. Known: {', '.join(known)}.")
    return names


if __name__ == "__main__":
    main()
