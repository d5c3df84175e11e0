"""Integers of any number of bits in a row of bytes."""

import numpy as np

_BLOCK = 1 << 20  # elements at a time; a multiple of 8, so that every block ends with a byte


def num_bytes(count: int, bits: int) -> int:
    """Returns the bytes that `count` integers of `bits` bits take."""
    return (count * bits + 7) // 8


def fits(values: np.ndarray, bits: int, *, signed: bool) -> bool:
    """Whether every integer can be written in so many bits (two's complement if signed)."""
    if values.size == 0:
        return True
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return low <= int(values.min()) and int(values.max()) <= high


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Writes integers one after the other, the lowest bit of each first.

    Args:
        values: integers or booleans of any shape, taken in row-major order. They must fit.
        bits: bits of each, from 1 to 64.

    Returns:
        ceil(size * bits / 8) bytes, as uint8. The bits that are left over in the last are zero.

    Example:
    >>> pack(np.array([1, 2, 3, -1]), 2)
    array([249], dtype=uint8)
    """
    word = _word(bits)
    flat = values.reshape(-1)
    blocks = [np.zeros(0, np.uint8)]
    for start in range(0, flat.size, _BLOCK):
        words = flat[start : start + _BLOCK].astype(word)
        octets = words.view(np.uint8).reshape(words.size, word.itemsize)
        taken = np.unpackbits(octets, axis=1, bitorder="little")[:, :bits]
        blocks.append(np.packbits(taken.reshape(-1), bitorder="little"))
    return np.concatenate(blocks)


def unpack(packed: np.ndarray, count: int, bits: int, *, signed: bool) -> np.ndarray:
    """Reads what `pack` wrote.

    Args:
        packed: num_bytes(count, bits) bytes, as uint8.
        count: number of integers.
        bits: bits of each, from 1 to 64.
        signed: whether the highest bit is a sign.

    Returns:
        The integers, one-dimensional, in the smallest dtype that holds so many bits.

    Example:
    >>> unpack(np.array([249], np.uint8), 4, 2, signed=True)
    array([ 1, -2, -1, -1], dtype=int8)
    """
    word = _word(bits)
    result = np.zeros(count, word)
    for start in range(0, count, _BLOCK):
        number = min(_BLOCK, count - start)
        octets = packed[start * bits // 8 :]
        taken = np.unpackbits(octets, count=number * bits, bitorder="little").reshape(-1, bits)
        whole = np.zeros((number, 8 * word.itemsize), np.uint8)
        whole[:, :bits] = taken
        if signed:
            whole[:, bits:] = taken[:, -1:]
        octets = np.packbits(whole, axis=1, bitorder="little")
        result[start : start + number] = octets.view(word).reshape(-1)
    return result.view(word.str.replace("u", "i")) if signed else result


def _word(bits: int) -> np.dtype:
    """The smallest unsigned integer that holds so many bits, its low byte first."""
    size = next(size for size in (1, 2, 4, 8) if bits <= 8 * size)
    return np.dtype(f"<u{size}")
