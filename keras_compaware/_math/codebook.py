"""Least-squares fits of codebooks to weights."""

from keras import ops

REFITS = 8


def fit_uniform(values, levels):
    """Fits w ~ scale * q with integer |q| <= levels, by least squares per row.

    A row of (rows, number) values starts from several scales: the multiples that put its largest
    magnitude on the integer L, for every L in (levels / 2, levels] (one of them represents values
    that lie on a grid already, which makes the fit idempotent), and smaller ones that clip the
    largest magnitudes. From the best of them, q = round(w / scale) and scale = <w, q> / <q, q>
    alternate; each of the two steps can only lower the squared error.

    Returns:
        `(codes, scale)`: float32 integers (rows, number) and positive scales (rows, 1). A row of
        zeros has codes 0 and scale 1.
    """
    largest = ops.max(ops.abs(values), axis=-1, keepdims=True)
    unit = ops.where(largest > 0, largest, 1.0)
    scaled = values / unit  # in [-1, 1]: squares neither overflow nor vanish

    def codes_for(scale):
        return ops.clip(ops.round(scaled / scale), -levels, levels)

    def error_of(scale):
        difference = scaled - scale * codes_for(scale)
        return ops.sum(ops.square(difference), axis=-1, keepdims=True)

    starts = ops.convert_to_tensor(starting_scales(levels), "float32")

    def try_start(index, state):
        best, error = state
        scale = ops.broadcast_to(starts[index], best.shape)
        tried = error_of(scale)
        better = tried < error
        return ops.where(better, scale, best), ops.where(better, tried, error)

    first = ops.ones_like(unit) * starts[0]
    scale, error = ops.fori_loop(1, starts.shape[0], try_start, (first, error_of(first)))

    def refit(_, state):
        scale, error = state
        codes = codes_for(scale)
        power = ops.sum(ops.square(codes), axis=-1, keepdims=True)
        fitted = ops.sum(scaled * codes, axis=-1, keepdims=True) / ops.maximum(power, 1.0)
        fitted = ops.where(fitted > 0, fitted, scale)
        tried = error_of(fitted)
        better = tried < error
        return ops.where(better, fitted, scale), ops.where(better, tried, error)

    scale, _ = ops.fori_loop(0, REFITS, refit, (scale, error))
    return codes_for(scale), ops.where(largest > 0, scale * unit, 1.0)


def starting_scales(levels):
    """Scales to start from, for values whose largest magnitude is one.

    Of the grids that put the largest magnitude on a level, at most 16, evenly spread, besides the
    finest; the clipping ones run down to a fifth of the finest grid's range.
    """
    lowest = levels // 2 + 1
    step = max(1, (levels - lowest + 1) // 16)
    on_grid = [1.0 / level for level in range(levels, lowest - 1, -step)]
    clipped = [factor / levels for factor in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)]
    return on_grid + clipped
