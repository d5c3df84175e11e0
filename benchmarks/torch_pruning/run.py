r"""Channels removed by Torch-Pruning and by this package, from the same ResNet-20.

The weights of a ResNet-20 that was trained on CIFAR-10 go into the same network in PyTorch. Both
sides cut it to a half and a quarter of its MACs, once with the same share of channels everywhere
and once with channels compared across the network, and train what is left for the same number of
steps on the same batches.

  KERAS_BACKEND=torch python -m benchmarks.torch_pruning.run --out=benchmarks/torch_pruning \
      --start=runs/deploy/resnet_20/start.keras --data_dir=DIR

The package torch-pruning is needed. `--start` is what `benchmarks.deploy.run` leaves. What
results.json has already is not run again; `--report` only prints the table.
"""

import argparse
import copy
import functools
import importlib.metadata
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

import keras_compaware as kc
from benchmarks.common import Steps, read_results, run_arms, table
from keras_compaware import data, measure

BATCH_SIZE = 64
LEARNING_RATE = 1e-3
RECALIBRATE_STEPS = 50
TARGETS = (0.5, 0.25)
ARMS = {
    "ours uniform": "the same share everywhere, l2 of the weights",
    "tp uniform": "Torch-Pruning: the same share everywhere, l2 of the weights",
    "ours budget": "budget by change of the outputs",
    "tp global": "Torch-Pruning: l2 of the weights, compared across the network",
}
TIMED = 5  # times that analysis and cut are timed


def augmented(dataset, number: int) -> Iterator:
    """Returns so many batches, mirrored and shifted, in the same order for everyone."""
    source = data.batches(dataset.train, BATCH_SIZE, seed=0, epoch=100, augment=data.flip_crop)
    return map(Steps(source, number).__getitem__, range(number))


# ---- PyTorch ----------------------------------------------------------------------------------


