"""Whether budgets are met: what `fit_budget` leaves of whole architectures, and whether it runs.

Random weights, told from the weights alone: nothing is trained, so nothing is said of accuracy.
Every smaller model is built and counted, and converted to a LiteRT file that is run and compared.

  KERAS_BACKEND=tensorflow python -m benchmarks.budgets.met --out=benchmarks/budgets
"""

import argparse
import itertools
import json
import os
import pathlib
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

import keras_compaware as kc
from benchmarks.common import environment, table, write_results
from keras_compaware import export, measure

TARGETS = (("macs", 0.5), ("macs", 0.25), ("params", 0.5), ("bytes", 0.5))
MULTIPLES = (1, 8)
TOLERANCE = 0.02


def vision_transformer() -> keras.Model:
    """Builds the width and heads of ViT-Ti (Touvron et al., 2021), half as deep, for 32 x 32."""
    images = keras.Input((32, 32, 3))
    x = layers.Reshape((64, 192))(layers.Conv2D(192, 4, strides=4, name="patches")(images))
    for i in range(6):
        y = layers.LayerNormalization(name=f"{i}_norm_1")(x)
        x = layers.Add()([x, layers.MultiHeadAttention(3, 64, name=f"{i}_attention")(y, y)])
        y = layers.LayerNormalization(name=f"{i}_norm_2")(x)
        y = layers.Dense(768, "gelu", name=f"{i}_up")(y)
        x = layers.Add()([x, layers.Dense(192, name=f"{i}_down")(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(name="norm")(x))
    return keras.Model(images, layers.Dense(1000, name="head")(x), name="vit")


MODELS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "ViT")
OF_BYTES = ("MobileNetV2", "ViT")  # each of these budgets takes up to nine conversions


def build(name: str) -> keras.Model:
    """Returns a model with random weights, without the softmax at its end."""
    keras.utils.set_random_seed(0)
    if name == "ViT":
        return vision_transformer()
    kind = getattr(keras.applications, name)
    return kind(weights=None, input_shape=(32, 32, 3), classifier_activation=None)


def measured(name: str, kind: str, fraction: float, round_to: int, folder: str) -> dict:
    """Spends one budget, and returns what is left of the model that is really built."""
    model = build(name)
    files = {side: os.path.join(folder, f"{side}.tflite") for side in ("whole", "small")}
    limit = fraction
    if kind == "bytes":
        limit *= export.to_litert(model, files["whole"]).bytes
    started = time.perf_counter()
    found = kc.fit_budget(model, None, {kind: limit}, round_to=round_to)
    seconds = time.perf_counter() - started
    small = found.apply(model).model
    result = export.to_litert(small, files["small"])
    if kind == "bytes":
        predicted, left = None, result.bytes * fraction / limit
    else:
        count = {"macs": measure.macs, "params": measure.parameters}[kind]
        predicted, left = found.costs[kind][1] / found.costs[kind][0], count(small) / count(model)
    return {
        "name": name,
        "kind": kind,
        "fraction": fraction,
        "round_to": round_to,
        "predicted": predicted,
        "left": left,
        "num_spaces": len(found.keep),
        "num_ranks": len(found.ranks),
        "seconds": seconds,
        "litert_error": result.max_error,
    }


def summary(rows: list[dict]) -> str:
    """Returns the table in Markdown."""
    cells = [
        [
            f"{row['name']}, {row['kind']}",
            f"{row['fraction']:.0%}",
            str(row["round_to"]),
            f"{row['left']:.2%}",
            "yes" if -TOLERANCE <= row["left"] / row["fraction"] - 1 <= 1e-9 else "no",
            f"{row['num_spaces']} / {row['num_ranks']}",
            f"{row['seconds']:.1f} s",
            f"{row['litert_error']:.0e}",
        ]
        for row in rows
    ]
    header = ["", "budget", "multiples of", "left", "within 2 % below"]
    header += ["spaces cut / kernels factorised", "search", "LiteRT error"]
    return table(header, cells)


def main() -> None:
    """Runs the benchmark, or prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="folder of met.json")
    parser.add_argument("--only", default=",".join(MODELS), help="names of models")
    parser.add_argument("--kinds", default="macs,params,bytes", help="kinds of budgets")
    parser.add_argument("--report", action="store_true", help="only print the table")
    flags = parser.parse_args()
    path = flags.out / "met.json" if flags.out else None
    if flags.report:
        print(summary(json.loads(path.read_text())["rows"]))
        return
    known = json.loads(path.read_text())["rows"] if path and path.exists() else []
    rows = {_key(row): row for row in known}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, fraction, round_to in _grid():
            if name not in flags.only.split(",") or kind not in flags.kinds.split(","):
                continue
            row = measured(name, kind, fraction, round_to, folder)
            rows[_key(row)] = row
            keras.utils.clear_session()
            print(summary([row]).splitlines()[-1], flush=True)
    if path is not None:
        ordered = [rows[key] for key in _grid() if key in rows]
        write_results(path, {"environment": environment(), "rows": ordered})


def _key(row):
    return row["name"], row["kind"], row["fraction"], row["round_to"]


def _grid():
    """All budgets: name, kind, fraction, multiples."""
    return [
        (name, kind, fraction, round_to)
        for name, (kind, fraction), round_to in itertools.product(MODELS, TARGETS, MULTIPLES)
        if kind != "bytes" or name in OF_BYTES
    ]


if __name__ == "__main__":
    main()
