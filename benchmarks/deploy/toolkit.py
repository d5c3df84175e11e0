"""The files that TensorFlow's model optimization toolkit makes of the same dense weights.

Runs in an environment of its own, with tf_keras and tensorflow-model-optimization beside this
project, and TF_USE_LEGACY_KERAS=1; `benchmarks.deploy.run --toolkit_python=PATH` starts it.
"""

import argparse
import importlib
import pathlib

import numpy as np

from keras_compaware import data

# name of the file: what was done in training, how it is converted
FILES = {
    "tfmot-dense-float32": ("dense", "float32"),
    "tfmot-dense-dynamic_int8": ("dense", "dynamic_int8"),
    "tfmot-dense-int8": ("dense", "int8"),
    "tfmot-pruned-float32": ("pruned", "float32"),
    "tfmot-pruned-dynamic_int8": ("pruned", "dynamic_int8"),
    "tfmot-pruned-int8": ("pruned", "int8"),
    "tfmot-qat-int8": ("quantization-aware training", "int8"),
    "tfmot-pqat-int8": ("pruned, then quantization-aware training", "int8"),
}
SPARSITY = 0.8
BATCH_SIZE = 64


def residual(kit):
    """ResNet-20 of keras_compaware.models, with layers of the same names."""
    layers = kit.layers

    def convolved(x, filters, size, stride, name):
        convolution = layers.Conv2D(
            filters, size, stride, padding="same", use_bias=False, name=name.replace("*", "conv")
        )
        norm = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name.replace("*", "bn"))
        return norm(convolution(x))

    inputs = kit.Input((32, 32, 3))
    x = layers.ReLU()(convolved(inputs, 16, 3, 1, "stem_*"))
    for stage in (1, 2, 3):
        for block in (1, 2, 3):
            name = f"stage{stage}_block{block}"
            filters, stride = 8 * 2**stage, 2 if stage > 1 and block == 1 else 1
            shortcut = x
            if stride > 1:
                shortcut = convolved(x, filters, 1, stride, f"{name}_shortcut_*")
            y = layers.ReLU()(convolved(x, filters, 3, stride, f"{name}_*1"))
            y = convolved(y, filters, 3, 1, f"{name}_*2")
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    x = layers.GlobalAveragePooling2D()(x)
    return kit.Model(inputs, layers.Dense(10, activation="softmax", name="head")(x))


def with_weights(model, path: pathlib.Path):
    """Gives a model of tf_keras the weights of a file, by layer and name, and returns it."""
    with np.load(path) as saved:
        for layer in model.layers:
            names = [w.name.split("/")[-1].split(":")[0] for w in layer.weights]
            names = [name.removeprefix("depthwise_") for name in names]  # as Keras 3 calls it
            layer.set_weights([saved[f"{layer.name}/{name}"] for name in names])
    return model


class Trainer:
    """Trains a model of tf_keras for so many steps on the batches that the other forms see."""

    def __init__(self, kit, dataset, steps: int):
        self._kit, self._dataset, self._steps = kit, dataset, steps

    def __call__(self, model, callbacks=()):
        kit = self._kit
        if self._dataset is None:  # weights stay as they are; a step makes the masks
            model.compile(kit.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
            model.fit(*_noise(), batch_size=1, epochs=1, callbacks=list(callbacks), verbose=0)
            return model
        source = data.batches(
            self._dataset.train, BATCH_SIZE, seed=0, epoch=100, augment=data.flip_crop
        )
        steps = self._steps
        rate = kit.optimizers.schedules.CosineDecay(1e-3, steps)
        model.compile(kit.optimizers.Adam(rate), "sparse_categorical_crossentropy", ["accuracy"])

        def forever():
            while True:
                for number in range(len(source)):
                    yield source[number]
                source.epoch += 1

        model.fit(forever(), steps_per_epoch=steps, epochs=1, callbacks=list(callbacks), verbose=2)
        return model


def _noise():
    random = np.random.default_rng(0)
    return random.uniform(-1, 1, size=(2, 224, 224, 3)).astype("float32"), np.zeros(2, "int64")


def pruned(toolkit, model, train, steps: int):
    """Returns the model with zeros in all kernels, by the schedule that the other forms have."""
    sparsity = toolkit.sparsity.keras
    if steps:
        schedule = sparsity.PolynomialDecay(0.0, SPARSITY, 0, max(steps // 2, 10), frequency=10)
    else:
        schedule = sparsity.ConstantSparsity(SPARSITY, begin_step=0, frequency=1)
    wrapped = sparsity.prune_low_magnitude(model, pruning_schedule=schedule)
    return sparsity.strip_pruning(train(wrapped, [sparsity.UpdatePruningStep()]))


def quantization_aware(toolkit, model, train, scheme=None):
    """Returns the model after training with rounded weights and activations."""
    keras = toolkit.quantization.keras
    annotated = keras.quantize_annotate_model(model)
    with keras.quantize_scope():
        wrapped = keras.quantize_apply(annotated, *([scheme] if scheme else []))
    return train(wrapped)


def converted(tf, model, mode: str, examples) -> bytes:
    """Returns the .tflite file of a model of tf_keras."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if mode != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if mode == "int8" and examples is not None:
        converter.representative_dataset = lambda: ([image[None]] for image in examples)
    return converter.convert()


def main() -> None:
    """Makes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--tune", type=int, required=True)
    parser.add_argument("--data_dir")
    flags = parser.parse_args()
    tf, kit, toolkit = map(
        importlib.import_module, ("tensorflow", "tf_keras", "tensorflow_model_optimization")
    )
    small = flags.network == "resnet_20"
    build = residual if small else lambda kit: kit.applications.MobileNetV2(weights=None)
    dataset = data.load("cifar10", data_dir=flags.data_dir) if small else None
    examples = np.load(flags.folder / "examples.npy")
    train = Trainer(kit, dataset, flags.tune)
    steps = flags.tune if small else 0

    def start():
        model = with_weights(build(kit), flags.folder / "start.npz")
        expected = np.load(flags.folder / "start-outputs.npy")
        np.testing.assert_allclose(model.predict(examples[:8], verbose=0), expected, atol=1e-4)
        return model

    dense = train(start()) if small else start()
    thin = pruned(toolkit, start(), train, steps)
    scheme = toolkit.experimental.combine.Default8BitPrunePreserveQuantizeScheme()
    models = {
        "dense": lambda: dense,
        "pruned": lambda: thin,
        "quantization-aware training": lambda: quantization_aware(toolkit, start(), train),
        "pruned, then quantization-aware training": lambda: quantization_aware(
            toolkit, thin, train, scheme
        ),
    }
    for name, (form, mode) in FILES.items():
        aware = form.endswith("training")
        content = converted(tf, models[form](), mode, None if aware else examples)
        (flags.folder / f"{name}.tflite").write_bytes(content)
        print(name, len(content), flush=True)


if __name__ == "__main__":
    main()
