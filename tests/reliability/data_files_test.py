"""Archives of codes, reports, results of sweeps, allocations and configurations of any origin."""

import json
import os
import random
import resource
import shutil

import keras
import numpy as np
import pytest

import keras_compaware as kc
from keras_compaware.export import _archive
from tests.marks import slow_on_jax
from tests.reliability.hostile import damaged, flipped, mutated, truncated

TRIES = pytest.mark.parametrize(
    "seeds",
    [range(24), pytest.param(range(100, 500), marks=pytest.mark.slow)],
    ids=["fast", "slow"],
)
on_tensorflow = pytest.mark.tensorflow  # the programs need its exporter


# ---- archives of codes


def model():
    return keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, name="pruned"),
            keras.layers.Dense(16, name="small"),
            keras.layers.Dense(16, name="grid"),
            keras.layers.Dense(3, name="head"),
        ]
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A sound archive: its bytes."""
    prune_and_cluster = kc.Chain((kc.MagnitudePruning(0.5), kc.WeightClustering(4)))
    recipe = kc.Recipe(
        [
            kc.Rule("pruned", kc.AtEnd(prune_and_cluster)),
            kc.Rule("small", kc.AtEnd(kc.Chain((kc.LowRank(rank=2), kc.UniformQuantization(8))))),
            kc.Rule("grid", kc.AtEnd(kc.BinaryCodeQuantization(2))),
        ]
    )
    keras.utils.set_random_seed(0)
    path = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    kc.export.save_codes(kc.compress(model(), recipe), recipe, path)
    return path.read_bytes()


@slow_on_jax
@TRIES
def test_damaged_archives_of_codes(archive, tmp_path, seeds):
    path = tmp_path / "bad.safetensors"
    for seed in seeds:
        dice = random.Random(seed)
        path.write_bytes((truncated if seed % 2 else flipped)(archive, dice))
        with pytest.raises(ValueError, match=r"bad\.safetensors") as caught:
            kc.export.load_codes(path)
        assert len(str(caught.value)) < 1000


@slow_on_jax
@TRIES
def test_archives_of_codes_with_another_header(archive, tmp_path, seeds):
    """A header changed on purpose, with the right digest: refused, or the kernels are sound."""
    header, tensors = _archive.parse(archive, "codes", 1, "it")
    header = {key: header[key] for key in header if key not in ("sha256", "format", "version")}
    path, whole = tmp_path / "bad.safetensors", model()
    before, refused = whole.get_weights(), 0
    for seed in seeds:
        dice = random.Random(seed)
        try:
            data = _archive.dump(mutated(header, dice), "codes", 1, tensors)
        except ValueError:  # NaN is not JSON
            continue
        path.write_bytes(data)
        for fitting in (None, whole):
            try:
                saved = kc.export.load_codes(path, fitting)
                kernels = [saved.kernel(name) for name in saved.codes]
            except ValueError:
                refused += 1
                for one, other in zip(whole.get_weights(), before, strict=True):
                    np.testing.assert_array_equal(one, other)
                continue
            assert all(
                kernel.shape == saved.codes[name].shape
                for kernel, name in zip(kernels, saved.codes, strict=True)
            )
            whole.set_weights(before)
    assert refused > len(seeds) / 2


@slow_on_jax
def test_headers_that_are_huge(archive, tmp_path):
    path = tmp_path / "bad.safetensors"
    deep = b'{"__metadata__":{"keras_compaware":"' + b"[" * 10**6 + b'"}}'
    for size, rest in ((2**63 - 1, archive[8:]), (2**40, b""), (len(deep), deep)):
        path.write_bytes(size.to_bytes(8, "little") + rest)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError, match=r"bad\.safetensors"):
            kc.export.load_codes(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


# ---- reports


def changed_report(sound, dice):
    return json.dumps(mutated(json.loads(sound), dice)).encode()


@on_tensorflow
@TRIES
def test_damaged_reports(programs, finished, tmp_path, seeds):
    """A report is shown, or refused in one line; so is the page."""
    run, page = tmp_path / "run", tmp_path / "page.html"
    run.mkdir()
    sound = (finished.path / "report.json").read_bytes()
    shown = 0
    for seed in seeds:
        (run / "report.json").write_bytes(damaged(sound, seed, changed_report))
        page.unlink(missing_ok=True)
        arguments = [f"--workdir={run}"] + ([f"--out={page}"] if seed % 8 == 2 else [])
        outcome = programs("report", *arguments)
        assert outcome.status in (0, 1), f"seed {seed}: {outcome}"
        if outcome.status:
            assert outcome.err.startswith("error: "), f"seed {seed}: {outcome}"
            assert len(outcome.err) < 1000, f"seed {seed}: {outcome}"
            assert not page.exists()
        shown += not outcome.status
    assert 0 < shown < len(seeds)


@on_tensorflow
@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 10**5, "", "null", "\x00"])
def test_reports_that_are_none(programs, tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    message = programs.fails("report", f"--workdir={tmp_path}")
    assert message.startswith(str(tmp_path / "report.json"))
    assert len(message) < 1000


# ---- sweeps


@pytest.fixture(scope="module")
def swept(write_sweep, tmp_path_factory):
    """A sweep's configuration file, and a folder with records as trials leave them."""
    from keras_compaware.cli import config_flag
    from keras_compaware.cli.sweep import SweepFolder
    from keras_compaware.cli.sweep_config import resolve
    from keras_compaware.search import expand

    file = write_sweep()
    config = resolve(config_flag.load(str(file)))
    folder = SweepFolder(tmp_path_factory.mktemp("swept"))
    folder.open(config, {"backend": "tensorflow"})
    for number, trial in enumerate(expand(config)):
        record = {**trial.to_json(), "attempt": 1, "status": "done", "seconds": 1.5}
        record |= {"validation": 0.5 + number / 100, "test": 0.5, "kernel_ratio": 0.5}
        record |= {"distortions": [[1, 0.5], [2, 0.25]], "distortion": 0.25, "sparsity": 0.5}
        folder.results.append(record)
    folder.results.append({**record, "status": "failed", "error": "ValueError: no"})
    return file, folder.path


