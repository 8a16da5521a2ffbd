"""Numbers that depend on a key alone: never on the numpy version, the order or the process."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the step of SplitMix64


def mix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of the 64-bit words.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014, figure 16.

    Args:
        x: [...] uint64.
    Returns:
        [...] uint64.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed_words(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """One 64-bit word per index, all different within a (seed, stream).

    Args:
        seed, stream: any integers, taken modulo 2^64.
        index: [n] integers.
    Returns:
        [n] uint64.
    """
    key = np.array([seed % 2**64], np.uint64)
    key = mix64(mix64(key + _GOLDEN) + np.array([stream % 2**64], np.uint64) * _GOLDEN)
    return mix64(key + (np.asarray(index).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """[n] int64 permutation of range(n), a function of (seed, epoch, n) alone."""
    return np.argsort(keyed_words(seed, epoch, np.arange(n)), kind="stable")
