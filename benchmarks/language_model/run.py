"""How often to compress a language model: perplexity against the period.

An LSTM is trained on the words of WikiText-2, of which the most frequent ones are its vocabulary.
From there on, all arms train for the same number of steps: without compression, with all kernels
overwritten by their compressed form every N steps (Lee et al., 2021), and straight-through; beside
them stands compression once after training. Every finished arm is in results.json, so the same
command goes on with a run that was interrupted.

  python -m benchmarks.language_model.run --out=benchmarks/language_model --text_dir=DIR

`DIR` holds train.txt, valid.txt and test.txt of WikiText-2 (word level, with <unk>); `--report`
prints the tables and draws the plot of results.json.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_compaware as kc
from benchmarks.common import (
    add_settings,
    compressed,
    kept,
    read_results,
    run_arms,
    settings_of,
    table,
)

COMPRESSORS = {
    "pruning, 80 %": kc.MagnitudePruning(0.8),
    "pruning, 90 %": kc.MagnitudePruning(0.9),
    "binary codes, 3 bits": kc.BinaryCodeQuantization(3, axis="outputs"),
    "binary codes, 2 bits": kc.BinaryCodeQuantization(2, axis="outputs"),
}
PANELS = {"pruning": "pruning", "codes": "binary codes"}
DENSE = "dense"
ONCE = "once, after training"
STRAIGHT_THROUGH = "straight-through"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all arms have in common; every field is a flag.

    Args:
        vocabulary: Number of the most frequent words of the training text; others are <unk>.
        units: Entries of an embedding, and units of the LSTM.
        length: Words of a window; the state begins at zero in each.
        eval_length: Words of a window in evaluation.
        eval_words: The first words of the other two splits that are evaluated on; 0 for all.
        batch: Windows of a step.
        pretrain: Steps of the training that all arms start from.
        steps: Steps of every arm after it.
        every: Periods, joined by commas.
        rate: Learning rate of Adam: constant at first, then down to a tenth by half a cosine.
        seed: Seed of the weights and of the order of the windows.
    """

    vocabulary: int = 5000
    units: int = 64
    length: int = 20
    eval_length: int = 100
    eval_words: int = 50_000
    batch: int = 16
    pretrain: int = 3000
    steps: int = 1000
    every: str = "1,10,100"
    rate: float = 2e-3
    seed: int = 0

    @property
    def periods(self) -> list[int]:
        """The periods as numbers."""
        return [int(text) for text in self.every.split(",")]


# ---- text -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Text:
    """The three splits as numbers of words.

    Args:
        train, valid, test: Arrays of the words' numbers.
        coverage: Share of the words of the training split that are in the vocabulary.
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    coverage: float


def read_text(folder: pathlib.Path, vocabulary: int) -> Text:
    """Reads the splits; words that are not among the most frequent become <unk>."""
    splits = {}
    for name in ("train", "valid", "test"):
        text = (folder / f"{name}.txt").read_text("utf-8")
        splits[name] = text.replace("\n", " <eos> ").split()
    most = collections.Counter(splits["train"]).most_common(vocabulary)
    numbers = {word: number for number, (word, _) in enumerate(most)}
    unknown = numbers["<unk>"]
    arrays = {
        name: np.array([numbers.get(word, unknown) for word in words], "int32")
        for name, words in splits.items()
    }
    return Text(**arrays, coverage=sum(count for _, count in most) / len(splits["train"]))


def windows(words: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns windows side by side, and of each the words that follow one by one."""
    number = (len(words) - 1) // length
    ends = number * length
    return words[:ends].reshape(number, length), words[1 : ends + 1].reshape(number, length)


