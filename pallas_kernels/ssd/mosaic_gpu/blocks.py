"""What the SSD kernels share: sizes, moves between memories and registers, and the walk over the chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import interpreted, plgpu
from pallas_kernels.mosaic_gpu_launch import Refs

CHUNK = 64
"""Tokens of a chunk: the rows that one matrix instruction of a warpgroup computes."""
CHANNELS = 64
"""Channels of a head, as the kernels see it: wider heads are several of these that decay alike."""
STATE_UNIT = 64
"""Sizes of the state are multiples of this: a row of swizzled shared memory in 16-bit numbers."""
AHEAD = 2
"""Chunks whose weights the forward kernel has in shared memory at once: one in use, one in the making."""
TOKEN_ROWS = 3
"""Numbers of a head and token in "tokens", see ``tokens.pack``; own weights are one more."""
OWN_WEIGHT = TOKEN_ROWS
"""The row of own weights."""

LAYOUT = plgpu.Layout.WGMMA
"""Registers of a matrix: 16 rows a warp, as matrix instructions leave their results."""
ROWS = LAYOUT.reduce(1)
"""Registers of a number a row of a matrix."""
COLUMNS = LAYOUT.reduce(0)
"""Registers of a number a column of a matrix."""

_OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]


class Block(NamedTuple):
    """Which piece of the problem this warpgroup works on."""

    batch: Any
    part: Any
    group: Any
    head: Any
    warpgroup: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes of one call, and how it is cut.

    The kernels' inputs are, in 16 bits: "x" and "dy", (batch, length, heads · CHANNELS); "B" and "C", (batch, length,
    groups · state); "states" and "dstates", (batch, heads, chunks, CHANNELS, state), a state before and a gradient
    after each chunk. In float32: "tokens", (batch, heads / pieces, chunks, token_rows, CHUNK), or with more heads; "D",
    (heads, CHANNELS); perhaps "start", (batch, parts, heads, CHANNELS, state), what a walk begins with, or else zeros.
    The length is a whole number of chunks.
    """

    batch: int
    chunks: int
    heads: int
    pieces: int
    """Heads in a row that have the same tokens."""
    groups: int
    state: int
    warpgroups: int
    """Heads that a block walks with, a warpgroup each; they share B and C."""
    stages: int
    """Chunks in shared memory at once, one in use and the others on their way."""
    parts: int
    """Pieces that the length is cut into, which run at the same time; the last one may be shorter, but not empty."""
    rank: int = 1
    """Rows of a chunk that are one token, the inputs and outputs of which see each other; it divides the chunk."""
    own_weights: bool = False
    """Whether a token's input enters the token's own output with a weight of its own."""
    pairs: int = 0
    """Angles of a head and token in "angles", 16-bit integers, (batch, heads / pieces, chunks, CHUNK, pairs). Where
    there are some, kernels turn what they load to make a group's B and C; see ``turning``."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """Inputs of numbers by head and token."""
        return ("tokens", "angles") if self.pairs else ("tokens",)

    def matrix_columns(self, group: Any) -> Any:
        """Where the states of a group's B and C are in memory."""
        return pl.ds(group * self.state, self.state)

    @property
    def token_rows(self) -> int:
        return TOKEN_ROWS + self.own_weights

    @property
    def chunks_per_part(self) -> int:
        return -(-self.chunks // self.parts)

    def chunks_of_part(self, part: Any) -> Any:
        """The chunks that a part has."""
        if self.chunks % self.parts == 0:
            return self.chunks_per_part
        return jnp.minimum(self.chunks_per_part, self.chunks - part * self.chunks_per_part)

    @property
    def heads_per_group(self) -> int:
        return self.heads // self.groups

    def token_head(self, head: Any) -> Any:
        """Where a head's numbers are in "tokens"."""
        return head // self.pieces

    @property
    def blocks_per_group(self) -> int:
        return -(-self.heads_per_group // self.warpgroups)

    def block(self, warpgroup: Any = None) -> Block:
        """The block that is running, and the warpgroup, unless another one of the block is named.

        Where the heads of a group are no whole number of blocks, warpgroups repeat the last head: they write the same
        numbers to the same places.
        """
        index = lax.axis_index("heads")
        group = index // self.blocks_per_group
        warpgroup = lax.axis_index("warpgroup") if warpgroup is None else warpgroup
        member = lax.rem(index, self.blocks_per_group) * self.warpgroups + warpgroup
        head = group * self.heads_per_group + jnp.minimum(member, self.heads_per_group - 1)
        return Block(lax.axis_index("batch"), lax.axis_index("part"), group, head, warpgroup)

    def states_type(self, dtype: Any) -> jax.ShapeDtypeStruct:
        """Type of a state a chunk."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, CHANNELS, self.state), dtype)

    def part_states_type(self) -> jax.ShapeDtypeStruct:
        """Type of a state a part, in float32."""
        return jax.ShapeDtypeStruct((self.batch, self.parts, self.heads, CHANNELS, self.state), jnp.float32)

    def tokens_type(self) -> jax.ShapeDtypeStruct:
        """Type of a number a token and head."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, CHUNK), jnp.float32)

    def start(self, gmem: Refs, block: Block) -> jax.Array:
        """What the walk of a block's part begins with, in registers."""
        if "start" not in gmem:
            return plgpu.layout_cast(jnp.zeros((CHANNELS, self.state), jnp.float32), LAYOUT)
        # The product marks it as varying over a mesh's axes where the other operations' results are not.
        return load(gmem["start"].at[block.batch, block.part, block.head]) * 1.0

    def walk_buffers(self, matrices: Sequence[str], signal: str, dtype: Any) -> dict[str, Any]:
        """Shared memory and barriers of ``walk``."""
        per_head = (self.warpgroups, self.stages)
        angles = {"angles": plgpu.SMEM((*per_head, CHUNK, self.pairs), jnp.int16)} if self.pairs else {}
        arrivals = len(matrices) + (1 + len(self.numbers)) * self.warpgroups
        return {
            **{name: operand(self.stages, CHUNK, self.state, dtype=dtype) for name in matrices},
            **angles,
            signal: operand(*per_head, CHUNK, CHANNELS, dtype=dtype),
            "tokens": plgpu.SMEM((*per_head, self.token_rows, CHUNK), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.stages),
            "free": plgpu.Barrier(num_arrivals=self.warpgroups, num_barriers=self.stages),
        }

    def walk(
        self,
        gmem: Refs,
        smem: Refs,
        block: Block,
        matrices: Sequence[str],
        signal: str,
        step: Callable[[Any, Refs, Callable[[], None], Any], Any],
        carry: Any,
        *,
        reverse: bool = False,
    ) -> Any:
        """Walks over the chunks of the block's part while the next ones are loaded.

        Args:
            gmem: references to the inputs.
            smem: references to the buffers of ``walk_buffers``.
            block: where.
            matrices: inputs that all warpgroups of the block share.
            signal: the input of each head.
            step: ``step(chunk, refs, release, carry) -> carry``, with references to the loaded chunk by name, "tokens"
                among them. It must call ``release()`` once, when copies out of the last chunk's buffers have ended.
            carry: passed from chunk to chunk.
            reverse: whether to start with the last chunk.
        """
        count, stages = self.chunks_of_part(block.part), self.stages
        first = block.part * self.chunks_per_part

        def chunk(i: Any) -> Any:
            return first + (count - 1 - i if reverse else i)

        def load(i: Any, slot: Any) -> None:
            rows, full = chunk_rows(chunk(i)), smem["full"].at[slot]
            for name in matrices:
                columns = self.matrix_columns(block.group)
                plgpu.copy_gmem_to_smem(gmem[name].at[block.batch, rows, columns], smem[name].at[slot], full)
            for warpgroup in range(self.warpgroups):
                # The leader is warpgroup 0, so this is each one's head.
                last = (block.group + 1) * self.heads_per_group - 1
                head = jnp.minimum(block.head + warpgroup, last)
                source = gmem[signal].at[block.batch, rows, head_channels(head)]
                plgpu.copy_gmem_to_smem(source, smem[signal].at[warpgroup, slot], full)
                for name in self.numbers:
                    source = gmem[name].at[block.batch, self.token_head(head), chunk(i)]
                    plgpu.copy_gmem_to_smem(source, smem[name].at[warpgroup, slot], full)

        is_leader = block.warpgroup == 0

        @pl.when(is_leader)
        def _() -> None:
            for i in range(stages):
                pl.when(i < count)(functools.partial(load, i, i))

        def walk_chunk(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, stages)

            def release() -> None:
                last = lax.rem(i + stages - 1, stages)

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(smem["free"].at[last])

                @pl.when(is_leader & (i > 0) & (i - 1 + stages < count))
                def _() -> None:
                    plgpu.barrier_wait(smem["free"].at[last])
                    load(i - 1 + stages, last)

            plgpu.barrier_wait(smem["full"].at[slot])
            refs = {name: smem[name].at[slot] for name in matrices}
            refs |= {name: smem[name].at[block.warpgroup, slot] for name in (signal, *self.numbers)}
            return step(chunk(i), refs, release, carry)

        carry = lax.fori_loop(0, count, walk_chunk, carry)
        plgpu.wait_smem_to_gmem(0)
        return carry


def chunk_rows(chunk: Any) -> Any:
    """Tokens of a chunk."""
    return pl.ds(chunk * CHUNK, CHUNK)


def head_channels(head: Any) -> Any:
    """Channels of a head."""
    return pl.ds(head * CHANNELS, CHANNELS)


def operand(*shape: int, dtype: Any) -> Any:
    """Shared memory for matrices that matrix instructions read: the last two dimensions."""
    return plgpu.SMEM(shape, dtype, transforms=_OPERAND)


def transposed(ref: Any) -> Any:
    """The transpose of a matrix in shared memory."""
    return ref.transpose((1, 0))


def product(*operands: tuple[Any, Any], plus: jax.Array | None = None) -> jax.Array:
    """Sum of matrix products, and of what is in registers already, in float32.

    Each of the operands is a reference, or the left one an array in registers.
    """
    (result,) = products((operands, plus))
    return result


def products(
    *sums: tuple[Sequence[tuple[Any, Any]], jax.Array | None], meanwhile: Callable[[], Any] | None = None
) -> tuple[Any, ...]:
    """Several of ``product`` at once.

    Args:
        sums: the operands of each, and what is added to them or None.
        meanwhile: what to do while the matrix instructions run.

    Returns:
        The products, and then what ``meanwhile`` returned, if there is one.
    """
    if interpreted():
        results = tuple(_interpreted_product(*operands_and_plus) for operands_and_plus in sums)
        return results if meanwhile is None else (*results, meanwhile())

    def run(*accumulators: Any) -> tuple[Any, ...]:
        for accumulator, (operands, plus) in zip(accumulators, sums, strict=True):
            if plus is not None:
                accumulator[...] = plus
            for a, b in operands:
                plgpu.wgmma(accumulator, a, b)
        extra = () if meanwhile is None else (meanwhile(),)
        return (*(accumulator[...] for accumulator in accumulators), *extra)

    shapes = [(operands[0][0].shape[0], operands[0][1].shape[1]) for operands, _ in sums]
    return pl.run_scoped(run, *[plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for shape in shapes])


def _interpreted_product(operands: Sequence[tuple[Any, Any]], plus: jax.Array | None) -> jax.Array:
    # The interpreter knows neither operands in registers nor accumulators that start with values.
    matrices = [[m if isinstance(m, jax.Array) else m[...] for m in pair] for pair in operands]
    total = functools.reduce(jnp.add, (jnp.dot(*(m.astype(jnp.float32) for m in pair)) for pair in matrices))
    return total if plus is None else plus + total


def load(ref: Any, layout: Any = LAYOUT) -> jax.Array:
    """Loads an array as float32."""
    return load_operand(ref, layout).astype(jnp.float32)


def load_operand(ref: Any, layout: Any = LAYOUT) -> jax.Array:
    """Loads an array as it is."""
    return plgpu.load(ref, layout=layout, optimized=False)


def by_row(numbers: jax.Array, columns: int) -> jax.Array:
    """Repeats a number a row in all columns of a matrix."""
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (numbers.shape[0], columns), (0,)), LAYOUT)


