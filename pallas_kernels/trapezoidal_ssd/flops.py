"""What the trapezoidal SSD operator costs at least, with everything that Mamba-3 calls it with.

Counted per token, head and channel from the recurrence in the form with one input a token (see ``xla.py``), a
multiply-add as two operations, exponentials and the like apart: so the count does not depend on the chunks, whose
masked attention adds to it. A backward pass is one that recomputes the states: it then never has them in memory.
"""

from __future__ import annotations

from pallas_kernels.ssd import flops as ssd_flops


def forward(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, pairs: int, rank: int = 1, gated: bool = True
) -> int:
    """Floating-point operations of a forward pass, without exponentials, sines and cosines.

    Args:
        batch: rows.
        length: tokens a row.
        heads: heads.
        head_dim: channels a head.
        state: size of each channel's state.
        pairs: components of the state that rotate, divided by two.
        rank: inputs and outputs a head.
        gated: whether there is z.
    """
    # Per state: decay, and for each rank (weight x) B and its sum, C h and its sum.
    recurrence = head_dim * state * (1 + 4 * rank)
    # What a token's own output does not see yet: C B, its weight, its products with x and their sums.
    own = rank**2 * (2 * state + 1 + 2 * head_dim)
    # For B and C: bias and rotation; for the angle its product and sum.
    matrices = 2 * rank * (state + 6 * pairs) + 2 * pairs
    # Per channel and rank: weight x, D x and its sum, the gate's product, sum and quotient, and its product with y.
    channels = head_dim * rank * (3 + 4 * gated)
    if rank > 1:
        # The three weights of each rank, and the sum over ranks.
        channels += head_dim * ((2 + gated) * rank + rank - 1)
    # Bias, softplus's sum and largest, delta A, the two weights and their sum.
    scalars = 8
    return batch * length * heads * (recurrence + own + matrices + channels + scalars)


def backward(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, pairs: int, rank: int = 1, gated: bool = True
) -> int:
    """Floating-point operations of a backward pass, without exponentials, sines and cosines; see ``forward``."""
    # Per state: what recomputes h and, for each rank, C dy and its sum; the decay of the adjoint state; then the sums
    # that make dB, dC and dx of each rank, and d(decay), two each.
    recurrence = head_dim * state * (4 + 10 * rank)
    # C B once more, its gradient from dy and x, and what that gives to B, C and x.
    own = rank**2 * (3 * 2 * state + 2 * 2 * head_dim + 2)
    # Forward once more, back, and the gradient of the angle.
    matrices = 2 * rank * (2 * (state + 6 * pairs) + 3 * pairs) + 2 * pairs
    channels = head_dim * rank * (2 * (3 + 4 * gated) + 3)
    if rank > 1:
        channels += 3 * head_dim * (2 + gated) * rank
    scalars = 3 * 8
    return batch * length * heads * (recurrence + own + matrices + channels + scalars)


def forward_products(batch: int, length: int, heads: int, head_dim: int, state: int, *, rank: int = 1) -> int:
    """Operations of a forward pass that matrix units can do, and that every form does which carries a state."""
    return rank * ssd_flops.forward_products(batch, length, heads, head_dim, state)


def backward_products(batch: int, length: int, heads: int, head_dim: int, state: int, *, rank: int = 1) -> int:
    """Operations of a backward pass that matrix units can do, see ``forward_products``."""
    return rank * ssd_flops.backward_products(batch, length, heads, head_dim, state)


def exponentials(
    batch: int, length: int, heads: int, head_dim: int, *, pairs: int, rank: int = 1, gated: bool = True
) -> int:
    """Exponentials, sines and cosines of a forward pass, and as many of a backward pass.

    They are the decay's, two in the softplus, two of each angle, and one of the gate of each channel and rank.
    """
    return batch * length * heads * (3 + 2 * pairs + gated * head_dim * rank)


def forward_bytes(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, pairs: int, rank: int = 1, groups: int = 1,
    itemsize: int, gated: bool = True,
) -> int:  # fmt: skip
    """Bytes that a forward pass has to move: reads what each token brings, writes y and the final state.

    Args:
        batch: rows.
        length: tokens a row.
        heads: heads.
        head_dim: channels a head.
        state: size of each channel's state.
        pairs: components of the state that rotate, divided by two.
        rank: inputs and outputs a head.
        groups: groups of heads with a B and C of their own.
        itemsize: bytes a number of the inputs takes; the state is float32.
        gated: whether there is z.
    """
    # x, z and y; delta, A and lambda.
    per_token = heads * ((2 + gated) * head_dim + 3) + 2 * groups * rank * state + pairs
    final_state = heads * (head_dim * state + rank * state + head_dim + pairs)
    return batch * length * per_token * itemsize + 4 * batch * final_state


def backward_bytes(
    batch: int, length: int, heads: int, head_dim: int, state: int, *, pairs: int, rank: int = 1, groups: int = 1,
    itemsize: int, gated: bool = True,
) -> int:  # fmt: skip
    """Bytes that a backward pass has to move: reads the inputs and dy, writes their gradients; see forward_bytes."""
    per_token = heads * ((3 + 2 * gated) * head_dim + 6) + 4 * groups * rank * state + 2 * pairs
    return batch * length * per_token * itemsize
