"""The optimizer wrapper: whatever acts inside the training step, after the optimizer's update."""

import dataclasses

import keras
from keras import ops

from keras_compaware.base import (
    ChannelLayout,
    Compressor,
    Every,
    KernelAxes,
    Perturbation,
    Proximal,
    Target,
    Value,
    register,
)


def acts_in_step(action):
    """Whether an action belongs into the training step: at every step, without a decomposition."""
    if isinstance(action, Proximal):
        return action.every == 1 and not action.regularizer.needs_decomposition
    if isinstance(action, Every):
        constraint = action.constraint
        is_random = isinstance(constraint, Perturbation) and constraint.is_random
        decomposes = getattr(constraint, "needs_decomposition", False)
        return action.every == 1 and not is_random and not decomposes
    return False


def holds(action):
    """Whether zeros are held: between an action's firings, or after a controller's end."""
    if isinstance(action, Proximal):
        return action.controller is not None and acts_in_step(action)
    return isinstance(action, Every) and action.hold


@register
@dataclasses.dataclass(frozen=True)
class StepEntry(Value):
    """What happens to one target inside the training step.

    Args:
        indexes: Places of the target's variables among the model's trainable ones, a tuple.
        name: Name of the target.
        axes: Its axes.
        actions: The actions that act in the step, in order.
        hold: Whether zeros are held between firings.
        layout: How the variables stand together, see `Target`.
    """

    indexes: tuple
    name: str
    axes: KernelAxes
    actions: tuple
    hold: bool = False
    layout: ChannelLayout | None = None


