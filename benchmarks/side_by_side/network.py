"""What both sides share: the network, the order of the images, the lengths, the clock.

Imported by either side in its own environment: here `kit` is `keras` or `tf_keras`.
"""

import argparse
import pathlib
import time

import numpy as np

from keras_compaware import data

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
SPARSITIES = (50, 80, 90, 95)  # in percent
CLUSTERS = (16, 32)
FREQUENCY = 100  # steps between two updates of the zeros, the default of tfmot
CALIBRATION = 256
_WARM_UP = 150  # steps that are not timed: the first firing compiles


def worker_flags(what: str) -> argparse.Namespace:
    """Reads the flags with which `run` starts a worker of either side."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir")
    parser.add_argument("--time", action="store_true", help="only train, and write nothing")
    return parser.parse_args()


def network(kit):
    """Two convolutions with batch normalisation, and two dense layers: 207,066 parameters."""
    layers = kit.layers
    inputs = x = kit.Input((28, 28, 1))
    for number, filters in enumerate((16, 32), 1):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False, name=f"conv{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"norm{number}")(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(128, activation="relu", name="hidden")(layers.Flatten()(x))
    return kit.Model(inputs, layers.Dense(10, activation="softmax", name="head")(x))


def images(data_dir: str | None) -> data.Dataset:
    """Loads Fashion-MNIST, all of its training images for training."""
    return data.load("fashion_mnist", data_dir=data_dir, validation=0.0)


def scaled(split, index=slice(None)) -> np.ndarray:
    """Returns images as float32 in [0, 1]."""
    return split.images[index] * np.float32(1 / 255)


def in_order(split, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and labels of so many batches, the same for everyone with a seed."""
    random = np.random.default_rng(seed)
    needed, size = steps * BATCH_SIZE, len(split.labels)
    index = np.concatenate([random.permutation(size) for _ in range(-(-needed // size))])[:needed]
    return scaled(split, index), split.labels[index].astype("int64")


def fitted(kit, model, batches, optimizer, callbacks=None) -> float:
    """Trains a model over all batches once; returns seconds per step, without the first ones.

    `callbacks` makes them from the compiled model.
    """

    class Clock(kit.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.ended = batch, time.perf_counter()
            if batch == _WARM_UP:
                self.started = self.ended

    clock = Clock()
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        *batches,
        batch_size=BATCH_SIZE,
        shuffle=False,
        callbacks=[*(callbacks(model) if callbacks else ()), clock],
        verbose=0,
    )
    (first, started), (last, ended) = clock.started, clock.ended
    return (ended - started) / (last - first)


def adam(kit, steps: int):
    """The optimizer of all training: Adam, with a rate that falls to zero as a cosine."""
    return kit.optimizers.Adam(kit.optimizers.schedules.CosineDecay(LEARNING_RATE, steps))
