"""Recipes: which action applies to which kernel of a model."""

import collections

from keras_compaware._graph import has_graph
from keras_compaware.base import (
    AtEnd,
    Chain,
    Compressor,
    Every,
    Penalty,
    Skip,
    StraightThrough,
    Value,
    check_bool,
    check_keys,
    register,
)
from keras_compaware.compaction.rebuild import clone, copy_model
from keras_compaware.coupling import coupled_targets
from keras_compaware.kernels import find_targets, reason_to_skip
from keras_compaware.layers import Compressed
from keras_compaware.layers.compressed import compressed_layers
from keras_compaware.rules import (
    Plan,
    Rule,
    checked_rules,
    deserialized_rules,
    planned,
    subject_of,
)
from keras_compaware.training import CompressionCallback, CompressionOptimizer
from keras_compaware.training.callback import bind_optimizer
from keras_compaware.training.firing import apply, constrained, finite
from keras_compaware.training.optimizer import acts_in_step, holds

_REGULARIZER_ARGUMENT = {
    "kernel": "kernel_regularizer",
    "embeddings": "embeddings_regularizer",
    "depthwise_kernel": "depthwise_regularizer",
    "pointwise_kernel": "pointwise_regularizer",
}


@register
class Recipe(Value):
    """An ordered list of rules: which kernels of a model are compressed, how and when.

    For every kernel the first rule that matches wins. A rule that takes no kernel is an error (a
    typo must not train for a day uncompressed); what is left alone is listed in the plan with its
    reason.

    The rules of `channels` act on channel spaces in the same way: a target is then everything that
    is cut together with a channel, for all channels of a space, a matrix (channels, parameters).
    `Proximal(GroupLasso(1e-3))` or `Every(100, GroupPruning(0.5))` sets whole rows to zero, and
    `compact` removes these channels physically. Where both kinds of rules act at one step, those
    for kernels come first; at the end of training those for channels.

    Args:
        rules: Sequence of `Rule`s for kernels; may be empty if there are some for channels.
        strict: Whether kernels that cannot be compressed (unknown layers, frozen ones) are an
            error unless a rule with `Skip` takes them. Default False: they are listed in the plan.
        channels: Sequence of `Rule`s for channel spaces, whose targets are called
            "<name of the space>/channels". `Every`, `Proximal`, `AtEnd` and `Skip` can act on
            them. Default: none.

    Example:
    >>> import keras
    >>> from keras_compaware import Every, LowRank, Skip
    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((32,)),
    ...         keras.layers.Dense(64, name="hidden"),
    ...         keras.layers.Dense(10, name="head"),
    ...     ]
    ... )
    >>> recipe = Recipe(
    ...     [Rule("head", Skip()), Rule(keras.layers.Dense, Every(200, LowRank(rank=4)))]
    ... )
    >>> print(recipe.plan(model))
    kernel         layer  shape  what happens
    -------------------------------------------------------------------------
    hidden/kernel  Dense  32x64  Every(every=200, constraint=LowRank(rank=4))
    head/kernel    Dense  64x10  left alone: left alone by a rule
    """

    def __init__(self, rules=(), strict=False, channels=()):
        self.rules = checked_rules("rules", rules)
        check_bool("Recipe", "strict", strict)
        self.strict = strict
        self.channels = checked_rules("channels", channels)
        if not (self.rules or self.channels):
            raise ValueError(
                "Recipe: give at least one rule. Received: none, neither in `rules` nor in "
                "`channels`."
            )
        _refuse_what_channels_cannot_do(self.channels)
        _refuse_what_undoes_channels(self.rules, self.channels)

    def get_config(self):
        return {"rules": self.rules, "strict": self.strict, "channels": self.channels}

    @classmethod
    def from_config(cls, config):
        check_keys("Recipe", config, ["rules", "strict", "channels"])
        rules = {
            name: deserialized_rules(config[name])
            for name in ("rules", "channels")
            if name in config
        }
        return cls(**{**config, **rules})

    def __eq__(self, other):
        return isinstance(other, Recipe) and self.get_config() == other.get_config()

    def __hash__(self):
        return hash((self.rules, self.strict, self.channels))

    def __repr__(self):
        rules = f"[{', '.join(map(repr, self.rules))}]"
        if self.channels:
            rules += f", channels=[{', '.join(map(repr, self.channels))}]"
        return f"Recipe({rules})"

    def plan(self, model):
        """Returns the `Plan` for a model. Nothing is changed.

        Raises:
            ValueError: If a rule takes no kernel, or an action does not fit a kernel.
        """
        self._refuse_without_graph(model)
        rows, assignments = [], []
        if self.rules:
            targets, skipped = find_targets(model)
            rows, assignments = planned(self.rules, targets, skipped, "kernel", model, self.strict)
        if self.channels:
            found = planned(self.channels, *coupled_targets(model), "channel space", model)
            rows, assignments = rows + found[0], assignments + found[1]
        return Plan(tuple(rows), tuple(assignments))

    def wrap(self, model):
        """Returns the model with what acts inside the layers: wrappers and penalties.

        A new model with copied weights where a rule has `StraightThrough` or `Penalty`, else the
        model itself, so that wrapping twice changes nothing. A compiled model stays compiled, with
        a fresh optimizer.

        Raises:
            ValueError: If the model is subclassed, or a layer cannot be replaced or has another
                regularizer already.
        """
        inside = [
            (assignment.target, action)
            for assignment in self.plan(model).assignments
            for action in assignment.actions
            if isinstance(action, (StraightThrough, Penalty))
            and not _is_inside(model, assignment.target, action)
        ]
        if not inside:
            return model
        wrappers, penalties = {}, collections.defaultdict(dict)
        for target, action in inside:
            if isinstance(action, StraightThrough):
                wrappers[id(target.variables[0])] = action
            else:
                argument = _regularizer_argument(target)
                _refuse_second_regularizer(target, argument)
                penalties[id(target.layer)][argument] = action.regularizer
        replaced, reached = set(), set()

        def change(layer):
            replaced.add(id(layer))
            reached.update(id(inner) for inner in layer._flatten_layers())
            config = layer.get_config()
            config.update(penalties.get(id(layer), {}))
            new = type(layer).from_config(config)
            action = _straight_through_of(layer, wrappers)
            if action is None:
                return new, new
            return Compressed(new, action.compressor, action.every, action.alpha), new

        wrapped = clone(model, change)
        for target, action in inside:
            if id(target.layer) not in (replaced if isinstance(action, Penalty) else reached):
                raise ValueError(
                    f"{type(action).__name__}: the layer of '{target.name}' is a part of another "
                    "layer and cannot be replaced. Use Every(...) or Proximal(...), which act on "
                    "kernels wherever they are."
                )
        for layer in compressed_layers(wrapped):
            layer.refresh()
        return wrapped

    def callbacks(self, model):
        """Returns the callbacks for `fit`, as a list.

        Raises:
            ValueError: If the model must be wrapped first, or the recipe does nothing to it.
        """
        plan = self.plan(model)
        for assignment in plan.assignments:
            for action in assignment.actions:
                inside = isinstance(action, (StraightThrough, Penalty))
                if inside and not _is_inside(model, assignment.target, action):
                    raise ValueError(
                        f"The rule for '{assignment.target.name}' has {type(action).__name__}, but "
                        "its layer does not have it. Train the wrapped model: "
                        "`model = recipe.wrap(model)` before compiling, then "
                        "`recipe.callbacks(model)`."
                    )
        rules = (*self.rules, *self.channels)
        skips = all(isinstance(rule.actions[0], Skip) for rule in rules)
        if not plan.assignments and not skips:
            raise ValueError(f"Recipe: there is nothing to compress.\n{plan}")
        bind_optimizer(plan.assignments, model)
        return [CompressionCallback(plan.assignments)]

    def optimizer(self, inner, model=None):
        """Returns the optimizer to compile with: `inner`, and after each update what is to be done.

        Proximal maps at every step, constraints at every step and held masks act inside the
        training step, see `CompressionOptimizer`. If the recipe has nothing of that kind, this is
        `inner` itself.

        Args:
            inner: A `keras.optimizers.Optimizer`.
            model: The (wrapped) model, for custom loops without callbacks. Default None: the
                optimizer learns from `callbacks(model)` which kernels are meant.

        Example:
        >>> import keras
        >>> from keras_compaware import Every, MagnitudePruning
        >>> recipe = Recipe([Rule(".*", Every(100, MagnitudePruning(0.9), hold=True))])
        >>> recipe.optimizer(keras.optimizers.Adam(0.01)).inner_optimizer.get_config()["beta_1"]
        0.9
        """
        actions = [action for rule in (*self.rules, *self.channels) for action in rule.actions]
        if not any(acts_in_step(action) or holds(action) for action in actions):
            return inner
        optimizer = CompressionOptimizer(inner)
        if model is not None:
            optimizer.bind(self.plan(model).assignments, model)
        return optimizer

    def final_compressors(self, model):
        """Returns `{kernel name: Compressor}`: what kernels are when training has ended.

        Several compressors on one kernel are chained.
        """
        return {
            assignment.target.name: compressor
            for assignment, compressor in self._final(model)
            if assignment.target.layout is None
        }

    def _final(self, model):
        """Yields the assignments with the compressor that holds at the end, channels first."""
        assignments = self.plan(model).assignments
        for assignment in sorted(assignments, key=lambda a: a.target.layout is None):
            compressors = list(assignment.compressors.values())
            if compressors:
                yield assignment, compressors[0] if len(compressors) == 1 else Chain(compressors)

    def _refuse_without_graph(self, model):
        if self.channels and not has_graph(model):
            raise ValueError(
                f"Rules for channels need to know which layers read which channels, and the model "
                f"'{model.name}' ({type(model).__name__}) has no static graph (subclassed, or not "
                "built). Build it as a functional or Sequential model that begins with "
                "keras.Input(shape), or use rules for its kernels."
            )
        if not has_graph(model) and any(rule.where is None for rule in self.rules):
            raise ValueError(
                f"A rule takes all kernels but those that produce the model's outputs, and of the "
                f"model '{model.name}' ({type(model).__name__}) it is not known which these are, "
                "since it is subclassed or not built. Say which kernels are meant: "
                "Rule('hidden', ...), `where='hidden'`; '.*' stands for all."
            )