@register
class CompressionOptimizer(keras.optimizers.Optimizer):
    """Runs an optimizer and then, in the same step, what a recipe does to the kernels at each step.

    After each update of the weights (not after the micro-steps of gradient accumulation) it
    applies, in the order of the rule's actions,

        Proximal(R, every=1):    w <- prox_R(w, learning rate of this update)
        Every(1, C):             w <- C(w)
        Every(N, C, hold=True):  w <- 0 where the last firing has left a zero

    so that steps per execution, gradient accumulation, schedules and rates that callbacks set
    count exactly. What needs a decomposition, or acts more rarely, is the callback's. The masks,
    and strengths that a controller steers, are variables of the optimizer, saved and restored with
    it; `compact` takes the wrapper off.

    Made by `Recipe.optimizer`. Where the loss is scaled, the `LossScaleOptimizer` goes outside;
    Keras puts it there by itself under the policy "mixed_float16". With `use_ema` what is exactly
    zero in the raw weights is set to zero in the averaged ones, which end the training.

    Args:
        inner_optimizer: The optimizer that updates the weights.
        entries: Sequence of `StepEntry`s, or None: they are given by `bind` before training.
        **kwargs: `name`.

    Example:
    >>> from keras_compaware import GroupLasso, Proximal, Recipe, Rule
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    >>> recipe = Recipe([Rule(None, Proximal(GroupLasso(0.1)))])
    >>> model.compile(recipe.optimizer(keras.optimizers.SGD(0.1)), "mse")
    >>> callbacks = recipe.callbacks(model)  # tells the optimizer which kernels are meant
    """

    def __init__(self, inner_optimizer, entries=None, **kwargs):
        if not isinstance(inner_optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "CompressionOptimizer: `inner_optimizer` must be a keras.optimizers.Optimizer, for "
                f"example keras.optimizers.Adam(). Received: {inner_optimizer!r}."
            )
        if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "CompressionOptimizer: a LossScaleOptimizer goes outside: "
                "LossScaleOptimizer(recipe.optimizer(Adam())), not the other way round. Under the "
                "policy 'mixed_float16' Keras adds it by itself."
            )
        if isinstance(inner_optimizer, CompressionOptimizer):
            raise ValueError(
                "CompressionOptimizer: the optimizer is wrapped already. One recipe with several "
                "rules does all there is to do in one wrapper."
            )
        known = entries is None or isinstance(entries, (list, tuple))
        if not known or not all(isinstance(entry, StepEntry) for entry in entries or ()):
            raise TypeError(
                "CompressionOptimizer: `entries` must be a sequence of StepEntrys, or None. "
                f"Received: {entries!r}."
            )
        kwargs.setdefault("name", f"compression_{inner_optimizer.name}")
        super().__init__(learning_rate=0.0, **kwargs)
        self.inner_optimizer = inner_optimizer
        self.entries = None if entries is None else tuple(entries)
        self._masks = {}
        # By the text of the action: what it is at first, and the variable once there is one.
        self._first_strengths, self._strengths = {}, {}

    # ---- which variables ----------------------------------------------------------------------

    def bind(self, assignments, model):
        """Tells which of a model's variables are acted on. Called by `Recipe.callbacks`.

        Raises:
            ValueError: If the optimizer has begun to train something else.
        """
        places = {id(variable): i for i, variable in enumerate(model.trainable_variables)}
        entries = []
        for assignment in assignments:
            actions = tuple(filter(acts_in_step, assignment.actions))
            hold = any(map(holds, assignment.actions))
            if actions or hold:
                target = assignment.target
                found = tuple(places[id(variable)] for variable in target.variables)
                layout = target.layout
                entries.append(StepEntry(found, target.name, target.axes, actions, hold, layout))
        if self.entries is None:
            self.entries = tuple(entries)
            if self.built:
                self._add_state()
        elif self.entries != tuple(entries):
            raise ValueError(
                "The model is compiled with an optimizer that was made for another recipe or "
                "another model. Compile it again: model.compile(recipe.optimizer(...), ...)."
            )

    def handles(self, target, action):
        """Whether the optimizer carries out this action on this target."""
        entry = self._entry_of(target)
        return entry is not None and action in entry.actions

    def holds(self, target):
        """Whether the optimizer holds the zeros of this target."""
        entry = self._entry_of(target)
        return entry is not None and entry.hold

    def hold(self, target):
        """Holds the zeros that the target has now."""
        entry = self._entry_of(target)
        self._masks[entry.name].assign(_mask_of(target.read()))

    def steer(self, action, strength):
        """Sets the strength of a regularizer that a controller steers, if it acts here."""
        self._first_strengths[repr(action)] = strength
        if repr(action) in self._strengths:
            self._strengths[repr(action)].assign(strength)

    def _entry_of(self, target):
        found = (entry for entry in self.entries or () if entry.name == target.name)
        return next(found, None)

    # ---- Keras optimizer ----------------------------------------------------------------------

    def build(self, variables):
        if self.built:
            return
        variables = list(variables)
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)
        if self.entries is not None:
            self._add_state()

    def _add_state(self):
        variables = self._trainable_variables
        for number, entry in enumerate(self.entries):
            last = max(entry.indexes)
            if last >= len(variables):
                raise ValueError(
                    f"The optimizer was made for a model in which '{entry.name}' is trainable "
                    f"variable {last}; this one has {len(variables)}. After freezing or "
                    "unfreezing layers, compile the model again with recipe.optimizer(...)."
                )
            if entry.hold:
                first = variables[entry.indexes[0]]
                self._masks[entry.name] = self.add_variable(
                    shape=first.shape if entry.layout is None else entry.layout.shape,
                    initializer="ones",
                    dtype="bool",  # int8 is not sent to other workers by TensorFlow
                    name=f"mask_{number}",
                )
            for action in entry.actions:
                if getattr(action, "controller", None) is not None:
                    self._add_strength(repr(action))

    def _add_strength(self, key):
        if key not in self._strengths:
            first = keras.initializers.Constant(self._first_strengths.get(key, 0.0))
            name = f"strength_{len(self._strengths)}"
            self._strengths[key] = self.add_variable((), first, dtype="float32", name=name)

    @property
    def variables(self):
        return self._variables + self.inner_optimizer.variables

    def apply(self, grads, trainable_variables=None):
        if self.entries is None:
            raise ValueError(
                "The optimizer of a recipe does not know yet which kernels are meant. Call "
                "`callbacks = recipe.callbacks(model)` after `model.compile(...)` and before "
                "`model.fit(..., callbacks=callbacks)`; or, without callbacks, give it the model: "
                "`recipe.optimizer(inner, model)`."
            )
        if not self.built:
            self.build(trainable_variables)
        inner = self.inner_optimizer
        done = ops.convert_to_tensor(inner.iterations) + 0  # a copy: it is counted up in place
        rate = ops.convert_to_tensor(inner.learning_rate) + 0.0
        inner.apply(grads, trainable_variables)
        step = ops.convert_to_tensor(inner.iterations)
        updated = None if not inner.gradient_accumulation_steps else step > done
        for entry in self.entries:
            self._act(entry, step, rate, updated)

    def _target(self, entry):
        variables = tuple(self._trainable_variables[index] for index in entry.indexes)
        return Target(entry.name, variables, entry.axes, layout=entry.layout)

    def _act(self, entry, step, rate, updated):
        target = self._target(entry)
        w = ops.convert_to_tensor(target.read())
        mask = self._masks.get(entry.name)
        if mask is not None:
            w = _masked(w, ops.convert_to_tensor(mask))
        for action in entry.actions:
            active = _active(action, step, updated)
            after = _conditionally(
                active,
                lambda action=action, w=w: _applied(
                    action, entry.axes, w, step, rate, self._strengths.get(repr(action))
                ),
                w,
            )
            if holds(action) and isinstance(action, Every):
                kept = ops.convert_to_tensor(mask)
                mask.assign(_mask_of(after) if active is None else _choose(active, after, kept))
            w = after
        target.write(w)

    def finalize_variable_values(self, var_list):
        entries = self.entries or ()  # None if the first step has raised: Keras comes here anyway
        targets = [self._target(entry) for entry in entries]
        zeros = [ops.equal(ops.convert_to_tensor(target.read()), 0) for target in targets]
        self.inner_optimizer.finalize_variable_values(var_list)
        if not self.inner_optimizer.use_ema:
            return
        for variable in self._trainable_variables:
            # An array of its own: Keras has assigned the average's, and on JAX two variables that
            # share an array both lose it in the next training.
            variable.assign(ops.convert_to_tensor(variable) + 0)
        for entry, target, zero in zip(entries, targets, zeros, strict=True):
            w = ops.convert_to_tensor(target.read())
            constraints = [a.constraint for a in entry.actions if isinstance(a, Every)]
            if entry.hold or len(constraints) < len(entry.actions):
                w = ops.where(zero, ops.zeros_like(w), w)
            for constraint in constraints:
                if isinstance(constraint, Compressor):
                    w = constraint(w, axes=entry.axes)
            target.write(w)

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        if hasattr(self, "inner_optimizer"):  # the base class sets its own, before there is one
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "inner_optimizer": serialize(self.inner_optimizer),
            "entries": None if self.entries is None else [serialize(e) for e in self.entries],
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        entries = config.pop("entries", None)
        if entries is not None:
            entries = [keras.saving.deserialize_keras_object(entry) for entry in entries]
        return cls(inner, entries, **config)


