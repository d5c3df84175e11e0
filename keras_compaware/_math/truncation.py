"""The best approximation of a given rank, without a full decomposition wherever that is proven."""

import math

import keras
from keras import ops

from keras_compaware._math.svd import svd

EXCESS = 1e-3
"""How far the error of an approximation may lie above the least one, as a fraction of it."""

PROBES = 16
BLOCKS = 6
POWERS = {False: 2, True: 6}  # in a subspace of just the rank, and in a larger one
_ROUNDING = 1e-5  # of the norm: a smaller error counts as none
_OVERLAP = 1e-4  # of the vectors of an orthonormal basis
_LEAST_WIDTH = 16
_WARM_SIZE = 64
_COLD_SIZE = 512


def truncated(matrix, rank, previous=None):
    """Returns `(left (s, m, rank), right (s, rank, n))`: the best approximation is their product.

    Each singular value is shared evenly between the two factors. Which method finds them depends
    on the shape, on the rank and on what is proven of the result:

    1.  With `previous`, if rank <= n / 4 and n >= 64 (n is the smaller of the two sizes): half an
        iteration from the earlier subspace, by three products with the matrix. If it does not
        hold,
    2.  if rank <= n / 8 and n >= 512: a block Krylov space of 3 rank dimensions, and of at least
        96, from a random start (Musco & Musco, 2015). If it does not hold,
    3.  the singular value decomposition.

    The first two hold if `certified` finds that the error is at most 0.1 % above the least one, or
    no larger than rounding, for all matrices of the stack. What is random is the same every time.

    Args:
        matrix: Tensor (s, m, n).
        rank: Integer in [1, min(m, n)].
        previous: Factors `(left, right)` of that rank for similar matrices, or None.
    """
    rows, columns = matrix.shape[-2:]
    smaller = min(rows, columns)

    def exact():
        left, values, right = svd(matrix, rank)
        root = ops.sqrt(values)
        return left * root[:, None, :], right * root[:, :, None]

    find = exact
    if smaller >= _COLD_SIZE and 8 * rank <= smaller:
        find = _first(lambda: attempt(matrix, rank, krylov_space), find)
    if previous is not None and smaller >= _WARM_SIZE and 4 * rank <= smaller:
        find = _first(lambda: attempt_from(matrix, rank, previous), find)
    return find()


def _first(attempted, otherwise):
    """A function that returns what an attempt has found if it holds."""

    def find():
        holds, *factors = attempted()
        return ops.cond(holds, lambda: tuple(factors), otherwise)

    return find


def attempt_from(matrix, rank, previous):
    """As `attempt`, in the subspace that earlier factors are mapped to."""
    longer = previous[0] if matrix.shape[-2] >= matrix.shape[-1] else _turned(previous[1])

    def space(forward, backward, number, size, rank):
        return subspace(forward, backward, longer)

    return attempt(matrix, rank, space)


def attempt(matrix, rank, space):
    """Returns `(whether it holds for all matrices, left, right)` of the best in a space.

    Args:
        matrix: Tensor (s, m, n).
        rank: Integer.
        space: Function such as `krylov_space`.
    """
    number, rows, columns = matrix.shape
    is_wide = rows < columns
    highest, lowest = (
        extreme(matrix, axis=(-2, -1), keepdims=True) for extreme in (ops.max, ops.min)
    )
    size = ops.maximum(highest, -lowest)  # no temporary of the matrix's size
    unit = ops.where(size > 0, size, 1.0)  # squares neither overflow nor vanish

    def times(x):
        return ops.matmul(matrix, x) / unit

    def transposed_times(x):
        return _turned(ops.matmul(_turned(x), matrix)) / unit

    forward, backward = (transposed_times, times) if is_wide else (times, transposed_times)
    spanned = space(forward, backward, number, min(rows, columns), rank)
    holds, image, basis = certified(forward, backward, *spanned, rank)
    root = ops.sqrt(ops.sqrt(ops.sum(ops.square(image), axis=-2, keepdims=True)))
    image = image / ops.where(root > 0, root, 1.0) * ops.sqrt(unit)
    basis = basis * root * ops.sqrt(unit)
    factors = (basis, _turned(image)) if is_wide else (image, _turned(basis))
    return ops.all(holds), *factors


def subspace(forward, backward, start):
    """Returns `(basis (s, n, l), its image, the image's image)` of what a start is mapped to.

    Args:
        forward: Function x -> W x.
        backward: Function y -> W^T y.
        start: Tensor (s, m, l).
    """
    mapped = backward(_scaled(start))
    basis = _orthonormal(mapped) * _filled(mapped)
    image = forward(basis)
    return basis, image, backward(image)


