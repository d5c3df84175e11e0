"""Three shrinkages of magnitudes, along the last axis of (stack, number) tensors.

Soft shrinkage is the proximal map of the sum of the magnitudes; with the largest spared, of the
sum of all but the largest; hard shrinkage is the limit of the latter as the threshold grows.
"""

from keras import ops

from keras_compaware._math.backend import kth_largest, picked, selects, shapes_may_vary

_FEW = 16
_SAMPLE = 1024
_SORTED_AT_ONCE = 4096
_ABOVE_ALL = 2**31 - 1  # no number has this pattern


def soft(magnitudes, threshold, free=0):
    """Returns `max(m - threshold, 0)`, with the `free` largest of each row left as they are."""
    shrunk = ops.relu(magnitudes - threshold)
    if isinstance(free, int) and free == 0:
        return shrunk
    return ops.where(largest(magnitudes, free), magnitudes, shrunk)


def hard(magnitudes, keep):
    """Returns the magnitudes with all but the `keep` largest of each row set to zero."""
    return ops.where(largest(magnitudes, keep), magnitudes, ops.zeros_like(magnitudes))


def largest(magnitudes, keep):
    """Returns a mask of exactly the `keep` largest of each row; ties go to the lower index.

    Args:
        magnitudes: Non-negative float32 tensor (stack, number).
        keep: Integer or integer scalar tensor (may be traced), clipped to [0, number].
    """
    number = magnitudes.shape[-1]
    if isinstance(keep, int):
        keep = min(max(keep, 0), number)
    else:
        keep = ops.clip(ops.cast(keep, "int32"), 0, number)
    if number <= _FEW:
        return _num_ahead(magnitudes) < keep
    patterns, threshold, reached = _threshold(magnitudes, keep)

    def without_ties():
        return patterns >= threshold

    def by_index():
        above, tied = patterns > threshold, patterns == threshold
        missing = keep - ops.sum(ops.cast(above, "int32"), axis=-1, keepdims=True)
        first = ops.cumsum(ops.cast(tied, "int32"), axis=-1) <= missing
        return ops.logical_or(above, ops.logical_and(tied, first))

    return ops.cond(ops.all(reached == keep), without_ties, by_index)


def _num_ahead(magnitudes):
    """Returns how many entries of its row come before each entry, by comparing all pairs."""
    places = ops.arange(magnitudes.shape[-1])
    earlier = ops.expand_dims(places, 0) < ops.expand_dims(places, 1)
    each, other = ops.expand_dims(magnitudes, -1), ops.expand_dims(magnitudes, -2)
    tied = ops.logical_and(other == each, earlier)
    ahead = ops.logical_or(other > each, tied)
    return ops.sum(ops.cast(ahead, "int32"), axis=-1)


def _threshold(magnitudes, k):
    """Separates the k largest of each row.

    Non-negative float32 numbers are ordered like their bit patterns. A sample suggests between
    which two patterns the k-th largest lies; it is then looked for among the entries between them
    where these can be picked out, else by counting.

    Returns:
        `(bit patterns (stack, number), thresholds (stack, 1), entries that reach them (stack, 1))`.
    """
    patterns = ops.view(magnitudes + 0.0, "int32")  # -0.0 + 0.0 = 0.0
    stack, number = patterns.shape
    if shapes_may_vary() and (stack * number <= _SORTED_AT_ONCE or (stack > 1 and selects())):
        found = kth_largest(patterns, ops.maximum(k, 1))
        return patterns, found, _num_reaching(patterns, found)
    low, high = _bracket(patterns, k)
    reached, beyond = _num_reaching(patterns, low), _num_reaching(patterns, high)
    misses_low, misses_high = reached < k, beyond >= k
    low, reached = ops.where(misses_low, 0, low), ops.where(misses_low, number, reached)
    high, beyond = ops.where(misses_high, _ABOVE_ALL, high), ops.where(misses_high, 0, beyond)
    if stack > 1 or not shapes_may_vary():
        found, reached = _by_counting(patterns, k, low, high, reached, beyond)
        return patterns, found, reached
    between = picked(patterns, ops.logical_and(patterns >= low, patterns < high))[None]
    missing, reached = ops.maximum(k - beyond, 1), reached - beyond

    def by_selection():
        return kth_largest(between, ops.squeeze(missing))

    def by_counting():
        return _by_counting(between, missing, low, high, reached, ops.zeros_like(beyond))[0]

    if selects():
        found = by_selection()
    else:
        found = ops.cond(ops.shape(between)[1] <= 4 * _SORTED_AT_ONCE, by_selection, by_counting)
    return patterns, found, _num_reaching(patterns, found)


def _num_reaching(patterns, threshold):
    return ops.sum(ops.cast(patterns >= threshold, "int32"), axis=-1, keepdims=True)


def _by_counting(patterns, k, low, high, reached, beyond):
    """Narrows brackets [low, high) of the k-th largest of each row, all (stack, 1).

    Every pass counts how many entries reach a pattern in between: where the counts at the two ends
    suggest the k-th largest, and half-way every third time. It ends where exactly k entries of
    every row reach a pattern, or with that of the k-th largest.

    Returns:
        `(thresholds, entries that reach them)`.
    """

    def goes_on(turn, low, high, reached, beyond):
        return ops.any(ops.logical_and(reached != k, high - low > 1))

    def refine(turn, low, high, reached, beyond):
        share = ops.cast(reached - k, "float32") / ops.cast(reached - beyond, "float32")
        share = ops.where(turn == 2, 0.5, share)
        middle = low + ops.cast(share * ops.cast(high - low, "float32"), "int32")
        middle = ops.maximum(ops.minimum(middle, high - 1), low + 1)
        count = _num_reaching(patterns, middle)
        enough = count >= k
        low, reached = ops.where(enough, middle, low), ops.where(enough, count, reached)
        high, beyond = ops.where(enough, high, middle), ops.where(enough, beyond, count)
        return (turn + 1) % 3, low, high, reached, beyond

    state = (ops.cast(0, "int32"), low, high, reached, beyond)
    _, low, _, reached, _ = ops.while_loop(goes_on, refine, state)
    return low, reached


def _bracket(patterns, k):
    """Patterns around the k-th largest of each row, as a sample of the row has them: a guess."""
    stack, number = patterns.shape
    size = min(number, _SAMPLE)
    if stack * size > _SORTED_AT_ONCE:
        low = ops.zeros_like(patterns[:, :1])
        return low, low + _ABOVE_ALL
    stride = number // size
    stride -= stride % 2 == 0  # an even one may meet but some of the channels
    ascending = ops.sort(patterns[:, : size * stride : stride], axis=-1)
    share = 1.0 - ops.cast(k, "float32") / number
    margin = 3.0 * ops.sqrt(size * share * (1.0 - share)) + 1.0 if size < number else 0.0
    first, last = (
        ops.cast(ops.clip(place, 0, size - 1), "int32")
        for place in (ops.floor(size * share - margin), ops.ceil(size * share + margin))
    )
    low, high = (ops.take(ascending, place, axis=-1)[:, None] for place in (first, last))
    return low, high + 1
