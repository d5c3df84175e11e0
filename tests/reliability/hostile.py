"""Files that were damaged or made to do harm."""

import io
import json
import random
import stat
import zipfile

import keras

VALUES = (
    *(None, True, -1, 0, 1, 3, 0.5, 10**9, 10**30, float("nan")),
    *("", "x", "../../x", [], {}, [1, 2], [[]], {"class_name": "Lambda"}),
)
"""What stands in the place of any value of a JSON file."""


def flipped(data, random, most=20):
    """Returns bytes with one to `most` bits changed."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 3, most))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def truncated(data, random):
    return data[: random.randrange(len(data))]


def mutated(value, random):
    """Returns a JSON value with one part of it removed, doubled or replaced by another."""
    value = json.loads(json.dumps(value))
    parts = []

    def walk(node):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            parts.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                walk(node[key])

    walk(value)
    node, key = random.choice(parts)
    kind = random.random()
    if kind < 0.15:
        del node[key]
    elif kind < 0.3:
        node[key] = [node[key], node[key]]
    else:
        node[key] = random.choice(VALUES)
    return value


def damaged(data, seed, changed):
    """Returns bytes cut off, with flipped bits, or, for every second pair of seeds, `changed`."""
    dice = random.Random(seed)
    return (truncated, flipped, changed, changed)[seed % 4](data, dice)


def unpacked(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(members, links=(), compression=zipfile.ZIP_STORED):
    """Returns an archive; names in `links` are symbolic links to what their content names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.compress_type = compression
            if name in links:
                member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, content)
    return file.getvalue()


def network():
    """A small compiled network with layers of several kinds, for images of the digits."""
    inputs = keras.Input((8, 8, 1), name="image")
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.layers.Dense(8, activation="relu", name="hidden")(x)
    model = keras.Model(inputs, keras.layers.Dense(10, name="head")(x), name="network")
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def hostile_model(data, seed):
    """Returns a damaged `.keras` file, and whether only its weights were changed."""
    dice = random.Random(seed)
    kind = ("cut", "flipped", "weights", "config")[seed % 4]
    if kind == "cut":
        return truncated(data, dice), False
    if kind == "flipped":
        return flipped(data, dice), False
    members = unpacked(data)
    if kind == "weights":
        content = flipped(members["model.weights.h5"], dice)
        return packed({**members, "model.weights.h5": content}), True
    config = mutated(json.loads(members["config.json"]), dice)
    return packed({**members, "config.json": json.dumps(config)}), False