def changed_results(sound, dice):
    lines = [json.loads(line) for line in sound.splitlines()]
    place = dice.randrange(len(lines))
    lines[place] = mutated(lines[place], dice)
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@on_tensorflow
@TRIES
def test_damaged_results_of_a_sweep(programs, swept, tmp_path, seeds, monkeypatch):
    from keras_compaware.reporting import plots

    monkeypatch.setattr(plots, "can_plot", lambda: False)  # drawing takes most of the time
    file, sound = swept
    folder = tmp_path / "sweep"
    shutil.copytree(sound, folder)
    good = (folder / "results.jsonl").read_bytes()
    shown = 0
    for seed in seeds:
        (folder / "results.jsonl").write_bytes(damaged(good, seed, changed_results))
        outcome = programs("sweep", f"--config={file}", f"--workdir={folder}", "--report")
        assert outcome.status in (0, 1), f"seed {seed}: {outcome}"
        if outcome.status:
            assert outcome.err.startswith(f"error: {folder / 'results.jsonl'}, line "), (
                f"seed {seed}: {outcome}"
            )
            assert len(outcome.err) < 1000, f"seed {seed}: {outcome}"
        shown += not outcome.status
    assert 0 < shown < len(seeds)


@on_tensorflow
@pytest.mark.parametrize(
    "text", ["{", "null", "[]", "{}", '{"config": {}, "identity": {}}', "[" * 9**5]
)
def test_a_sweep_that_is_none(programs, swept, tmp_path, text):
    file, sound = swept
    folder = tmp_path / "sweep"
    shutil.copytree(sound, folder)
    (folder / "sweep.json").write_text(text)
    for arguments in (["--report"], ["--workers=1"]):
        message = programs.fails("sweep", f"--config={file}", f"--workdir={folder}", *arguments)
        assert f"{folder / 'sweep.json'} is damaged" in message
        assert len(message) < 1000


# ---- allocations


