"""What a causal convolution costs at least, with bias and SiLU, as the Mamba family calls it.

A multiply-add counts as two operations, exponentials apart. A backward pass recomputes what the activation needs.
"""

from __future__ import annotations


def forward(batch: int, length: int, channels: int, width: int) -> int:
    """Floating-point operations of a forward pass, without the exponentials."""
    return batch * length * channels * (2 * width + 3)


def backward(batch: int, length: int, channels: int, width: int) -> int:
    """Floating-point operations of a backward pass, without the exponentials."""
    # The forward pass again, then as many for dx and for dweight, dbias, and SiLU's derivative.
    return batch * length * channels * (6 * width + 8)


def exponentials(batch: int, length: int, channels: int) -> int:
    """Exponentials of a forward pass, and as many of a backward pass."""
    return batch * length * channels


def forward_bytes(batch: int, length: int, channels: int, *, itemsize: int) -> int:
    """Bytes that a forward pass has to move: reads x, writes y, each number ``itemsize`` bytes."""
    return 2 * batch * length * channels * itemsize


def backward_bytes(batch: int, length: int, channels: int, *, itemsize: int) -> int:
    """Bytes that a backward pass has to move: reads x and dy, writes dx."""
    return 3 * batch * length * channels * itemsize