def by_column(numbers: jax.Array, rows: int) -> jax.Array:
    """Repeats a number a column in all rows of a matrix."""
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (rows, numbers.shape[0]), (1,)), LAYOUT)


def decays(tokens: Any, *, transpose: bool = False, rank: int = 1) -> jax.Array:
    """What is left at the row's token of what the column's token added; where that comes later, whatever: infinite too.

    Args:
        tokens: reference to a head's numbers in a chunk, own weights among them or not.
        transpose: whether rows and columns change places.
        rank: rows that are one token.
    """
    here, there = (COLUMNS, ROWS) if transpose else (ROWS, COLUMNS)
    here_by, there_by = (by_column, by_row) if transpose else (by_row, by_column)
    exponent = here_by(load(tokens.at[0], here), CHUNK) - there_by(load(tokens.at[1], there), CHUNK)
    if tokens.shape[0] == TOKEN_ROWS:
        return jnp.exp2(exponent)
    row, column = token_coordinates(rank)
    return jnp.where(row == column, there_by(load(tokens.at[OWN_WEIGHT], there), CHUNK), jnp.exp2(exponent))


def finite(decays: jax.Array) -> jax.Array:
    """Bounds what tokens that come later are given, so that a product with zero is zero; no decay is as large."""
    return jnp.minimum(decays, 2.0**64)


def coordinates(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Row and column of every number of a matrix."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=LAYOUT) for dim in (0, 1))
    return row, column


def token_coordinates(rank: int) -> tuple[jax.Array, jax.Array]:
    """Token of the row and of the column of every number of a chunk's attention, counted within the chunk."""
    row, column = coordinates((CHUNK, CHUNK))
    # Powers of two: shifts, where a division would be many instructions.
    shift = rank.bit_length() - 1
    return row >> shift, column >> shift
