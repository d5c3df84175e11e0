"""The configurations of configs/: each has known keys, and rules that fit its network."""

import pathlib

import pytest

from keras_compaware import models
from keras_compaware.cli.config import optimizer_of, recipe_of, resolve
from keras_compaware.cli.config_flag import load
from keras_compaware.cli.early import check as check_early
from keras_compaware.cli.early import epoch_of
from keras_compaware.cli.shrinking import check, settings_of

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"
SHAPES = {
    "digits": (8, 8, 1),
    "mnist": (28, 28, 1),
    "fashion_mnist": (28, 28, 1),
    "cifar10": (32, 32, 3),
}
FILES = sorted(file for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "common"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_configuration(file):
    config = resolve(load(str(file)))
    shape = SHAPES[config["data"]["name"]]
    model = models.build(config["model"], shape, 10, **config["model_args"])
    recipe = recipe_of(config, steps_per_epoch=100, total_steps=100 * config["epochs"])
    settings = settings_of(config)
    if settings is not None:
        check(model, settings)
    if recipe is None:
        assert settings is not None
        return
    assert recipe.plan(model).assignments
    if epoch_of(config) is not None:
        check_early(model, recipe)
    model = recipe.wrap(model)
    model.compile(recipe.optimizer(optimizer_of(config, total_steps=100)), "mse")
    assert recipe.callbacks(model)