def in_torch(model: keras.Model):
    """Returns the ResNet-20 of `keras_compaware.models` with its weights as a plain module."""
    import torch
    from torch import nn

    def convolution(name):
        kernel = keras.ops.convert_to_numpy(model.get_layer(name).kernel)
        size, _, inputs, outputs = kernel.shape
        made = nn.Conv2d(inputs, outputs, size, model.get_layer(name).strides[0], bias=False)
        made.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        return made

    def normalisation(name):
        layer = model.get_layer(name)
        made = nn.BatchNorm2d(layer.gamma.shape[0], eps=layer.epsilon, momentum=0.1)
        values = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
        for own, value in zip(
            (made.weight, made.bias, made.running_mean, made.running_var), values, strict=True
        ):
            own.data = torch.tensor(keras.ops.convert_to_numpy(value).copy())
        return made

    def same(x, layer):
        """Pads as Keras does: what is left over goes to the right and to the bottom."""
        size, stride = layer.kernel_size[0], layer.stride[0]
        total = max(size - stride, 0) if x.shape[-1] % stride == 0 else size - 1
        return layer(nn.functional.pad(x, (total // 2, total - total // 2) * 2))

    class Block(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.conv1, self.bn1 = convolution(f"{name}_conv1"), normalisation(f"{name}_bn1")
            self.conv2, self.bn2 = convolution(f"{name}_conv2"), normalisation(f"{name}_bn2")
            self.cut = None
            if any(layer.name == f"{name}_shortcut_conv" for layer in model.layers):
                self.cut = convolution(f"{name}_shortcut_conv")
                self.cut_bn = normalisation(f"{name}_shortcut_bn")

        def forward(self, x):
            y = self.bn1(same(x, self.conv1)).relu()
            y = self.bn2(same(y, self.conv2))
            return (y + (x if self.cut is None else self.cut_bn(same(x, self.cut)))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.stem_bn = convolution("stem_conv"), normalisation("stem_bn")
            names = [f"stage{s}_block{b}" for s in (1, 2, 3) for b in (1, 2, 3)]
            self.blocks = nn.ModuleList(map(Block, names))
            kernel, bias = map(keras.ops.convert_to_numpy, model.get_layer("head").weights)
            self.head = nn.Linear(*kernel.shape)
            self.head.weight.data = torch.tensor(kernel.T.copy())
            self.head.bias.data = torch.tensor(bias.copy())

        def forward(self, x):
            x = self.stem_bn(same(x, self.stem)).relu()
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    return Network()


def to_channels_first(images):
    """Returns images as a PyTorch tensor."""
    import torch

    return torch.tensor(np.ascontiguousarray(np.transpose(images, (0, 3, 1, 2))))


def cut_by_torch_pruning(network, target: float, compare: bool):
    """Returns the network with as few channels as a share of the MACs asks for."""
    import torch
    import torch_pruning as tp

    network = copy.deepcopy(network).eval()
    example = torch.zeros(1, 3, 32, 32)
    whole, _ = tp.utils.count_ops_and_params(network, example)
    pruner = tp.pruner.BasePruner(
        network,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=compare,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=200,
        ignored_layers=[network.head],
    )
    while tp.utils.count_ops_and_params(network, example)[0] > target * whole:
        pruner.step()
    return network


def tuned_in_torch(network, dataset, steps: int):
    """Trains a network further, in PyTorch alone."""
    import torch

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average, as recalibration takes it
            module.reset_running_stats()
    network.train()
    with torch.no_grad():
        for images, _ in augmented(dataset, RECALIBRATE_STEPS):
            network(to_channels_first(images))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
    before = accuracy(in_batches(network), dataset.test)
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE, eps=1e-7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    network.train()
    for images, labels in augmented(dataset, steps):
        optimizer.zero_grad()
        outputs = network(to_channels_first(images))
        torch.nn.functional.cross_entropy(
            outputs, torch.tensor(labels, dtype=torch.long)
        ).backward()
        optimizer.step()
        schedule.step()
    return {"before": before, "after": accuracy(in_batches(network), dataset.test)}


def in_batches(network) -> Callable:
    """Returns a function from images to scores."""
    import torch

    def scores(images):
        network.eval()
        with torch.no_grad():
            return network(to_channels_first(images)).numpy()

    return scores


# ---- Keras ------------------------------------------------------------------------------------


def cut_by_us(model: keras.Model, target: float, batches, uniform: bool) -> keras.Model:
    """Returns the model with as few channels as a share of the MACs asks for."""
    how = {"solver": "uniform", "score": "l2"} if uniform else {}
    found = kc.fit_budget(model, None if uniform else batches, {"macs": target}, ranks=False, **how)
    return found.apply(model).model


def tuned_in_keras(model: keras.Model, dataset, steps: int) -> dict:
    """Trains a model further."""
    kc.recalibrate_batch_norm(model, augmented(dataset, RECALIBRATE_STEPS), RECALIBRATE_STEPS)
    before = accuracy(model.predict_on_batch, dataset.test)
    rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    for images, labels in augmented(dataset, steps):
        model.train_on_batch(images, labels)
    return {"before": before, "after": accuracy(model.predict_on_batch, dataset.test)}


# ---- both -------------------------------------------------------------------------------------


def accuracy(scores: Callable, split) -> float:
    """Returns the share of a split that is predicted right."""
    right = 0
    for begin in range(0, len(split.labels), 500):
        images = split.images[begin : begin + 500] * np.float32(1 / 255)
        right += np.sum(scores(images).argmax(-1) == split.labels[begin : begin + 500])
    return float(right / len(split.labels))


def run(arm: str, target: float, start: keras.Model, dataset, steps: int) -> dict:
    """Cuts the network, trains what is left, and returns what was measured."""
    side, how = arm.split()
    seconds = []
    if side == "tp":
        network = in_torch(start)
        example = dataset.test.images[:8] * np.float32(1 / 255)
        expected = start.predict_on_batch(example)
        scores = keras.ops.softmax(in_batches(network)(example))
        np.testing.assert_allclose(keras.ops.convert_to_numpy(scores), expected, atol=1e-4)
        for _ in range(TIMED):
            began = time.perf_counter()
            small = cut_by_torch_pruning(network, target, how == "global")
            seconds.append(time.perf_counter() - began)
        sizes = sizes_in_torch(small)
        found = tuned_in_torch(small, dataset, steps)
    else:
        batches = list(augmented(dataset, 4))
        for _ in range(TIMED):
            began = time.perf_counter()
            small = cut_by_us(start, target, batches, how == "uniform")
            seconds.append(time.perf_counter() - began)
        sizes = {"macs": measure.macs(small), "parameters": measure.parameters(small)}
        found = tuned_in_keras(small, dataset, steps)
    return {"cut_seconds": seconds, **sizes, **found}


def sizes_in_torch(network) -> dict:
    """Returns MACs of an image and parameters as `measure` counts them, statistics included."""
    import torch

    macs = []

    def note(module, inputs, outputs):
        macs.append(module.weight.numel() * outputs[0].numel() // outputs.shape[1])

    counted = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [
        module.register_forward_hook(note)
        for module in network.modules()
        if isinstance(module, counted)
    ]
    in_batches(network)(np.zeros((1, 32, 32, 3), "float32"))
    for hook in hooks:
        hook.remove()
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.ndim]
    return {"macs": sum(macs), "parameters": sum(tensor.numel() for tensor in tensors)}


def summary(results: dict) -> str:
    """Returns the table."""
    whole = results["arms"]["whole"]
    rows = [["whole", f"{whole['accuracy']:.2%}", "", *_sizes(whole), ""]]
    for target in TARGETS:
        for arm, name in ARMS.items():
            entry = results["arms"].get(f"{target} {arm}")
            if entry is None:
                rows.append([f"{target:g}: {name}", *["not run"] * 5])
                continue
            rows.append(
                [
                    f"{target:g}: {name}",
                    f"{entry['before']:.2%}",
                    f"{entry['after']:.2%}",
                    *_sizes(entry),
                    f"{statistics.median(entry['cut_seconds']):.2f}",
                ]
            )
    header = ["MACs left: how", "cut, recalibrated", "trained further", "MACs, M", "parameters"]
    return table([*header, "seconds to analyse and cut"], rows)


def about_whole(model: keras.Model, dataset) -> dict:
    """Returns sizes and accuracy of the network that all begin with."""
    return {
        "macs": measure.macs(model),
        "parameters": measure.parameters(model),
        "accuracy": accuracy(model.predict_on_batch, dataset.test),
        "torch-pruning": importlib.metadata.version("torch-pruning"),
    }


def _sizes(entry: dict) -> list[str]:
    return [f"{entry['macs'] / 1e6:.2f}", f"{entry['parameters']:,}"]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--start", type=pathlib.Path, help="a trained ResNet-20, a .keras file")
    parser.add_argument("--data_dir", help="TFDS folder")
    parser.add_argument("--tune", type=int, default=400, help="steps of further training")
    parser.add_argument("--report", action="store_true", help="only print the table")
    flags = parser.parse_args()
    path = flags.out / "results.json"
    settings = {"tune": flags.tune, "batch_size": BATCH_SIZE}
    results = read_results(path, settings)
    if not flags.report:
        if flags.start is None:
            parser.error("--start is missing")
        dataset = data.load("cifar10", data_dir=flags.data_dir)
        start = keras.models.load_model(flags.start, compile=False)
        arms = {"whole": functools.partial(about_whole, start, dataset)}
        for target in TARGETS:
            for arm in ARMS:
                arms[f"{target} {arm}"] = functools.partial(
                    run, arm, target, start, dataset, flags.tune
                )
        results = run_arms(path, settings, arms)
    print(summary(results))


if __name__ == "__main__":
    main()
