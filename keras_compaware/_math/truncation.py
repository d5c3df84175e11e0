"""The best approximation of a given rank, without a full decomposition wherever that is proven."""

import math

import keras
from keras import ops

from keras_compaware._math.svd import svd

EXCESS = 1e-3
"""How far the error of an approximation may lie above the least one, as a fraction of it."""

PROBES = 16
WARM = (2, 0.35)  # degree of the polynomial of `certified`, and where it starts to grow
COLD = ((9, (5, 0.6)), (16, (8, 0.75)))  # blocks of the Krylov spaces, and their polynomials
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
        144, from a random start (Musco & Musco, 2015), and if that does not hold, continued to 5
        rank dimensions, which serve flat spectra as well. If neither holds,
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
        find = _first(lambda: attempt(matrix, rank), find)
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
    """Returns `(whether it holds for all matrices, left, right)` from earlier factors."""
    problem = _Problem(matrix)
    longer = _turned(previous[1]) if problem.is_wide else previous[0]
    mapped = problem.backward(_scaled(longer))
    basis = _orthonormal(mapped) * _filled(mapped)
    return problem.factors(*certified(problem.forward, problem.backward, basis, rank, WARM))


def attempt(matrix, rank):
    """Returns `(whether it holds for all matrices, left, right)` from a random start."""
    problem = _Problem(matrix)
    forward, backward = problem.forward, problem.backward
    width = max(_LEAST_WIDTH, 8 * round(rank / 24))  # products are fast at multiples of 8
    (few, polynomial), (many, slow_polynomial) = COLD
    number = min(few * width, rank + max(_LEAST_WIDTH, rank // 2))
    start = keras.random.normal((matrix.shape[0], min(matrix.shape[1:]), width), seed=1)
    basis, gram, following = krylov_space(forward, backward, start, few)
    found = certified(forward, backward, leading(basis, gram, number), rank, polynomial)

    def longer():
        basis_, gram_, _ = krylov_space(forward, backward, (basis, gram, following), many)
        return certified(forward, backward, leading(basis_, gram_, number), rank, slow_polynomial)

    return problem.factors(*ops.cond(ops.all(found[0]), lambda: found, longer))


class _Problem:
    """A stack of matrices of entries of at most one, standing upright, by its products alone."""

    def __init__(self, matrix):
        self.matrix, self.is_wide = matrix, matrix.shape[-2] < matrix.shape[-1]
        highest, lowest = (
            extreme(matrix, axis=(-2, -1), keepdims=True) for extreme in (ops.max, ops.min)
        )
        size = ops.maximum(highest, -lowest)  # no temporary of the matrix's size
        self.unit = ops.where(size > 0, size, 1.0)  # squares neither overflow nor vanish

    def forward(self, x):
        return self._transposed_times(x) if self.is_wide else self._times(x)

    def backward(self, y):
        return self._times(y) if self.is_wide else self._transposed_times(y)

    def _times(self, x):
        return ops.matmul(self.matrix, x) / self.unit

    def _transposed_times(self, x):
        return _turned(ops.matmul(_turned(x), self.matrix)) / self.unit

    def factors(self, holds, image, basis):
        """Returns `(whether all hold, left, right)` of the approximation image basis^T."""
        root = ops.sqrt(ops.sqrt(ops.sum(ops.square(image), axis=-2, keepdims=True)))
        image = image / ops.where(root > 0, root, 1.0) * ops.sqrt(self.unit)
        basis = basis * root * ops.sqrt(self.unit)
        factors = (basis, _turned(image)) if self.is_wide else (image, _turned(basis))
        return ops.all(holds), *factors


def krylov_space(forward, backward, start, blocks):
    """Returns `(basis (s, n, l), basis^T A basis, next block)` of a block Krylov space.

    Each block is A = W^T W times the one before, made orthogonal to all before (block Lanczos with
    full orthogonalisation).

    Args:
        forward: Function x -> W x.
        backward: Function y -> W^T y.
        start: Tensor (s, n, width), or a shorter space that is continued.
        blocks: Number of blocks; l is `blocks` times the width.
    """
    if isinstance(start, tuple):
        basis, gram, new = start
    else:
        new = backward(forward(start))
        new = _orthonormal(new) * _filled(new)
        basis, gram = new[..., :0], ops.matmul(_turned(new[..., :0]), new[..., :0])
    width = new.shape[-1]
    filled = _filled(ops.concatenate([basis, new], axis=-1))  # the same for every block
    for _ in range(basis.shape[-1] // width, blocks):
        basis = ops.concatenate([basis, new], axis=-1)
        mapped = backward(forward(new))
        column = ops.matmul(_turned(basis), mapped)
        row = _turned(column[..., :-width, :])
        gram = ops.concatenate([ops.concatenate([gram, row], axis=-2), column], axis=-1)
        new = _orthonormal(mapped - ops.matmul(basis, column)) * filled
        # Once leaves what rounding has mixed in.
        new = _orthonormal(new - _projected(basis, new)) * filled
    return basis, gram, new


def leading(basis, gram, number):
    """Returns the basis (s, n, number) of the leading Ritz vectors in a subspace."""
    return ops.matmul(basis, _leading((gram + _turned(gram)) / 2, number))


def certified(forward, backward, basis, rank, polynomial):
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
    along the leading eigenvector of C except with probability 2^-16. A Chebyshev polynomial T_d
    that is bounded by one up to b has grown beyond it to what
    max ||T_d(2 C / b - 1) x|| * sqrt(8 / pi) allows, from which follows c (as Dixon, 1983, from
    powers); and the mean of ||W x||^2 is more than three times what it estimates, the squared error
    outside the subspace, with probability below 5e-5 (a chi-squared variable of 16 degrees, if one
    direction has all of it). Together these fail with probability below 1e-4. The vectors are
    fixed: this holds for matrices that do not depend on them.

    Args:
        forward: Function x -> W x, for W with entries of at most one.
        backward: Function y -> W^T y.
        basis: Orthonormal tensor (s, n, l) with l >= rank.
        rank: Integer of at least 1.
        polynomial: Degree d, and the largest b over h_rank; it is no more than twice what C makes
            of the vectors x in the quadratic mean, either.
    """
    larger = basis.shape[-1] - rank
    image = forward(basis)
    back = backward(image)
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
    degree, share = polynomial
    mapped = backward(seen)
    mapped = mapped - _projected(basis, mapped)
    average = ops.sqrt(_mean_square(mapped) / _mean_square(probes))
    end = ops.minimum(share * energies[:, -1], 2 * average)
    end = ops.where(end > 0, end, 1.0)[:, None, None]
    before, probes = probes, mapped * (2 / end) - probes
    for _ in range(degree - 1):
        mapped = backward(forward(probes))
        mapped = (mapped - _projected(basis, mapped)) * (2 / end) - probes
        before, probes = probes, 2 * mapped - before
    grown = ops.sqrt(ops.max(ops.sum(ops.square(probes), axis=-2), axis=-1) * (8 / math.pi))
    place = ops.cosh(ops.arccosh(ops.maximum(grown, 1.0)) / degree)
    bound = end[:, 0, 0] * (1 + place) / 2

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


def _mean_square(x):
    return ops.mean(ops.square(x), axis=(-2, -1))


def _orthonormal(x):
    return ops.qr(_scaled(x))[0]


def _scaled(x):
    size = ops.max(ops.abs(x), axis=(-2, -1), keepdims=True)
    return x / ops.where(size > 0, size, 1.0)


def _filled(x):
    """Ones for rows that are not zero: where they are, so are those of the singular vectors."""
    return ops.cast(ops.any(ops.not_equal(x, 0), axis=-1, keepdims=True), x.dtype)


def _leading(symmetric, number):
    """The eigenvectors of the largest eigenvalues, largest first.

    Made orthogonal to rounding by a Newton-Schulz step: those of TensorFlow are 1e-4 off in large
    matrices.
    """
    _, vectors = ops.eigh(symmetric)
    found = ops.flip(vectors[..., vectors.shape[-1] - number :], axis=-1)
    return 1.5 * found - 0.5 * ops.matmul(found, ops.matmul(_turned(found), found))