def krylov_space(forward, backward, number, size, rank):
    """Returns `(basis (s, n, l), its image, the image's image)` of a block Krylov space.

    Six blocks of half the rank, and of at least 16; each is W^T W times the one before, made
    orthogonal to all before.

    Args:
        forward: Function x -> W x.
        backward: Function y -> W^T y.
        number: Number of matrices s.
        size: The size n.
        rank: The rank that the space must serve.
    """
    width = max(_LEAST_WIDTH, -(-rank // 2))
    new = backward(forward(keras.random.normal((number, size, width), seed=1)))
    filled = _filled(new)
    basis = _orthonormal(new) * filled
    images, backs = [], []
    for block in range(BLOCKS):
        if block:
            for _ in range(2):  # once leaves what rounding has mixed in
                new = _orthonormal(new - _projected(basis, new)) * filled
            basis = ops.concatenate([basis, new], axis=-1)
        images.append(forward(basis[..., -width:]))
        backs.append(new := backward(images[-1]))
    return basis, ops.concatenate(images, axis=-1), ops.concatenate(backs, axis=-1)


def certified(forward, backward, basis, image, back, rank):
    """Returns `(holds (s,), image (s, m, rank), basis (s, n, rank))` of the best in a subspace.

    The approximation W V V^T, with the leading Ritz vectors V of A = W^T W in the subspace, has the
    squared error e^2 = ||W||^2 - sum_i h_i (i <= rank), with the Ritz values h. It holds if the
    least squared error is shown to be at least e^2 / (1 + EXCESS)^2, from the following bounds.

    Let H be A on the subspace, K what A maps from the subspace out of it, C the rest of A, and
    C <= c with h_rank > c. The sum of the `rank` largest eigenvalues of A is at most

        sum_i h_i + sum_i ||k_i||^2 / (h_i - c)

    where the subspace has just that dimension: on any other subspace, with angles t_j to the first
    one along vectors p_j in it and q_j outside, the trace of A gains at most
    sum_j (q_j^T K p_j)^2 / (p_j^T (H - c) p_j), and the Cauchy-Schwarz inequality does the rest.
    In a larger subspace, since A <= diag(H + K^T K / s, C + s) with s = h_rank - c, it is at most
    the sum of the largest eigenvalues of M = H + K^T K / s, which is at most
    sum_i h_i + ||K U||^2 / s with the leading eigenvectors U of M (convexity).

    What is random: of 16 Gaussian vectors x orthogonal to the subspace, one has x_1^2 > pi / 8
    along the leading eigenvector of C except with probability 2^-16, so that c can be taken from
    c^2p = max ||C^p x||^2 * 8 / pi (after Dixon, 1983; Halko et al., 2011); and the mean of
    ||W x||^2 is more than three times what it estimates, the squared error outside the subspace,
    with probability below 5e-5 (a chi-squared variable of 16 degrees, if one direction has all of
    it). Together these fail with probability below 1e-4. The vectors are fixed: this holds for
    matrices that do not depend on them.

    Args:
        forward: Function x -> W x, for W with entries of at most one.
        backward: Function y -> W^T y.
        basis: Orthonormal tensor (s, n, l) with l >= rank.
        image: W times the basis.
        back: W^T times the image.
        rank: Integer of at least 1.
    """
    larger = basis.shape[-1] - rank
    gram = ops.matmul(_turned(image), image)
    residual = back - _projected(basis, back)
    spill = ops.matmul(_turned(residual), residual)
    rotation = _leading(gram, rank)
    kept, kept_basis = ops.matmul(image, rotation), ops.matmul(basis, rotation)
    energies = ops.sum(ops.square(kept), axis=-2)
    kept_energy = ops.sum(energies, axis=-1)

    probes = keras.random.normal((*basis.shape[:-1], PROBES), seed=0)
    probes = probes - _projected(basis, probes)
    seen = forward(probes)
    outside = ops.mean(ops.sum(ops.square(seen), axis=-2), axis=-1)
    inside = ops.trace(gram, axis1=-2, axis2=-1) - kept_energy if larger else 0.0
    powers, bound = POWERS[larger > 0], 1.0
    for power in range(powers):
        probes = backward(seen if power == 0 else forward(probes))
        probes = probes - _projected(basis, probes)
        bound = bound * ops.max(ops.abs(probes), axis=(-2, -1)) ** (1 / powers)
        probes = _scaled(probes)
    largest = ops.max(ops.sum(ops.square(probes), axis=-2), axis=-1)
    bound = bound * (largest * (8 / math.pi)) ** (1 / (2 * powers))

    gaps = energies - bound[:, None]
    has_gap = ops.all(gaps > 0, axis=-1)
    gaps = ops.where(gaps > 0, gaps, 1.0)
    if larger:
        gap = gaps[:, -1:]
        rotation = _leading(gram + spill / gap[:, None], rank)
        gaps = gap
    spilt = ops.sum(rotation * ops.matmul(spill, rotation), axis=-2)
    gained = ops.sum(ops.maximum(spilt, 0.0) / gaps, axis=-1)
    error = inside + outside / 3
    is_near = ops.logical_and(has_gap, gained <= (1 - (1 + EXCESS) ** -2) * error)
    is_exact = inside + outside <= _ROUNDING**2 * kept_energy
    overlap = ops.abs(ops.matmul(_turned(basis), basis)) - ops.eye(basis.shape[-1])
    is_sound = ops.max(overlap, axis=(-2, -1)) <= _OVERLAP
    return ops.logical_and(is_sound, ops.logical_or(is_near, is_exact)), kept, kept_basis


def _turned(x):
    return ops.swapaxes(x, -1, -2)


def _projected(basis, x):
    return ops.matmul(basis, ops.matmul(_turned(basis), x))


def _orthonormal(x):
    return ops.qr(_scaled(x))[0]


def _scaled(x):
    size = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    return x / ops.where(size > 0, size, 1.0)


def _filled(x):
    """Ones for rows that are not zero: where they are, so are those of the singular vectors."""
    return ops.cast(ops.any(ops.not_equal(x, 0), axis=-1, keepdims=True), x.dtype)


def _leading(symmetric, number):
    """The eigenvectors of the largest eigenvalues, largest first."""
    _, vectors = ops.eigh(symmetric)
    return ops.flip(vectors[..., vectors.shape[-1] - number :], axis=-1)
