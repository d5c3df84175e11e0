"""Least-squares fits of codebooks to weights.

The fits act on (rows, number) tensors, each row by itself. `mask`, a boolean tensor of the same
shape or None, tells which entries are stored: the others do not influence the fit, and what is
returned of them has no meaning.
"""

from keras import ops

REFITS = 8
PROBES = 2
EXACT = 2
REFRESHED = 2  # rounds from the codebook or the scale of a few steps ago
PART = 2**20


def fit_uniform(values, levels, rounds=REFITS, start=None):
    """Fits w ~ scale * q with integer |q| <= levels, by least squares per row.

    A row of (rows, number) values starts from several scales: the multiples that put its largest
    magnitude on the integer L, for every L in (levels / 2, levels] (one of them represents values
    that lie on a grid already, which makes the fit idempotent), and smaller ones that clip the
    largest magnitudes. From the best of them, q = round(w / scale) and scale = <w, q> / <q, q>
    alternate; each of the two steps can only lower the squared error.

    Args:
        values: Float32 tensor (rows, number).
        levels: Largest magnitude of the integers.
        rounds: How often the two alternate.
        start: Scale (rows, 1) to start from instead, as a share of the row's largest magnitude, or
            None. It is brought into the range of the others.

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

    scales = starting_scales(levels)

    def try_start(index, state):
        best, error = state
        scale = ops.broadcast_to(starts[index], best.shape)
        tried = error_of(scale)
        better = tried < error
        return ops.where(better, scale, best), ops.where(better, tried, error)

    if start is None:
        starts = ops.convert_to_tensor(scales, "float32")
        first = ops.ones_like(unit) * starts[0]
        state = ops.fori_loop(1, starts.shape[0], try_start, (first, error_of(first)))
    else:
        first = ops.clip(start, min(scales), max(scales))
        state = first, error_of(first)

    def refit(_, state):
        scale, error = state
        codes = codes_for(scale)
        power = ops.sum(ops.square(codes), axis=-1, keepdims=True)
        fitted = ops.sum(scaled * codes, axis=-1, keepdims=True) / ops.maximum(power, 1.0)
        fitted = ops.where(fitted > 0, fitted, scale)
        tried = error_of(fitted)
        better = tried < error
        return ops.where(better, fitted, scale), ops.where(better, tried, error)

    scale, _ = ops.fori_loop(0, rounds, refit, state)
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


def fit_ternary(values, mask=None):
    """Fits w ~ scale * q with q in {-1, 0, 1}: q != 0 where |w| > 0.7 * mean|w|.

    The scale is the mean of these magnitudes, by least squares.

    Returns:
        `(codes, scale)`: float32 integers (rows, number) and positive scales (rows, 1). A row of
        zeros has codes 0 and scale 1.
    """
    scaled, unit = normalised(values, mask)
    magnitudes = ops.abs(scaled)
    above = magnitudes > 0.7 * mean(magnitudes, mask)
    if mask is not None:
        above = ops.logical_and(above, mask)
    codes = ops.sign(scaled) * ops.cast(above, "float32")
    number = ops.sum(ops.cast(above, "float32"), axis=-1, keepdims=True)
    scale = mean(magnitudes, above) * unit
    return codes, ops.where(number > 0, scale, 1.0)


def fit_clusters(values, number, rounds, mask=None, start=None):
    """Fits w ~ level[code] by Lloyd's algorithm: nearest levels and means of clusters alternate.

    Without `start`, two rounds are tried from each of several: levels that split the range evenly,
    or the values evenly, or in between (see `starting_levels`), or the distinct values themselves,
    which represent exactly what has few of them. The best goes on. A level without values stays.

    The values are sorted once. A cluster then is a range of them, whose mean is a difference of
    prefix sums: a round takes time for the levels only, but for the last ones, which look at every
    value and make the means exact.

    Args:
        values: Float32 tensor (rows, number of values).
        number: Number of levels.
        rounds: Number of rounds.
        mask: Which entries are stored, or None.
        start: Levels (rows, number) to start from, or None.

    Returns:
        `(codes, levels)`: int32 tensor of the values' shape, and levels (rows, number) that grow.
    """
    scaled, unit = normalised(values, mask)
    exact = min(rounds, EXACT)
    quick = rounds - exact
    if start is None or quick > 0:
        ordered, stored = in_order(scaled, mask)
        quick_round = range_means(ordered, stored)

    def error_of(levels):
        _, difference = nearest(levels, scaled)
        if mask is not None:
            difference = ops.where(mask, difference, 0.0)
        return ops.sum(ops.square(difference), axis=-1, keepdims=True)

    def exact_round(_, levels):
        codes, difference = nearest(levels, scaled)
        return levels + cluster_means(difference, codes, number, mask)

    if start is None:
        starts = starting_levels(ordered, stored, number)

        def try_start(index, state):
            best, error = state
            levels = ops.fori_loop(0, PROBES, quick_round, starts[index])
            tried = error_of(levels)
            better = tried < error
            return ops.where(better, levels, best), ops.where(better, tried, error)

        worst = ops.full((scaled.shape[0], 1), float("inf"))
        levels, _ = ops.fori_loop(0, starts.shape[0], try_start, (starts[0], worst))
    else:
        levels = ops.sort(start / unit, axis=-1)
    if quick > 0:
        levels = ops.fori_loop(0, quick, quick_round, levels)
    levels = ops.fori_loop(0, exact, exact_round, levels)
    codes, _ = nearest(levels, scaled)
    return codes, levels * unit


def in_order(values, mask=None):
    """Returns the stored values of each row, growing, and how many they are, float32 (rows, 1).

    Behind them, in place of what is not stored, the largest is repeated.
    """
    rows, number = values.shape
    if mask is None:
        return ops.sort(values, axis=-1), ops.full((rows, 1), number, "float32")
    lowest = ops.min(values, axis=-1, keepdims=True)
    largest = ops.max(ops.where(mask, values, lowest), axis=-1, keepdims=True)
    ordered = ops.sort(ops.where(mask, values, largest), axis=-1)
    return ordered, ops.sum(ops.cast(mask, "float32"), axis=-1, keepdims=True)


def range_means(ordered, stored):
    """Returns a round of Lloyd's algorithm `(_, levels) -> levels` for values that are in order.

    Values are below 4 in magnitude. Their prefix sums are kept as an integer number of steps,
    exactly, and as what is left below a step, so that float32 loses nothing in long rows that a
    round at every value does not give back.
    """
    number = ordered.shape[-1]
    step = 2.0 ** -max(0, min(12, 28 - number.bit_length()))
    steps = ops.round(ordered / step)
    start = ((0, 0), (1, 0))
    whole = ops.pad(ops.cast(ops.cumsum(ops.cast(steps, "int32"), axis=-1), "int32"), start)
    rest = ops.pad(ops.cumsum(ordered - steps * step, axis=-1), start)
    last = ops.cast(stored, "int32")

    def means(_, levels):
        ends = number_below(ordered, (levels[:, 1:] + levels[:, :-1]) / 2)
        ends = ops.concatenate([ops.zeros_like(last), ops.minimum(ends, last), last], axis=-1)
        sums = [gathered(table, ends) for table in (whole, rest)]
        in_steps, below = (total[:, 1:] - total[:, :-1] for total in sums)
        counts = ops.cast(ends[:, 1:] - ends[:, :-1], "float32")
        found = (ops.cast(in_steps, "float32") * step + below) / ops.maximum(counts, 1.0)
        return ops.where(counts > 0, found, levels)

    return means


def starting_levels(ordered, stored, number):
    """Levels from which to start Lloyd's algorithm: (4, rows, number), growing along each row.

    - evenly spaced over the range;
    - evenly spaced ranks;
    - evenly spaced sums of gap^(2/3) between neighbouring values: the density of levels is then
      the cube root of that of the values, which is optimal for many levels (Panter & Dite, 1951);
    - the distinct values from below; the last repeats where there are fewer.

    Args:
        ordered: The values as `in_order` returns them: repetitions of the largest behind them add
            neither a gap nor a distinct value.
        stored: How many of them count.
        number: Number of levels.
    """
    last = ordered.shape[-1] - 1
    low, high = ordered[:, :1], ordered[:, -1:]
    middles = (ops.arange(number, dtype="float32")[None, :] + 0.5) / number

    gaps = ordered[:, 1:] - ordered[:, :-1]
    zero = ops.zeros_like(low)
    spread = ops.concatenate([zero, ops.cumsum(ops.power(gaps, 2 / 3), axis=-1)], axis=-1)
    fresh = ops.cast(gaps > 0, "float32")
    rank = ops.concatenate([zero, ops.cumsum(fresh, axis=-1)], axis=-1)
    ranks = ops.cast(ops.arange(number), "float32")[None, :] + zero

    def values_at(place):
        return gathered(ordered, ops.minimum(ops.cast(place, "int32"), last))

    starts = (
        low + middles * (high - low),
        values_at(ops.minimum(middles * stored, stored - 1)),
        values_at(number_below(spread, middles * spread[:, -1:])),
        values_at(number_below(rank, ranks)),
    )
    return ops.sort(ops.stack(starts), axis=-1)


def nearest(levels, values):
    """Returns the index of the nearest level, int32, and the difference `value - level`.

    Args:
        levels: (rows, number of levels), growing along each row; ties go to the lower level.
        values: (rows, number of values).
    """
    codes = number_below((levels[:, 1:] + levels[:, :-1]) / 2, values)
    return codes, values - gathered(levels, codes)


def number_below(ordered, queries):
    """Returns how many entries of the same row are below each query, by bisection: int32.

    Args:
        ordered: (rows, number), growing along each row.
        queries: (rows, number of queries).
    """
    rows, number = ordered.shape
    steps = number.bit_length()
    width = 2**steps - 1
    ordered = ops.pad(ordered, [(0, 0), (0, width - number)], constant_values=float("inf"))
    first = width * ops.arange(rows, dtype="int32")[:, None]
    flat = ops.reshape(ordered, (-1,))
    found = ops.zeros(queries.shape, "int32")
    for step in (2**power for power in reversed(range(steps))):
        below = ops.take(flat, first + found + (step - 1)) < queries
        found = found + step * ops.cast(below, "int32")
    return found


def gathered(table, index):
    """Returns `table[row, index[row, i]]` for every row and i."""
    rows, number = table.shape
    first = number * ops.arange(rows, dtype="int32")[:, None]
    return ops.take(ops.reshape(table, (-1,)), first + index)


def cluster_means(values, codes, number, mask=None):
    """Returns the means (rows, number) of the values of each code; 0 where there are none.

    Long rows are summed up in parts, so that float32 neither loses counts nor accumulates
    rounding.
    """
    rows, size = values.shape
    parts = -(-size // PART)
    part = ops.arange(size, dtype="int32") // PART
    row = ops.arange(rows, dtype="int32")[:, None]
    segments = ops.reshape((row * parts + part) * number + codes, (-1,))
    ones = ops.ones_like(values) if mask is None else ops.cast(mask, "float32")

    def total(of):
        sums = ops.segment_sum(ops.reshape(of, (-1,)), segments, rows * parts * number)
        return ops.sum(ops.reshape(sums, (rows, parts, number)), axis=1)

    return total(values * ones) / ops.maximum(total(ones), 1.0)


def normalised(values, mask=None):
    """Returns `(values / unit, unit)` with powers of two so that the largest is in [1, 4).

    Dividing by a power of two does not round; squares of the result neither overflow nor vanish.
    Units above 2^126 are left out, as compiled code may divide by multiplying with 1 / unit, which
    would be flushed to zero. Gradients do not pass.
    """
    values = ops.stop_gradient(values)
    magnitudes = ops.abs(values)
    if mask is not None:
        magnitudes = ops.where(mask, magnitudes, 0.0)
    largest = ops.max(magnitudes, axis=-1, keepdims=True)
    exponent = ops.bitwise_and(ops.view(largest, "int32"), ops.cast(0x7F800000, "int32"))
    unit = ops.minimum(ops.view(exponent, "float32"), 2.0**126)
    unit = ops.where(unit > 0, unit, 1.0)
    return values / unit, unit


def mean(values, mask=None):
    """Returns the mean of the stored entries of each row, (rows, 1); 0 where there are none."""
    if mask is None:
        return ops.mean(values, axis=-1, keepdims=True)
    weights = ops.cast(mask, "float32")
    number = ops.sum(weights, axis=-1, keepdims=True)
    return ops.sum(values * weights, axis=-1, keepdims=True) / ops.maximum(number, 1.0)
