"""Recurrent cells whose recurrent kernel is a product of two thin ones."""

import keras
from keras import ops

from keras_compaware.base import KernelAxes, check_integer, register
from keras_compaware.kernels import register_kernels


class _LowRankRecurrence:
    """Splits the recurrent kernel of a cell in two: (units, rank) and (rank, gates * units)."""

    def __init__(self, units, rank, **kwargs):
        check_integer(type(self).__name__, "rank", rank, 1)
        if rank > units:
            raise ValueError(
                f"{type(self).__name__}: `rank` must be at most `units`. Received: rank={rank}, "
                f"units={units}."
            )
        super().__init__(units, **kwargs)
        self.rank = rank

    def add_weight(self, shape=None, *args, name=None, **kwargs):
        if name == "recurrent_kernel":
            narrow = (self.units, self.rank)
            self.recurrent_projection = super().add_weight(
                narrow, *args, name="recurrent_projection", **kwargs
            )
            shape = (self.rank, shape[-1])
        return super().add_weight(shape, *args, name=name, **kwargs)

    @property
    def recurrent_macs(self):
        """Multiply-accumulates of the two recurrent factors in one step of one example."""
        return self.rank * (self.units + self.recurrent_kernel.shape[-1])

    def get_config(self):
        return {**super().get_config(), "rank": self.rank}

    def _narrow(self, state):
        return ops.matmul(state, self.recurrent_projection)


@register
class LowRankLSTMCell(_LowRankRecurrence, keras.layers.LSTMCell):
    """`keras.layers.LSTMCell` with a recurrent kernel of low rank, P R.

    P (`recurrent_projection`, (units, rank)) and R (`recurrent_kernel`, (rank, 4 * units)) are
    applied one after the other; the state keeps its `units` entries. Unlike the recurrent
    projection layer of Sak et al. (2014), outputs and states are not projected.

    Args:
        units: Integer: size of the state.
        rank: Integer between 1 and `units`.
        **kwargs: As for `keras.layers.LSTMCell`. The initializer, regularizer and constraint of
            the recurrent kernel are used for both factors.

    Raises:
        ValueError: If `rank` is not in its range.

    Example:
    >>> layer = keras.layers.RNN(LowRankLSTMCell(8, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape[-1]
    8
    >>> tuple(layer.cell.recurrent_kernel.shape)
    (2, 32)
    """

    def _compute_carry_and_output(self, x, h_tm1, c_tm1):
        narrow = tuple(self._narrow(h) for h in h_tm1)
        return super()._compute_carry_and_output(x, narrow, c_tm1)

    def call(self, inputs, states, training=False):
        if self.implementation != 1:  # here the state is read for the product only
            states = [self._narrow(states[0]), *states[1:]]
        return super().call(inputs, states, training=training)


@register
class LowRankSimpleRNNCell(_LowRankRecurrence, keras.layers.SimpleRNNCell):
    """`keras.layers.SimpleRNNCell` with a recurrent kernel of low rank, P R.

    P (`recurrent_projection`, (units, rank)) and R (`recurrent_kernel`, (rank, units)) are applied
    one after the other.

    Args:
        units: Integer: size of the state.
        rank: Integer between 1 and `units`.
        **kwargs: As for `keras.layers.SimpleRNNCell`. The initializer, regularizer and constraint
            of the recurrent kernel are used for both factors.

    Raises:
        ValueError: If `rank` is not in its range.

    Example:
    >>> layer = keras.layers.RNN(LowRankSimpleRNNCell(8, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape[-1]
    8
    """

    def call(self, sequence, states, training=False):
        nested = isinstance(states, (list, tuple))
        state = states[0] if nested else states
        mask = self.get_dropout_mask(sequence)
        recurrent_mask = self.get_recurrent_dropout_mask(state)
        if training and mask is not None:
            sequence = sequence * mask
        if training and recurrent_mask is not None:
            state = state * recurrent_mask
        output = ops.matmul(sequence, self.kernel)
        output = output + ops.matmul(self._narrow(state), self.recurrent_kernel)
        if self.bias is not None:
            output = output + self.bias
        if self.activation is not None:
            output = self.activation(output)
        return output, [output] if nested else output


@register
class LowRankGRUCell(_LowRankRecurrence, keras.layers.GRUCell):
    """`keras.layers.GRUCell` with a recurrent kernel of low rank, P R.

    P (`recurrent_projection`, (units, rank)) and R (`recurrent_kernel`, (rank, 3 * units)) are
    applied one after the other. With `reset_after=False` the reset state passes P by itself.

    Args:
        units: Integer: size of the state.
        rank: Integer between 1 and `units`.
        **kwargs: As for `keras.layers.GRUCell`. The initializer, regularizer and constraint of the
            recurrent kernel are used for both factors.

    Raises:
        ValueError: If `rank` is not in its range.

    Example:
    >>> layer = keras.layers.RNN(LowRankGRUCell(8, rank=2))
    >>> layer(keras.ops.ones((1, 5, 3))).shape[-1]
    8
    """

    @property
    def recurrent_macs(self):
        again = 0 if self.reset_after else self.units * self.rank
        return super().recurrent_macs + again

    def call(self, inputs, states, training=False):
        nested = isinstance(states, (list, tuple))
        state = states[0] if nested else states
        bias, recurrent_bias = self.bias, None
        if self.use_bias and self.reset_after:
            bias, recurrent_bias = self.bias[0], self.bias[1]
        masks = self.get_dropout_mask(inputs) if training else None
        x_z, x_r, x_h = _products(_masked(inputs, masks), self.kernel, bias)
        masks = self.get_recurrent_dropout_mask(state) if training else None
        states_of_gates = _masked(state, masks)
        if masks is None:
            narrow = [self._narrow(state)] * 3
        else:
            narrow = [self._narrow(value) for value in states_of_gates]
        if self.reset_after:
            h_z, h_r, h_h = _products(narrow, self.recurrent_kernel, recurrent_bias)
        else:
            h_z, h_r = _products(narrow[:2], self.recurrent_kernel[:, : 2 * self.units])
        update = self.recurrent_activation(x_z + h_z)
        reset = self.recurrent_activation(x_r + h_r)
        if self.reset_after:
            candidate = reset * h_h
        else:
            narrow = self._narrow(reset * states_of_gates[2])
            candidate = ops.matmul(narrow, self.recurrent_kernel[:, 2 * self.units :])
        output = update * state + (1 - update) * self.activation(x_h + candidate)
        return output, [output] if nested else output


def _masked(value, masks):
    """The value for each of three gates, with one dropout mask for all or one for each."""
    if masks is None:
        return [value] * 3
    if isinstance(masks, list):
        return [value * mask for mask in masks]
    return [value * masks] * 3


def _products(values, kernel, bias=None):
    """Products of one value per gate with its share of a kernel; of one for all, at once."""
    if all(value is values[0] for value in values):
        products = ops.split(ops.matmul(values[0], kernel), len(values), axis=-1)
    else:
        shares = ops.split(kernel, len(values), axis=-1)
        products = [ops.matmul(*pair) for pair in zip(values, shares, strict=True)]
    if bias is None:
        return products
    return [sum(pair) for pair in zip(products, ops.split(bias, len(values)), strict=True)]


_MATRIX = KernelAxes((0,), (1,))
for _cell in (LowRankLSTMCell, LowRankGRUCell, LowRankSimpleRNNCell):
    register_kernels(_cell, kernel=_MATRIX, recurrent_projection=_MATRIX, recurrent_kernel=_MATRIX)
