import keras
import numpy as np
import pytest

from keras_compaware.models import resnet_20, resnet_32, resnet_56, resnet_cifar


def parameters(model, trainable):
    weights = model.trainable_weights if trainable else model.weights
    return sum(int(np.prod(weight.shape)) for weight in weights)


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(
    ("function", "blocks", "published"),
    [(resnet_20, 3, 0.27), (resnet_32, 5, 0.46), (resnet_56, 9, 0.85)],
)
def test_the_depths_of_the_paper(function, blocks, published):
    model = function((32, 32, 3), 10)
    # 3x3 kernels: 2n of equal width a stage, but the first of stages 2 and 3 begins with half.
    kernels = 9 * (3 * 16 + 2 * blocks * 16 * 16)
    kernels += 9 * (16 * 32 + (2 * blocks - 1) * 32 * 32)
    kernels += 9 * (32 * 64 + (2 * blocks - 1) * 64 * 64)
    projections = 16 * 32 + 32 * 64
    normalised = 16 + 2 * blocks * (16 + 32 + 64) + 32 + 64
    head = 64 * 10 + 10
    assert parameters(model, True) == kernels + projections + 2 * normalised + head
    assert parameters(model, False) == kernels + projections + 4 * normalised + head
    # The paper's own, with shortcuts that have no parameters, in millions.
    own = parameters(model, True) - projections - 2 * (32 + 64)
    assert own / 1e6 == pytest.approx(published, abs=0.005)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert sum(layer.kernel_size == (3, 3) for layer in convolutions) == 6 * blocks + 1
    assert not any(layer.use_bias for layer in convolutions)
    for layer in convolutions:
        assert isinstance(layer.kernel_initializer, keras.initializers.HeNormal)
    assert model.name == function.__name__


@pytest.mark.usefixtures("no_values")
def test_layers_and_their_names():
    model = resnet_cifar((32, 32, 3), 10, depth=8)
    main = ["conv1", "bn1", "relu1", "conv2", "bn2", "add", "relu2"]
    names = {"image", "stem_conv", "stem_bn", "stem_relu"}
    names |= {f"stage{stage}_block1_{part}" for stage in (1, 2, 3) for part in main}
    names |= {f"stage{stage}_block1_shortcut_{part}" for stage in (2, 3) for part in ("conv", "bn")}
    assert {layer.name for layer in model.layers} == names | {"average", "head"}


@pytest.mark.usefixtures("no_values")
@pytest.mark.parametrize(("side", "sides"), [(32, (32, 16, 8)), (7, (7, 4, 2)), (1, (1, 1, 1))])
def test_stages_halve_the_sides_and_double_the_width(side, sides):
    model = resnet_cifar((side, side, 1), 4, depth=14, width=4)
    for stage, expected in enumerate(sides, start=1):
        for block in (1, 2):
            output = model.get_layer(f"stage{stage}_block{block}_add").output
            assert output.shape == (None, expected, expected, 4 * 2 ** (stage - 1))
    assert model.output_shape == (None, 4)


def test_a_block_adds_its_input_to_its_convolutions():
    model = resnet_cifar((8, 8, 1), 2, depth=8, width=4)
    start, branch, add, end = (
        model.get_layer(name)
        for name in ("stem_relu", *(f"stage1_block1_{part}" for part in ("bn2", "add", "relu2")))
    )
    assert [tensor.name for tensor in add.input] == [branch.output.name, start.output.name]
    # With a scale of zero a block is the identity on what a rectifier let through.
    branch.gamma.assign(np.zeros(4))
    parts = keras.Model(model.input, [start.output, end.output])
    images = np.random.default_rng(0).uniform(size=(2, 8, 8, 1)).astype("float32")
    before, after = parts.predict(images, verbose=0)
    assert before.max() > 0
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"depth": 18}, "such as 20, 32"), ({"depth": 2}, "Received: 2"), ({"width": 0}, "`width`")],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        resnet_cifar((8, 8, 1), 10, **kwargs)


def test_it_learns_and_survives_saving(tmp_path):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, size=64)
    images = generator.uniform(0, 0.5, size=(64, 8, 8, 1)).astype("float32")
    images[labels == 0, ::2] += 0.5
    images[labels == 1, :, ::2] += 0.5
    # Not narrower: of 4 channels, PyTorch 2.13 corrupts its memory on processors without AVX-512.
    model = resnet_cifar((8, 8, 1), 2, depth=8, width=8)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    history = model.fit(images, labels, epochs=10, batch_size=16, verbose=0).history
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    outputs = model.predict(images, verbose=0)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    np.testing.assert_allclose(loaded.predict(images, verbose=0), outputs, atol=1e-5)
