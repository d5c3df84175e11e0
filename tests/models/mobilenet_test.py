import keras
import numpy as np
import pytest

from keras_compaware.models import mobilenet_v2_small

# Channels that enter and leave every block.
BLOCKS = [(32, 16), (16, 24), (24, 24), (24, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
BLOCKS += [(64, 96), (96, 96)]


@pytest.mark.usefixtures("no_values")
def test_parameters():
    model = mobilenet_v2_small((32, 32, 3), 10)
    kernels, normalised = 9 * 3 * 32, 32
    for number, (before, after) in enumerate(BLOCKS):
        inner = before if number == 0 else 6 * before
        kernels += (0 if number == 0 else before * inner) + 9 * inner + inner * after
        normalised += (0 if number == 0 else inner) + inner + after
    kernels += 96 * 384
    normalised += 384
    assert model.count_params() == kernels + 4 * normalised + 384 * 10 + 10
    counts = {layer.name: layer.count_params() for layer in model.layers}
    assert counts["stage4_block1_expand"] == 32 * 192
    assert counts["stage4_block1_depthwise"] == 9 * 192
    assert counts["stage4_block1_project"] == 192 * 64


@pytest.mark.usefixtures("no_values")
def test_layers_and_their_names():
    model = mobilenet_v2_small((32, 32, 3), 10)
    names = [layer.name for layer in model.layers]
    first = ["depthwise", "depthwise_bn", "depthwise_relu", "project", "project_bn"]
    assert names[1:9] == [
        *("stem_conv", "stem_bn", "stem_relu"),
        *(f"stage1_block1_{part}" for part in first),
    ]
    parts = ["expand", "expand_bn", "expand_relu", *first]
    assert names[9:17] == [f"stage2_block1_{part}" for part in parts]
    assert names[17:26] == [f"stage2_block2_{part}" for part in (*parts, "add")]
    assert names[-5:] == ["last_conv", "last_bn", "last_relu", "average", "head"]
    # A shortcut wherever the shape stays.
    assert [name for name in names if name.endswith("_add")] == [
        *("stage2_block2_add", "stage3_block2_add", "stage3_block3_add"),
        *("stage4_block2_add", "stage4_block3_add", "stage5_block2_add"),
    ]


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(("side", "last"), [(32, 8), (8, 2), (7, 2), (1, 1)])
def test_sides_are_halved_twice(side, last):
    model = mobilenet_v2_small((side, side, 1), 10, alpha=0.25, expansion=2)
    assert model.get_layer("last_relu").output.shape == (None, last, last, 384)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(
    ("alpha", "stem", "stages", "last"),
    [
        (1.0, 32, (16, 24, 32, 64, 96), 384),
        # 0.5 * 24 = 12 is rounded up to 16; 0.35 * 32 = 11.2 to 16, for 8 is less than 0.9 * 11.2.
        (0.5, 16, (8, 16, 16, 32, 48), 384),
        (0.35, 16, (8, 8, 16, 24, 32), 384),
        (1.5, 48, (24, 40, 48, 96, 144), 576),
    ],
)
def test_the_width_multiplier(alpha, stem, stages, last):
    model = mobilenet_v2_small((8, 8, 3), 10, alpha=alpha)
    assert model.get_layer("stem_conv").filters == stem
    found = [model.get_layer(f"stage{i}_block1_project").filters for i in range(1, 6)]
    assert tuple(found) == stages
    assert model.get_layer("last_conv").filters == last


@pytest.mark.usefixtures("no_values")
def test_activations_end_at_six_and_bottlenecks_are_linear():
    model = mobilenet_v2_small((8, 8, 3), 10, alpha=0.25, expansion=2)
    rectifiers = [layer for layer in model.layers if isinstance(layer, keras.layers.ReLU)]
    assert {layer.max_value for layer in rectifiers} == {6.0}
    assert not any("project" in layer.name for layer in rectifiers)
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            assert not layer.use_bias
            assert layer.activation is keras.activations.linear


@pytest.mark.usefixtures("no_values")
def test_widths_and_dropout_are_arguments():
    model = mobilenet_v2_small((8, 8, 3), 5, expansion=1, dropout=0.5, name="mine")
    assert not any("expand" in layer.name for layer in model.layers)
    assert model.get_layer("dropout").rate == 0.5
    assert model.output_shape == (None, 5)
    assert model.name == "mine"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0}, "`alpha`"),
        ({"alpha": float("inf")}, "`alpha`"),
        ({"expansion": 0}, "`expansion`"),
        ({"dropout": 1}, "`dropout`"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        mobilenet_v2_small((8, 8, 1), 10, **kwargs)


def test_outputs_are_probabilities_and_the_model_can_be_saved(tmp_path):
    model = mobilenet_v2_small((8, 8, 3), 4, alpha=0.25, expansion=1)
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype("float32")
    outputs = model.predict(images, verbose=0)
    assert outputs.shape == (4, 4)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), outputs, atol=1e-6)