def drawn(number: int, begin: int, end: int, seed: int) -> np.ndarray:
    """Returns which of so many windows are drawn from one place to another, epoch by epoch."""
    generator = np.random.default_rng(seed)
    epochs = [generator.permutation(number) for _ in range(-(-end // number))]
    return np.concatenate(epochs)[begin:end]


# ---- training ---------------------------------------------------------------------------------


def build(settings: Settings) -> keras.Model:
    """Returns the untrained language model, from words to logits of the next ones."""
    keras.utils.set_random_seed(settings.seed)
    inputs = keras.Input((None,), dtype="int32", name="words")
    x = layers.Embedding(settings.vocabulary, settings.units, name="embedding")(inputs)
    x = layers.LSTM(settings.units, return_sequences=True, name="lstm")(x)
    outputs = layers.Dense(settings.vocabulary, name="logits")(x)
    return keras.Model(inputs, outputs, name="language_model")


def fit(
    model: keras.Model,
    text: Text,
    settings: Settings,
    begin: int,
    steps: int,
    rate,
    recipe: kc.Recipe | None = None,
) -> keras.Model:
    """Trains on the windows of so many steps after the first `begin` ones; returns the model."""
    optimizer = keras.optimizers.Adam(rate, clipnorm=1.0)
    if recipe is not None:
        model, optimizer = recipe.wrap(model), recipe.optimizer(optimizer)
    compiled(model, optimizer)
    x, y = windows(text.train, settings.length)
    places = settings.batch * begin, settings.batch * (begin + steps)
    chosen = drawn(len(x), *places, settings.seed)
    callbacks = [] if recipe is None else recipe.callbacks(model)
    model.fit(
        x[chosen],
        y[chosen],
        batch_size=settings.batch,
        shuffle=False,
        callbacks=callbacks,
        verbose=0,
    )
    return model


def compiled(model: keras.Model, optimizer="sgd") -> keras.Model:
    """Compiles a model for the cross-entropy of the next word and returns it."""
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def perplexity(model: keras.Model, words: np.ndarray, length: int) -> float:
    """Returns the perplexity of a text, in windows that begin without a state."""
    x, y = windows(words, length)
    return math.exp(compiled(model).evaluate(x, y, batch_size=8, verbose=0))


def everywhere(action) -> kc.Recipe:
    """One action for all kernels: embedding, LSTM and output."""
    return kc.Recipe([kc.Rule(lambda target: True, action)])


def norm(model: keras.Model) -> float:
    """Returns the norm of all kernels together."""
    squares = [keras.ops.sum(t.read() ** 2) for t in kc.find_targets(model)[0]]
    return math.sqrt(sum(map(float, squares)))


def measured(model: keras.Model, text: Text, settings: Settings, before: float) -> dict:
    """Returns perplexities, and the norm of the kernels over that before."""
    found = {"norm": norm(model) / before}
    for split in ("valid", "test"):
        words = getattr(text, split)[: settings.eval_words or None]
        found[split] = perplexity(model, words, settings.eval_length)
    return found


# ---- arms -------------------------------------------------------------------------------------


def key(compressor: str, what: str | int) -> str:
    """Returns the name of an arm: a compressor, and a period or a baseline."""
    return f"{compressor}: {what if isinstance(what, str) else f'every {what}'}"


def arms(text: Text, settings: Settings, workdir: pathlib.Path) -> dict[str, Callable[[], dict]]:
    """Returns what runs every arm, baselines first."""

    def start():
        return kept(
            workdir / "start.keras",
            lambda: fit(build(settings), text, settings, 0, settings.pretrain, settings.rate),
        )

    def further(recipe=None):
        rate = keras.optimizers.schedules.CosineDecay(settings.rate, settings.steps, alpha=0.1)
        return fit(start(), text, settings, settings.pretrain, settings.steps, rate, recipe)

    def result(model):
        return measured(model, text, settings, norm(start()))

    def dense():
        return kept(workdir / "dense.keras", further)

    found = {"start": lambda: result(start()), DENSE: lambda: result(dense())}
    for name, compressor in COMPRESSORS.items():
        found[key(name, ONCE)] = lambda c=compressor: result(compressed(dense(), c))
    for name, what in itertools.product(COMPRESSORS, [*settings.periods, STRAIGHT_THROUGH]):
        compressor = COMPRESSORS[name]
        if what == STRAIGHT_THROUGH:
            recipe = everywhere(kc.StraightThrough(compressor))
        else:
            recipe = everywhere(kc.Every(what, compressor))
        found[key(name, what)] = lambda r=recipe: result(further(r))
    return found


# ---- report -----------------------------------------------------------------------------------


def best_period(found: Mapping, compressor: str, periods: Sequence[int]) -> int | None:
    """Returns the period with the lowest perplexity on the validation split, if all have run."""
    if any(key(compressor, period) not in found for period in periods):
        return None
    return min(periods, key=lambda period: found[key(compressor, period)]["valid"])


def summary(results: Mapping, periods: Sequence[int]) -> str:
    """Returns the tables in Markdown."""
    found = results["arms"]

    def cell(name, field="test"):
        digits = 2 if field == "norm" else 1
        return f"{found[name][field]:.{digits}f}" if name in found else "not run"

    whats = [*periods, STRAIGHT_THROUGH, ONCE]
    titles = [what if isinstance(what, str) else f"every {what}" for what in whats]
    rows, norms = [], []
    for name in COMPRESSORS:
        best = best_period(found, name, periods)
        cells = [cell(key(name, what)) for what in whats]
        rows.append(
            [
                name,
                *(f"**{c}**" if w == best else c for w, c in zip(whats, cells, strict=True)),
            ]
        )
        norms.append([name, *(cell(key(name, what), "norm") for what in whats)])
    return "\n\n".join(
        [
            f"Test perplexity; without compression {cell(DENSE)}, where all arms start "
            f"{cell('start')}. In bold, the period that is best on the validation split:",
            table(["", *titles], rows),
            "Norm of the kernels over that at the start; without compression "
            f"{cell(DENSE, 'norm')}:",
            table(["", *titles], norms),
        ]
    )


def plot(results: Mapping, periods: Sequence[int], path: pathlib.Path) -> None:
    """Draws test perplexity against the period, as PNG and as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"svg.hashsalt": "0", "font.size": 9})
    found = results["arms"]
    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(10, 4.2), layout="constrained")
    for axes, (part, title) in zip(panels, PANELS.items(), strict=True):
        shown = [name for name in COMPRESSORS if part in name]
        for name, colour in zip(shown, ("tab:blue", "tab:red"), strict=True):
            done = [period for period in periods if key(name, period) in found]
            values = [found[key(name, period)]["test"] for period in done]
            axes.plot(done, values, "o-", color=colour, label=f"{name}: every N steps")
            for what, style in ((STRAIGHT_THROUGH, "--"), (ONCE, ":")):
                if key(name, what) in found:
                    value = found[key(name, what)]["test"]
                    axes.axhline(value, color=colour, ls=style, lw=1, label=f"{name}: {what}")
        if DENSE in found:
            axes.axhline(found[DENSE]["test"], color="black", lw=1, label="no compression")
        axes.set(xscale="log", yscale="log", xlabel="period N in steps", title=title)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("test perplexity")
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark, or prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of results.json")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/language_model"))
    parser.add_argument("--text_dir", type=pathlib.Path, help="folder of the text")
    parser.add_argument("--arms", default="", help="regular expression: run these only")
    parser.add_argument("--report", action="store_true", help="run nothing")
    add_settings(parser, Settings)
    flags = parser.parse_args(arguments)
    settings = settings_of(flags, Settings)
    path = flags.out / "results.json"
    if flags.report:
        results = read_results(path, dataclasses.asdict(settings))
    else:
        if flags.text_dir is None:
            parser.error("--text_dir is needed")
        text = read_text(flags.text_dir, settings.vocabulary)
        print(f"{text.coverage:.1%} of the words are in the vocabulary", flush=True)
        todo = arms(text, settings, flags.workdir)
        results = run_arms(path, dataclasses.asdict(settings), todo, flags.arms)
    plot(results, settings.periods, flags.out / "perplexity")
    print(summary(results, settings.periods))


if __name__ == "__main__":
    main()
