"""What the SSD operator costs at least, with D, delta_bias and softplus, as Mamba-2 calls it.

Counted per token, head and channel from the recurrence, a multiply-add as two operations, exponentials and the like
apart: so the count does not depend on the chunks, whose masked attention adds to it. A backward pass is one that
recomputes the states: it then never has them in memory.
"""

from __future__ import annotations


def forward(batch: int, length: int, heads: int, head_dim: int, state: int) -> int:
    """Floating-point operations of a forward pass, without the exponentials."""
    # Per state: decay h, (delta x) B and their sum, C h and its sum. Per channel: delta x, D x and its sum. Per head:
    # bias, softplus's sum, both limits, delta A.
    return batch * length * heads * (head_dim * (5 * state + 3) + 5)


def backward(batch: int, length: int, heads: int, head_dim: int, state: int) -> int:
    """Floating-point operations of a backward pass, without the exponentials."""
    # Per state: the three that recompute h. The adjoint state: C dy, its sum, the decay. Then the sums that make dB,
    # dC, d(delta x) and d(decay), two each. Per channel: delta x, its part of d(delta), dx, dD and what D adds to dx.
    # Per head: those of the forward pass, and their slopes.
    return batch * length * heads * (head_dim * (14 * state + 8) + 12)


def forward_products(batch: int, length: int, heads: int, head_dim: int, state: int) -> int:
    """Operations of a forward pass that matrix units can do, and that every form does which carries a state."""
    # (delta x) B into the state, C h out of it.
    return batch * length * heads * head_dim * state * 2 * 2


def backward_products(batch: int, length: int, heads: int, head_dim: int, state: int) -> int:
    """Operations of a backward pass that matrix units can do, see ``forward_products``."""
    # h and the adjoint state, and of these dB, dC and d(delta x); the decays' gradients are sums of the same terms.
    return batch * length * heads * head_dim * state * 2 * 5


def exponentials(batch: int, length: int, heads: int) -> int:
    """Exponentials of a forward pass, and as many of a backward pass: the decay's and two in the softplus."""
    return batch * length * heads * 3


def forward_bytes(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, groups: int = 1, itemsize: int
) -> int:
    """Bytes that a forward pass has to move: reads x, delta, B and C, writes y and the final state.

    Args:
        batch: rows.
        length: tokens a row.
        heads: heads.
        head_dim: channels a head.
        state: size of each channel's state.
        groups: groups of heads with a B and C of their own.
        itemsize: bytes a number of the inputs takes; the state is float32.
    """
    per_token = heads * (2 * head_dim + 1) + 2 * groups * state
    return batch * length * per_token * itemsize + 4 * batch * heads * head_dim * state


def backward_bytes(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, groups: int = 1, itemsize: int
) -> int:
    """Bytes that a backward pass has to move: reads the inputs and dy, writes their gradients; see forward_bytes."""
    per_token = heads * (3 * head_dim + 2) + 4 * groups * state
    return batch * length * per_token * itemsize