@on_tensorflow
def test_damaged_allocations(programs, tmp_path):
    from tests.reliability.hostile import network

    model, sound, out = (tmp_path / name for name in ("in.keras", "sound.json", "out.keras"))
    network().save(model)
    programs.succeeds(
        "compact", f"--model={model}", f"--out={out}", "--target=macs=0.5", f"--allocation={sound}"
    )
    value, path, refused = json.loads(sound.read_text()), tmp_path / "bad.json", 0
    for seed in range(8):
        path.write_text(json.dumps(mutated(value, random.Random(seed))))
        out.unlink()
        outcome = programs("compact", f"--model={model}", f"--out={out}", f"--allocation={path}")
        if outcome.status:
            assert outcome.err.startswith("error: "), f"seed {seed}: {outcome}"
            assert "Traceback" not in outcome.err
            assert len(outcome.err) < 1000, f"seed {seed}: {outcome}"
            assert not out.exists()
            out.touch()
            refused += 1
    assert refused > 0


# ---- configurations


@on_tensorflow
def test_paths_of_configurations(programs, tmp_path, monkeypatch):
    """What is no Python file is refused; nothing is read from a pipe or a device."""
    work = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "binary.py").write_bytes(bytes(range(256)))
    (tmp_path / "zeros.py").write_bytes(b"\x00" * 100)
    (tmp_path / "deep.py").write_text("x = " + "(" * 5000)
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "device.py").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.py")
    names = ["binary.py", "zeros.py", "deep.py", "loop.py", "folder.py", "device.py", "pipe.py"]
    for name in [*names, "../none.py", "x" * 300 + ".py", "a\nb.py", ""]:
        message = programs.fails("train", f"--config={tmp_path / name}", work)
        assert message.startswith(f"--config={tmp_path / name}: "), message
        assert len(message) < 1000 + len(name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", float("nan")),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", "64"),
        ("seed", -1),
        ("seed", 0.5),
        ("model", 3),
        ("model", ""),
        ("model_args", [1]),
        ("model_args", {"units": "many"}),
        ("data", {"name": ""}),
        ("data", {"name": "digits", "validation": 1.5}),
        ("data", {"name": "digits", "validation": float("nan")}),
        ("data", {"name": "digits", "image_size": [0, 0]}),
        ("data", {"name": "digits", "augment": "no_such"}),
        ("optimizer", {"name": "no_such"}),
        ("optimizer", {"learning_rate": float("inf")}),
        ("optimizer", {"learning_rate": "fast"}),
        ("optimizer", {"learning_rate": -1.0}),
        ("optimizer", {"weight_decay": -1.0}),
        ("optimizer", {"schedule": 1}),
        ("rules", {"a": {}}),
        ("rules", {"a": 1}),
        ("rules", [1]),
        ("rules", {"a": {"every": 1, "compressor": "LowRank", "rank": 2, "wdith": 1}}),
        ("rules", {"a": {"every": 1, "compressor": "LowRank", "rank": True}}),
        ("rules", {"a": {"every": 1, "compressor": "LowRank", "rank": float("nan")}}),
        ("rules", {"a": {"every": "3 weeks", "compressor": "LowRank", "rank": 2}}),
        ("rules", {"a": {"every": 1, "compressor": "no_such"}}),
        ("rules", {"a": {"every": 1, "compressor": ["LowRank"]}}),
        ("rules", {"a": {"every": 1, "compressor": "LowRank", "rank": 2, "where": "("}}),
        ("channels", {"a": {"action": "Proximal", "regularizer": "GroupLasso"}}),
        ("shrink", {"budget": {"macs": 2.0}}),
        ("shrink", {"budget": "half"}),
        ("compact_at_epoch", 0),
        ("compact_at_epoch", True),
        ("recalibrate_steps", -1),
        ("init_from", 3),
        ("wdith", 1),
    ],
)
@on_tensorflow
def test_configurations_with_wrong_values(programs, write_config, tmp_path, key, value):
    """Refused before anything is trained or written, and the message names the key."""
    text = repr(value).replace("nan", "float('nan')").replace("inf", "float('inf')")
    values = {"data": "{'name': 'digits'}", "model": "'lenet_300_100'", "epochs": "2"}
    values["rules"] = "{'a': {'every': 5, 'compressor': 'LowRank', 'rank': 4}}"
    values[key] = text
    lines = ", ".join(f"'{name}': {value}" for name, value in values.items())
    file = write_config(content=f"def get_config():\n    return {{{lines}}}\n")
    message = programs.fails("train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert f"config.{key}" in message or key in message, message
    assert "--debug" not in message, message  # nobody has thought of it
    assert len(message) < 1000
    assert not (tmp_path / "run").exists()
