"""Three shrinkages of magnitudes, along the last axis of (stack, number) tensors.

Soft shrinkage is the proximal map of the sum of the magnitudes; with the largest spared, of the
sum of all but the largest; hard shrinkage is the limit of the latter as the threshold grows.
"""

from keras import ops

_FEW = 16


def soft(magnitudes, threshold, free=0):
    """Returns `max(m - threshold, 0)`, with the `free` largest of each row left as they are."""
    shrunk = ops.maximum(magnitudes - threshold, 0.0)
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
    keep = ops.clip(ops.cast(keep, "int32"), 0, number)
    if number <= _FEW:
        return _num_ahead(magnitudes) < keep
    threshold = _kth_largest(magnitudes, keep)
    above = magnitudes > threshold
    tied = magnitudes == threshold
    missing = keep - ops.sum(ops.cast(above, "int32"), axis=-1, keepdims=True)
    first = ops.cumsum(ops.cast(tied, "int32"), axis=-1) <= missing
    return ops.logical_or(above, ops.logical_and(tied, first))


def _num_ahead(magnitudes):
    """Returns how many entries of its row come before each entry, by comparing all pairs."""
    places = ops.arange(magnitudes.shape[-1])
    earlier = ops.expand_dims(places, 0) < ops.expand_dims(places, 1)
    each, other = ops.expand_dims(magnitudes, -1), ops.expand_dims(magnitudes, -2)
    tied = ops.logical_and(other == each, earlier)
    ahead = ops.logical_or(other > each, tied)
    return ops.sum(ops.cast(ahead, "int32"), axis=-1)


def _kth_largest(magnitudes, k):
    """Returns the k-th largest of each row (stack, 1), by bisection on the bits: no sorting.

    Non-negative float32 numbers are ordered like their bit patterns, so 31 counting passes find
    the largest pattern that at least k entries reach, which is the k-th largest entry.
    """
    patterns = ops.view(magnitudes + 0.0, "int32")  # -0.0 + 0.0 = 0.0

    def refine(index, threshold):
        candidate = threshold + ops.left_shift(ops.cast(1, "int32"), 30 - index)
        reached = ops.sum(ops.cast(patterns >= candidate, "int32"), axis=-1, keepdims=True)
        return ops.where(reached >= k, candidate, threshold)

    start = ops.zeros_like(patterns[..., :1])
    return ops.view(ops.fori_loop(0, 31, refine, start), "float32")