def _refuse_what_channels_cannot_do(channels):
    for rule in channels:
        for action in rule.actions:
            subject = subject_of(action)
            if isinstance(action, (StraightThrough, Penalty)):
                raise ValueError(
                    f"Recipe: {type(action).__name__} acts inside one layer, and the rule for "
                    f"channels {rule!r} is for slices of several. Use Proximal, Every or AtEnd."
                )
            if getattr(subject, "axis", None) == "outputs":
                raise ValueError(
                    f"Recipe: the rule for channels {rule!r} groups along the outputs. The rows of "
                    "a target of channels are the channels: leave `axis` at 'inputs'."
                )
            if (
                getattr(subject, "block", None) is not None
                or getattr(subject, "mode", None) == "block"
            ):
                raise ValueError(
                    f"Recipe: {subject} is about blocks of one kernel, and the rule for channels "
                    f"{rule!r} is for slices of several. Put it into `rules`."
                )
            if getattr(subject, "needs_decomposition", False):
                raise ValueError(
                    f"Recipe: {subject} decomposes one kernel, and the rule for channels {rule!r} "
                    "is for slices of several. Put it into `rules`."
                )


def _refuse_what_undoes_channels(rules, channels):
    if all(isinstance(rule.actions[0], Skip) for rule in channels):
        return
    for rule in rules:
        for subject in map(subject_of, rule.actions):
            if isinstance(subject, Compressor) and not subject.keeps_zeros:
                raise ValueError(
                    f"Recipe: {subject} does not keep zeros, so no channel of the kernels of "
                    f"{rule!r} would be removed. Train with the rules for channels first, and then "
                    "`compact(model).model` with this rule."
                )


