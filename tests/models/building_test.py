import pathlib
import zipfile

import keras
import numpy as np
import pytest

from keras_compaware import models
from keras_compaware.models import build, names

SHAPE, NUM_CLASSES = (8, 8, 1), 10
NAMES = (
    *("lenet_300_100", "lenet_5", "small_cnn"),
    *("resnet_20", "resnet_32", "resnet_56", "mobilenet_v2_small"),
)


def linear(input_shape=SHAPE, num_classes=NUM_CLASSES):
    return keras.Sequential(
        [keras.Input(input_shape), keras.layers.Flatten(), keras.layers.Dense(num_classes)]
    )


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that `build` can import, and returns its name."""
    (tmp_path / "own_models.py").write_text(
        """
import keras

def linear(input_shape, num_classes, bias=True):
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Flatten(),
            keras.layers.Dense(num_classes, use_bias=bias),
        ]
    )

def too_wide(input_shape, num_classes):
    return linear(input_shape, num_classes + 1)

def unbuilt(input_shape, num_classes):
    return keras.Sequential([keras.layers.Dense(num_classes)])

def two_outputs(input_shape, num_classes):
    x = keras.Input(input_shape)
    y = keras.layers.Dense(num_classes)(keras.layers.Flatten()(x))
    return keras.Model(x, [y, y])

def nothing(input_shape, num_classes):
    pass

number = 3
"""
    )
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "own_models"


def test_names_are_those_of_the_functions_that_the_package_exports():
    assert names() == NAMES
    for name in names():
        assert name in models.__all__
        assert getattr(models, name).__name__ == name


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize("name", NAMES)
def test_a_known_name_builds(name):
    model = build(name, (28, 28, 1), 7)
    assert isinstance(model, keras.Model)
    assert model.name == name
    assert model.input_shape == (None, 28, 28, 1)
    assert model.output_shape == (None, 7)


def test_further_arguments_reach_the_function():
    assert build("lenet_300_100", SHAPE, 10, units=(5,)).get_layer("dense1").units == 5


@pytest.mark.parametrize(
    ("name", "hint"), [("small_cn", "Did you mean 'small_cnn'"), ("xyz", "Known names: lenet_300")]
)
def test_an_unknown_name_lists_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=hint) as caught:
        build(name, SHAPE, NUM_CLASSES)
    for known in names():
        assert known in str(caught.value)


@pytest.mark.parametrize("as_text", [True, False])
def test_a_file_is_loaded_without_its_optimizer(tmp_path, as_text):
    model = linear()
    model.compile("adam", "mse")
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = build(str(path) if as_text else path, SHAPE, NUM_CLASSES)
    assert model.compiled
    assert not loaded.compiled
    images = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype("float32")
    received, expected = (part.predict(images, verbose=0) for part in (loaded, model))
    np.testing.assert_allclose(received, expected, atol=1e-6)


def test_a_file_that_takes_any_size_fits(tmp_path):
    path = tmp_path / "model.keras"
    inputs = keras.Input((None, None, 1))
    outputs = keras.layers.Dense(NUM_CLASSES)(keras.layers.GlobalAveragePooling2D()(inputs))
    keras.Model(inputs, outputs).save(path)
    assert build(path, SHAPE, NUM_CLASSES).output_shape == (None, NUM_CLASSES)


@pytest.mark.parametrize(
    ("shape", "num_classes", "message"),
    [
        ((9, 8, 1), 10, r"takes inputs of the shape \(8, 8, 1\), and the data has \(9, 8, 1\)"),
        ((8, 8), 10, r"the data has \(8, 8\)"),
        ((8, 8, 1), 9, r"output has the shape \(10,\), and 9 classes need \(9,\)"),
    ],
)
def test_a_file_that_does_not_fit_the_data_is_refused(tmp_path, shape, num_classes, message):
    path = tmp_path / "model.keras"
    linear().save(path)
    with pytest.raises(ValueError, match=message) as caught:
        build(path, shape, num_classes)
    assert str(path) in str(caught.value)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no model")


def not_json(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{")
        archive.writestr("metadata.json", "{}")


@pytest.mark.parametrize("damage", [truncated, empty, other_zip, not_json])
def test_a_damaged_file_gives_one_clear_error(tmp_path, damage):
    path = tmp_path / "model.keras"
    linear().save(path)
    damage(path)
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        build(path, SHAPE, NUM_CLASSES)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path):
    path = tmp_path / "model.keras"
    inputs = keras.Input(SHAPE)
    outputs = keras.layers.Dense(NUM_CLASSES)(keras.layers.Flatten()(inputs))
    outputs = keras.layers.Lambda(lambda x: x * 2, output_shape=(NUM_CLASSES,))(outputs)
    keras.Model(inputs, outputs).save(path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        build(path, SHAPE, NUM_CLASSES)


def test_a_missing_file_and_superfluous_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.keras"):
        build(tmp_path / "none.keras", SHAPE, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"no further arguments.*units"):
        build(tmp_path / "none.keras", SHAPE, NUM_CLASSES, units=3)
    with pytest.raises(ValueError, match=r"ends in \"\.keras\""):
        build("model.h5", SHAPE, NUM_CLASSES)


def test_a_function_of_ones_own(module):
    model = build(f"{module}:linear", SHAPE, NUM_CLASSES, bias=False)
    assert model.output_shape == (None, NUM_CLASSES)
    assert not model.layers[-1].use_bias


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("linaer", ValueError, "no function 'linaer'. Did you mean 'linear'"),
        ("number", TypeError, "names a int"),
        ("nothing", TypeError, "returned: NoneType"),
        ("too_wide", ValueError, r"output has the shape \(11,\)"),
        ("unbuilt", ValueError, "known shapes"),
        ("two_outputs", ValueError, "one input and one output"),
    ],
)
def test_functions_that_will_not_do(module, function, error, message):
    with pytest.raises(error, match=message):
        build(f"{module}:{function}", SHAPE, NUM_CLASSES)


def test_a_module_that_is_not_there_and_one_that_fails(module):
    with pytest.raises(ValueError, match=r"no module 'own_modles'.*PYTHONPATH"):
        build("own_modles:linear", SHAPE, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"no module 'own_models.sub'"):
        build("own_models.sub:linear", SHAPE, NUM_CLASSES)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        build("own_broken:linear", SHAPE, NUM_CLASSES)
    for spec in (":linear", ".relative:linear"):
        with pytest.raises(ValueError, match=r'"package\.module:function"'):
            build(spec, SHAPE, NUM_CLASSES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, SHAPE, 10), TypeError, "`spec`.*int"),
        (("small_cnn", 8, 10), TypeError, "`input_shape`"),
        (("small_cnn", (), 10), ValueError, "`input_shape`"),
        (("small_cnn", (8, 0, 1), 10), ValueError, "`input_shape`"),
        (("small_cnn", SHAPE, 0), ValueError, "`num_classes`"),
        (("small_cnn", SHAPE, 2.5), ValueError, "`num_classes`"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build(*arguments)


def test_a_path_object_is_no_registered_name():
    with pytest.raises(ValueError, match=r"no model 'small\.cnn'"):
        build(pathlib.Path("small.cnn"), SHAPE, NUM_CLASSES)