def _active(action, step, updated):
    """Whether an action applies after this update: a boolean scalar, or None for always."""
    conditions = [updated] if updated is not None else []
    if action.begin > 0:
        conditions.append(step > action.begin)
    if action.end is not None:
        conditions.append(step <= action.end)
    active = None
    for condition in conditions:
        active = condition if active is None else ops.logical_and(active, condition)
    return active


def _applied(action, axes, w, step, rate, strength=None):
    subject = action.regularizer if isinstance(action, Proximal) else action.constraint
    ramp = action.schedule
    budget = None if ramp is None else ramp(step, getattr(subject, subject.budget))
    if strength is not None:
        budget = ops.convert_to_tensor(strength)
    if isinstance(action, Proximal):
        return subject.prox(w, rate, axes, budget)
    if isinstance(subject, (Compressor, Perturbation)):
        arguments = {} if budget is None else {"budget": budget}
        return ops.cast(subject(w, axes=axes, **arguments), w.dtype)
    return ops.cast(subject(w), w.dtype)


def _conditionally(condition, function, otherwise):
    return function() if condition is None else ops.cond(condition, function, lambda: otherwise)


def _mask_of(w):
    return ops.not_equal(w, 0)


def _choose(condition, w, mask):
    return ops.where(condition, _mask_of(w), mask)


def _masked(w, mask):
    return ops.where(mask, w, ops.zeros_like(w))


def step_optimizer(optimizer):
    """Returns the `CompressionOptimizer` among an optimizer and what it wraps, or None."""
    while optimizer is not None and not isinstance(optimizer, CompressionOptimizer):
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return optimizer