def _straight_through_of(layer, actions):
    """Returns the one action for all kernels of a layer, from actions by variable, or None."""
    targets = find_targets(layer)[0]
    found = {target.name: actions.get(id(target.variables[0])) for target in targets}
    action = next(filter(None, found.values()), None)
    if action is None:
        return None
    for target in targets:
        nothing_to_gain = reason_to_skip(action.compressor, target) is not None
        if found[target.name] != action and not (found[target.name] is None and nothing_to_gain):
            raise ValueError(
                f"StraightThrough: the layer '{layer.name}' ({type(layer).__name__}) is wrapped as "
                f"a whole, so all its kernels need the same action. Received: {found}."
            )
    return action


def _regularizer_argument(target):
    attribute = target.name.rsplit("/", 1)[-1]
    argument = _REGULARIZER_ARGUMENT.get(attribute)
    if argument is None or argument not in target.layer.get_config():
        raise ValueError(
            f"Penalty: the layer of '{target.name}' ({type(target.layer).__name__}) takes no "
            "regularizer for this kernel. Use Proximal(...), which acts after the optimizer."
        )
    return argument


def _is_inside(model, target, action):
    """Whether the layer of a target already has what `wrap` puts there."""
    if isinstance(action, StraightThrough):
        wrapped = (layer._flatten_layers() for layer in compressed_layers(model))
        return any(target.layer is inner for inners in wrapped for inner in inners)
    present = getattr(target.layer, _regularizer_argument(target), None)
    return (
        type(present) is type(action.regularizer)
        and present.get_config() == action.regularizer.get_config()
    )


