"""The program `evaluate`."""

import pathlib
import sys

import numpy as np
from absl import flags

from keras_compaware import data, export
from keras_compaware.cli import program
from keras_compaware.cli.files import load_model


def define_flags() -> None:
    """Defines the flags."""
    flags.DEFINE_string("model", None, "A .keras file, or a .tflite file, which LiteRT runs.")
    flags.DEFINE_string(
        "data", "digits", "Name of a TensorFlow Datasets image classification set, or digits."
    )
    flags.DEFINE_string(
        "data_dir",
        None,
        "Folder of TensorFlow Datasets. Default: $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    flags.DEFINE_list(
        "image_size", None, "Height,width in pixels to resize the images to. Default: as they are."
    )
    flags.DEFINE_enum("split", "test", ["test", "train"], "The split to evaluate on.")
    flags.DEFINE_integer("batch_size", 256, "Examples a batch.", lower_bound=1)


def main() -> None:
    """Prints the accuracy."""
    values = flags.FLAGS
    path = program.required("model")
    if not path.endswith((".keras", ".tflite")):
        raise program.UserError(f"--model must be a .keras or .tflite file. Received: {path}")
    if not pathlib.Path(path).is_file():
        raise program.UserError(f"--model: there is no file {path}")
    model = load_model(path) if path.endswith(".keras") else None
    dataset = data.load(
        values.data,
        data_dir=values.data_dir,
        validation=0.0,
        image_size=_image_size(values.image_size),
    )
    split = getattr(dataset, values.split)
    if model is None:
        scores = export.predict(
            path,
            split.images * np.float32(1 / 255),
            batch_size=values.batch_size,
            progress=sys.stdout.isatty(),
        )
    else:
        scores = model.predict(data.batches(split, values.batch_size), verbose=0)
    shape = getattr(scores, "shape", None)
    if shape != (len(split), dataset.num_classes):
        received = "several outputs" if shape is None else f"outputs of shape {shape}"
        raise program.UserError(
            f"{path} gives {received}; expected ({len(split)}, {dataset.num_classes}), a score for "
            f"each class of {dataset.name}"
        )
    correct = int(np.sum(np.argmax(scores, axis=-1) == split.labels))
    program.say(
        f"accuracy {100 * correct / len(split):.2f} %: {correct:,} of {len(split):,} examples of "
        f"{dataset.name} ({values.split}) right, {path}"
    )


def _image_size(sides: list[str] | None) -> tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) != 2 or not all(side.strip().isdigit() for side in sides):
        raise program.UserError(
            f"--image_size must be height,width in pixels, such as 32,32. "
            f"Received: {','.join(sides)}"
        )
    return int(sides[0]), int(sides[1])


def run() -> None:
    """Runs the program."""
    program.run(main, define_flags)
