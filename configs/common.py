"""What the configurations of a data set share; an experiment adds its rules."""

from ml_collections import ConfigDict


def digits(model="lenet_300_100"):
    """scikit-learn's digits: 8 x 8 pixels, 811 training, 90 validation and 896 test images."""
    return _config("digits", model, epochs=60, batch_size=32)


def mnist(model="lenet_300_100"):
    """MNIST: 28 x 28 pixels, 54,000 training, 6,000 validation and 10,000 test images."""
    return _config("mnist", model, epochs=10, batch_size=128)


def fashion_mnist(model="lenet_300_100"):
    """Fashion-MNIST: 28 x 28 pixels, 54,000 training, 6,000 validation and 10,000 test images."""
    return _config("fashion_mnist", model, epochs=15, batch_size=128)


def cifar10(model="resnet_20"):
    """CIFAR-10: 32 x 32 x 3 pixels, 45,000 training, 5,000 validation and 10,000 test images.

    The training of residual networks by He et al. (2016): images are mirrored and shifted, 64,064
    steps of SGD with momentum, a tenth of the learning rate after half of them and again after
    three quarters. Momentum is Nesterov's, and the optimizer applies the weight decay itself: 1e-3
    is as strong as the paper's 1e-4, which acts in the loss and so through a momentum of 0.9.
    """
    config = _config("cifar10", model, epochs=182, batch_size=128)
    config.data.augment = "flip_crop"
    config.optimizer.update(
        {"name": "sgd", "learning_rate": 0.1, "schedule": "steps", "weight_decay": 1e-3}
    )
    return config


def family(label, budgets, **rule):
    """A family of a sweep: a rule, and budgets by what they are called."""
    entry = ConfigDict({"label": label, "rule": rule})
    entry.budgets = [{"label": name, **arguments} for name, arguments in budgets.items()]
    return entry


def frequency_families():
    """What is done how often: pruning, low rank, quantization, weight decay and weight noise.

    All kernels are treated but that of the output (`where` is None).
    """
    families = ConfigDict(sort_keys=False)
    families.pruning = family(
        "pruning",
        {"95 %": {"sparsity": 0.95}, "98 %": {"sparsity": 0.98}},
        compressor="MagnitudePruning",
    )
    families.low_rank = family(
        "low rank", {"1/8": {"ratio": 1 / 8}, "1/16": {"ratio": 1 / 16}}, compressor="LowRank"
    )
    families.binary_codes = family(
        "binary codes",
        {"2 bits": {"bits": 2}, "1 bit": {"bits": 1}},
        compressor="BinaryCodeQuantization",
        axis="outputs",
    )
    families.quantization = family(
        "uniform quantization",
        {"3 bits": {"bits": 3}, "2 bits": {"bits": 2}},
        compressor="UniformQuantization",
        axis="outputs",
    )
    families.weight_decay = family(
        "weight decay", {"1e-3": {"rate": 1e-3}, "1e-1": {"rate": 1e-1}}, compressor="WeightDecay"
    )
    families.weight_noise = family(
        "weight noise",
        {"0.005": {"stddev": 0.005}, "0.05": {"stddev": 0.05}},
        compressor="WeightNoise",
    )
    return families


def rule(**arguments):
    """One rule; see `keras_compaware.cli.config.recipe_of` for its keys."""
    return ConfigDict(arguments)


def _config(data, model, epochs, batch_size):
    config = ConfigDict()
    config.data = ConfigDict({"name": data, "validation": 0.1})
    config.model = model
    config.model_args = ConfigDict()
    config.init_from = ""
    config.epochs = epochs
    config.batch_size = batch_size
    config.seed = 0
    config.optimizer = ConfigDict(
        {"name": "adam", "learning_rate": 1e-3, "schedule": "cosine", "weight_decay": 0.0}
    )
    config.rules = ConfigDict(sort_keys=False)  # in the order in which they are written
    config.channels = ConfigDict(sort_keys=False)
    config.shrink = ConfigDict()
    config.recalibrate_steps = 100
    return config
