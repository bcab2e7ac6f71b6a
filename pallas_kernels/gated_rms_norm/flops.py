"""What the gated norm costs at least. A multiply-add counts as two operations, exponentials apart."""

from __future__ import annotations


def forward(batch: int, length: int, heads: int, head_dim: int) -> int:
    """Floating-point operations of a forward pass, without the exponentials."""
    # Per channel: the sigmoid's negation, sum and quotient, its products with z and x, the square and its sum, and the
    # products with the scale and the weight.
    return batch * length * heads * head_dim * 9


def backward(batch: int, length: int, heads: int, head_dim: int) -> int:
    """Floating-point operations of a backward pass, without the exponentials."""
    # Per channel: the gated input, its square and their sum again; the weighted gradient, its product with the gated
    # input and their sum; three to the gradient of the gated input; dx; five to dz; three to the weight's gradient.
    return batch * length * heads * head_dim * (7 + 3 + 3 + 1 + 5 + 3)


def exponentials(batch: int, length: int, heads: int, head_dim: int) -> int:
    """Exponentials of a forward pass, and as many of a backward pass: the gate's."""
    return batch * length * heads * head_dim


def forward_bytes(batch: int, length: int, heads: int, head_dim: int, *, itemsize: int) -> int:
    """Bytes that a forward pass has to move: reads x and z, writes y, each number ``itemsize`` bytes."""
    return 3 * batch * length * heads * head_dim * itemsize


def backward_bytes(batch: int, length: int, heads: int, head_dim: int, *, itemsize: int) -> int:
    """Bytes that a backward pass has to move: reads x, z and dy, writes dx and dz."""
    return 5 * batch * length * heads * head_dim * itemsize
