"""What a selective scan costs at least, with D, z, delta_bias, softplus and real A, as Mamba-1 calls it.

Counted per token and channel from the recurrence, a multiply-add as two operations, exponentials and the like apart.
A backward pass is one that recomputes the states: it then never has them in memory.
"""

from __future__ import annotations


def forward(batch: int, length: int, channels: int, state: int) -> int:
    """Floating-point operations of a forward pass, without the exponentials."""
    # Per state: delta A, decay h, (delta x) B and their sum, C h and its sum. Per channel: bias, softplus's sum,
    # delta x, D x and its sum, and the gate's sum, quotient and product.
    return batch * length * channels * (6 * state + 8)


def backward(batch: int, length: int, channels: int, state: int) -> int:
    """Floating-point operations of a backward pass, without the exponentials."""
    # Per state: the four that recompute h. The adjoint state: C dy, its sum, the decay. Then the sums that make
    # dB, dC, d(delta x), dA and d(delta), two each, and what the last two share, the adjoint times the decayed state.
    return batch * length * channels * (18 * state + 24)


def exponentials(batch: int, length: int, channels: int, state: int) -> int:
    """Exponentials of a forward pass, and as many of a backward pass: one a state, two in softplus, one in the gate."""
    return batch * length * channels * (state + 3)


def forward_bytes(batch: int, length: int, channels: int, state: int, *, groups: int = 1, itemsize: int) -> int:
    """Bytes that a forward pass has to move: reads x, delta, z, B, C and A, writes y and the final state.

    Args:
        batch: rows.
        length: tokens a row.
        channels: channels.
        state: size of each channel's state.
        groups: groups of channels with a B and C of their own.
        itemsize: bytes a number of the inputs takes; A and the state are float32.
    """
    per_token = 4 * channels + 2 * groups * state
    return batch * length * per_token * itemsize + 4 * channels * state * (1 + batch)


def backward_bytes(batch: int, length: int, channels: int, state: int, *, groups: int = 1, itemsize: int) -> int:
    """Bytes that a backward pass has to move: reads the inputs and dy, writes their gradients; see forward_bytes."""
    per_token = 7 * channels + 4 * groups * state
    return batch * length * per_token * itemsize + 4 * channels * state * 2