def _refuse_second_regularizer(target, argument):
    present = getattr(target.layer, argument, None)
    if present is not None:
        raise ValueError(
            f"Penalty: the layer of '{target.name}' has {argument}={present!r} already, which "
            "would be replaced. Build the model without it, or leave out the Penalty."
        )


class OccasionalCompression(CompressionCallback):
    """Overwrites kernels by their compressed form every N optimizer steps of `fit`.

    The method of Lee et al. (2021): nothing else in training changes, between two firings the
    weights move freely, and N is a regularization knob next to the compression ratio. Training
    ends exactly compressed. See `CompressionCallback` for how steps are counted.

    Args:
        constraint: A `Compressor` (or any `keras.constraints.Constraint`).
        every: Integer of at least 1: the period N in optimizer steps.
        begin: Integer: the last step of the warm-up without compression. Default 0.
        end: Integer or None: the last step at which it fires. Default None: no end.
        where: Which kernels: a regular expression on target names, a layer, a class of layers, a
            function of a target, or None (default): all but those that produce the model's
            outputs.
        ramp: `Ramp` that drives the constraint's budget, or None.

    Example:
    >>> import keras
    >>> import numpy as np
    >>> from keras_compaware import MagnitudePruning
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16), keras.layers.Dense(2)])
    >>> model.compile("sgd", "mse")
    >>> callback = OccasionalCompression(MagnitudePruning(0.75), every=10)
    >>> _ = model.fit(np.ones((64, 8)), np.ones((64, 2)), callbacks=[callback], verbose=0)
    >>> int(np.sum(keras.ops.convert_to_numpy(model.layers[0].kernel) != 0))
    32
    """

    def __init__(self, constraint, every, begin=0, end=None, where=None, ramp=None):
        super().__init__()
        self._recipe = Recipe([Rule(where, Every(every, constraint, begin, end, ramp))])

    def _resolve(self, model):
        plan = self._recipe.plan(model)
        if not plan.assignments:
            raise ValueError(f"OccasionalCompression: there is nothing to compress.\n{plan}")
        return plan.assignments


def compress(model, recipe):
    """Returns a copy of the model, compressed once, without training.

    For every target the compressors of its actions are applied one after the other (on codes, see
    `Chain`); proximal maps and penalties, which only make sense while training, are left out.

    Args:
        model: A built Keras model of any kind that can be saved.
        recipe: A `Recipe`, or a `Compressor` for all kernels but those of the outputs.

    Returns:
        A new model; the given one is not touched.

    Raises:
        ValueError: If the recipe has no compressor, or does not fit the model.
        FloatingPointError: If a kernel holds NaN or infinity.

    Example:
    >>> import keras
    >>> from keras_compaware import MagnitudePruning
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    >>> small = compress(model, MagnitudePruning(0.5))
    >>> int(keras.ops.count_nonzero(small.layers[0].kernel.value))
    16
    """
    recipe = as_recipe(recipe)
    copy = copy_model(model)
    done = set()
    for assignment, compressor in recipe._final(copy):
        target = assignment.target
        done.update(id(variable) for variable in target.variables)
        with finite([target]):
            settled = compressor.settle(target.read(), target.axes)
        apply([constrained(target, settled)])
    if not done:
        raise ValueError(
            f"compress: {recipe!r} has no compressor for any kernel; proximal maps and penalties "
            "act in training only."
        )
    for layer in compressed_layers(copy):
        if any(id(target.variables[0]) in done for target in layer.targets):
            layer.release()
    return copy


def as_recipe(recipe):
    """Returns a `Recipe`; a compressor is applied at the end to all kernels but the outputs'."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Compressor):
        return Recipe([Rule(None, AtEnd(recipe))])
    raise TypeError(f"Expected a Recipe or a Compressor. Received: {recipe!r}.")
