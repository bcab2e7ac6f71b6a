"""Which calls a benchmark times: the shapes the project is judged by, and sweeps over length and state."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from benchmarks import SUITES, peers
from benchmarks.operators import ATTENTION, OPERATORS, Direction, Operator, Shape

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

Call = tuple[str, str, Direction, frozenset[tuple[str, int]]]
"""Operator, implementation, direction and shape; suites share some."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    suite: str
    operator: Operator
    implementation: str
    """One of the operator's, or a CUDA package."""
    direction: Direction
    shape: Shape

    @property
    def call(self) -> Call:
        """What is measured."""
        return self.operator.name, self.implementation, self.direction, frozenset(self.shape.items())


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of one benchmark."""

    tokens: tuple[tuple[int, int, int], ...]
    """(batch, length, channels)"""
    state: int
    """Of the selective scan."""
    ssd_state: int
    width: int
    lengths: tuple[int, ...]
    sweep_channels: int
    """Of the sweeps. Attention gets half as many, which is what a block of the same model has."""
    head_dim: int
    states: tuple[int, ...]
    state_tokens: tuple[int, int]
    """(batch, length) of the sweep over states."""


FULL = Sizes(
    tokens=((8, 2048, 5120), (8, 2048, 1536), (1, 2048, 1536), (1, 131072, 1536)),
    state=16,
    ssd_state=128,
    width=4,
    lengths=tuple(2**i for i in range(9, 18)),
    sweep_channels=1536,
    head_dim=64,
    states=(1, 4, 16, 64, 128, 256),
    state_tokens=(8, 2048),
)
QUICK = Sizes(
    tokens=((2, 64, 96),),
    state=4,
    ssd_state=8,
    width=4,
    lengths=(32, 64, 128, 256),
    sweep_channels=64,
    # Many heads: a gradient of few numbers, all of them sums, may happen to be nothing but rounding errors.
    head_dim=8,
    states=(2, 4, 8),
    state_tokens=(1, 64),
)


def cases(sizes: Sizes, names: Sequence[str], suites: Sequence[str], *, on_gpu: bool) -> Iterator[Case]:
    """Lists what to measure.

    Args:
        sizes: shapes.
        names: of operators.
        suites: of ``SUITES``.
        on_gpu: whether there is a GPU for the implementations that need one.
    """
    for suite in suites:
        for operator, shape in _calls(sizes, names, suite):
            wanted = _implementations(sizes, suite, operator, shape) if on_gpu else ("xla",)
            for direction, implementation in itertools.product(DIRECTIONS, wanted):
                yield Case(suite, operator, implementation, direction, shape)


def _implementations(sizes: Sizes, suite: str, operator: Operator, shape: Shape) -> tuple[str, ...]:
    if operator is ATTENTION:
        return operator.implementations[:1]
    wanted = operator.implementations
    # XLA's forms compile the longest, and loop over chunks of one size, so that their times grow evenly with the
    # length: beside the kernels, half the points draw the same line.
    if suite == "length" and shape["length"] not in sizes.lengths[::2]:
        wanted = tuple(name for name in wanted if name != "xla")
    package = peers.package(operator.name)
    return wanted if package is None else (*wanted, package)


def _calls(sizes: Sizes, names: Sequence[str], suite: str) -> Iterator[tuple[Operator, Shape]]:
    match suite:
        case "shapes":
            for name, tokens in itertools.product(names, sizes.tokens):
                yield OPERATORS[name], _shape(sizes, name, *tokens)
        case "length":
            for length in sizes.lengths:
                for name in names:
                    yield OPERATORS[name], _shape(sizes, name, 1, length, sizes.sweep_channels)
                if any(OPERATORS[name].has_state for name in names):
                    heads = sizes.sweep_channels // 2 // sizes.head_dim
                    yield ATTENTION, {"batch": 1, "length": length, "heads": heads, "head_dim": sizes.head_dim}
        case "state":
            for state in sizes.states:
                of_state = dataclasses.replace(sizes, state=state, ssd_state=state)
                for name in names:
                    # A state of 1 has no pairs that could rotate.
                    if OPERATORS[name].has_state and not (name == "trapezoidal_ssd" and state == 1):
                        yield OPERATORS[name], _shape(of_state, name, *sizes.state_tokens, sizes.sweep_channels)
        case _:
            raise ValueError(f"suite must be one of {SUITES}, got {suite!r}")


def _shape(sizes: Sizes, name: str, batch: int, length: int, channels: int) -> Shape:
    match name:
        case "ssd":
            heads = {"heads": channels // sizes.head_dim, "head_dim": sizes.head_dim, "groups": 1}
            return {"batch": batch, "length": length, **heads, "state": sizes.ssd_state}
        case "trapezoidal_ssd":
            ssd = _shape(sizes, "ssd", batch, length, channels)
            # A rank of one is SISO; half of the state rotates, in pairs.
            return {**ssd, "rank": 1, "pairs": max(1, sizes.ssd_state // 4)}
        case "gated_rms_norm":
            heads = {"heads": channels // sizes.head_dim, "head_dim": sizes.head_dim}
            return {"batch": batch, "length": length, **heads}
        case "causal_conv1d":
            return {"batch": batch, "length": length, "channels": channels, "width": sizes.width}
        case _:
            return {"batch": batch, "length": length, "channels": channels, "state": sizes.state}
