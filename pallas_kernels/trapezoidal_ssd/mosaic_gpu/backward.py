"""Backward kernel of the trapezoidal SSD operator: every chunk by itself, one head after the other.

As the SSD operator's, whose page explains what is added up for the decays, but that each head has a B and C of its own:
they are made anew of the group's for every head, and their gradients are turned back before they leave the block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import MAX_SHARED_MEMORY, plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, slopes, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, STATE_UNIT, TOKEN_ROWS, Problem
from pallas_kernels.trapezoidal_ssd.mosaic_gpu.head_by_head import STREAMED, STREAMED_IF_THERE, HeadByHead

_EVEN_SHARE = 128
"""Registers of a lane, where four warpgroups have the same."""
_REGISTERS = {"inputs": 120, "attention": 152, "matrices": 216, "loads": 24}
"""Of a lane of each warpgroup, by its work. What does not fit is spilled, and beside so much shared memory there is
hardly a cache for it: 16 fewer for the second took 14 % longer."""
_REGISTERS_FOR_PARTS = {"inputs": 128, "attention": 176, "matrices": 184, "loads": 24}
"""The same for a state of several parts, of whose gradients there is less at once."""
# A warpgroup that wants more than the others have left waits for ever.
assert all(sum(r.values()) <= len(r) * _EVEN_SHARE for r in (_REGISTERS, _REGISTERS_FOR_PARTS))

_GRADIENT_TILES = 2
"""Tiles of a gradient of B or C on their way out at once: more leave no room for large states."""

_SHARED_MEMORY = MAX_SHARED_MEMORY - 3 * 1024
"""Bytes of a block, less what reductions and barriers take."""
_ALIGNMENT = 1024
"""Bytes that every array in shared memory begins at a multiple of."""


def most_stages(state: int, pairs: int) -> int:
    """How many heads, one or two, fit into shared memory at once."""
    return 2 if _shared_memory(state, pairs, 2, len(_matrices(state, pairs))) <= _SHARED_MEMORY else 1


def _matrices(state: int, pairs: int) -> tuple[str, ...]:
    """Names of B and C in shared memory, as ``HeadByHead`` knows them: the group's, where they fit, and the head's."""
    fits = _shared_memory(state, pairs, stages=1, matrices=4) <= _SHARED_MEMORY
    return ("B", "C", "turned_B", "turned_C") if fits else ("turned_B", "turned_C")


def _shared_memory(state: int, pairs: int, stages: int, matrices: int) -> int:
    """Bytes of a block, with biases of a number a component."""
    square, matrix = CHUNK * CHUNK * 2, CHUNK * state * 2
    once = (4 + _GRADIENT_TILES) * square + matrices * matrix
    numbers = [(TOKEN_ROWS + 1) * CHUNK, CHUNK, CHANNELS, state, state]
    aligned = sum(-(-stages * count * 4 // _ALIGNMENT) * _ALIGNMENT for count in numbers)
    return once + stages * (2 * square + 2 * matrix + CHUNK * pairs * 2) + aligned


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, splits: int, stages: int) -> dict[str, jax.Array]:
    """Computes the gradients of the inputs, given those of the states.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "dy", "B", "C", "tokens" with own weights, "angles", "states",
            "dstates", perhaps "D", "B_bias" and "C_bias"; "theta", (batch, chunks, CHUNK, pairs), and "step_size",
            (batch, heads, chunks, CHUNK), of which a row's angle is the product, in half-turns.
        splits: pieces that the heads of a group are cut into, which run at the same time; they divide these heads.
        stages: heads in shared memory at once.

    Returns:
        "dx"; "dmatrices", (2, batch, chunks, heads, tiles, CHUNK, STATE_UNIT), of every head's B and C; "dstep_size",
        (batch, heads, chunks, CHUNK); "dtheta", (groups · splits, batch, chunks, CHUNK, pairs), to be summed; "slopes",
        as in ``slopes.array_type``; and perhaps "dD", (batch, chunks, heads, CHANNELS), to be summed.
    """
    dtype, groups = inputs["x"].dtype, p.groups
    outputs: dict[str, Any] = {
        "dx": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "dmatrices": jax.ShapeDtypeStruct(
            (2, p.batch, p.chunks, p.heads, p.state // STATE_UNIT, CHUNK, STATE_UNIT), dtype
        ),
        "dtheta": jax.ShapeDtypeStruct((groups * splits, p.batch, p.chunks, CHUNK, p.pairs), jnp.float32),
        "dstep_size": p.tokens_type(),
        "slopes": slopes.array_type(p),
    }
    if "D" in inputs:
        outputs["dD"] = jax.ShapeDtypeStruct((p.batch, p.chunks, p.heads, CHANNELS), jnp.float32)
    # A bias of every row of a chunk would not fit.
    parameters = [name for name in STREAMED_IF_THERE if name in inputs and inputs[name].ndim == 2]
    scratch = {
        **{name: blocks.operand(stages, CHUNK, CHANNELS, dtype=dtype) for name in ("x", "dy")},
        **{name: blocks.operand(stages, CHANNELS, p.state, dtype=dtype) for name in ("states", "dstates")},
        "tokens": plgpu.SMEM((stages, p.token_rows, CHUNK), jnp.float32),
        "angles": plgpu.SMEM((stages, CHUNK, p.pairs), jnp.int16),
        "step_size": plgpu.SMEM((stages, CHUNK), jnp.float32),
        **{name: plgpu.SMEM((stages, inputs[name].shape[1]), jnp.float32) for name in parameters},
        **{name: blocks.operand(CHUNK, p.state, dtype=dtype) for name in _matrices(p.state, p.pairs)},
        "gradient": blocks.operand(_GRADIENT_TILES, CHUNK, STATE_UNIT, dtype=dtype),
        **{name: blocks.operand(CHUNK, CHUNK, dtype=dtype) for name in ("attention", "weights", "passed", "from_row")},
        "loaded": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_arrivals=len(STREAMED) + len(parameters), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "turned": plgpu.Barrier(num_arrivals=2),
        "used": plgpu.Barrier(num_arrivals=3),
        "made": plgpu.Barrier(),
        "sent": plgpu.Barrier(),
    }

    def backward(gmem: Refs, smem: Refs) -> None:
        _Block(p, splits, stages, gmem, smem).run()

    grid = {"group": groups, "batch": p.batch, "chunk": p.chunks, "split": splits}
    return launch("trapezoidal_ssd", backward, inputs, outputs, scratch, grid, warpgroups=len(_REGISTERS))


@dataclasses.dataclass(frozen=True)
class _Block(HeadByHead):
    """What a block does: three warpgroups share the work on a head, and a fourth loads.

    The first makes B, the second C of the head; the second also the attention and the weights that the others need.
    """

    def run(self) -> None:
        """Sends each warpgroup to its work."""
        warpgroup = lax.axis_index("warpgroup")
        shares = _REGISTERS if len(self.parts) == 1 else _REGISTERS_FOR_PARTS
        for number, (work, registers) in enumerate(shares.items()):
            pl.when(warpgroup == number)(functools.partial(self.start, work, registers))

    def start(self, work: str, registers: int) -> None:
        """Does a warpgroup's work, with its share of the registers."""
        if registers != _EVEN_SHARE:
            plgpu.set_max_registers(registers, action="increase" if registers > _EVEN_SHARE else "decrease")
        getattr(self, work)()

    def put_slope(self, name: str, head: Any, numbers: jax.Array) -> None:
        """Writes a number a token of a head, one of ``Slopes``."""
        batch, chunk = self.at
        slopes.put(self.gmem["slopes"].at[batch, head, chunk], name, numbers)

    def inputs(self) -> None:
        """First warpgroup: B, dx, and what inputs and states say about the decays. A row is a token that was added."""
        gmem, smem, (batch, chunk) = self.gmem, self.smem, self.at

        def work(head: Any, refs: Refs, carry: None) -> None:
            del carry
            tokens, buffer = refs["tokens"], smem["attention"]
            # The last head's dx has left the place of this one's attention.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(smem["sent"])
            from_state = blocks.product((smem["turned_B"], blocks.transposed(refs["dstates"])))
            plgpu.barrier_arrive(smem["used"])
            # While the second warpgroup still makes the attention.
            across = blocks.product((refs["dstates"], blocks.transposed(refs["states"])))
            self.put_slope("across", head, _diagonal(across))
            if "dD" in gmem:
                # To add columns up over lanes and warps would take three times as many instructions.
                products = blocks.product((blocks.transposed(refs["dy"]), refs["x"]))
                store(gmem["dD"].at[batch, chunk, head], _diagonal(products))
            decay = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[0], blocks.ROWS))
            from_state = from_state * blocks.by_row(decay, CHANNELS)
            x = blocks.load(refs["x"])
            self.put_slope("to_end", head, jnp.sum(x * from_state, axis=1))
            plgpu.barrier_wait(smem["made"])
            within = blocks.product((blocks.transposed(buffer), refs["dy"]))
            self.put_slope("to_outputs", head, jnp.sum(x * within, axis=1))
            dx = within + from_state * blocks.by_row(blocks.load(tokens.at[2], blocks.ROWS), CHANNELS)
            if "D" in gmem:
                dy = blocks.load(refs["dy"])
                dx = dx + dy * blocks.by_column(blocks.load(refs["D"], blocks.COLUMNS), CHUNK)
            # The product reads the buffer, and ends in each warp by itself.
            synchronize()
            store(buffer, dx.astype(buffer.dtype))
            plgpu.commit_smem()
            target = gmem["dx"].at[batch, blocks.chunk_rows(chunk), blocks.head_channels(head)]
            plgpu.copy_smem_to_gmem(buffer, target)

        self.over_heads(work, turns="B")
        plgpu.wait_smem_to_gmem(0)

    def attention(self) -> None:
        """Second warpgroup: C, the attention, weights, and what outputs say about the decays."""
        smem, B, C = self.smem, self.smem["turned_B"], self.smem["turned_C"]
        row, column = blocks.coordinates((CHUNK, CHUNK))
        token, other = blocks.token_coordinates(self.p.rank)
        store(smem["from_row"], jnp.where(column >= row, 1.0, 0.0).astype(smem["from_row"].dtype))
        plgpu.commit_smem()

        def work(head: Any, refs: Refs, carry: None) -> None:
            del carry
            tokens = refs["tokens"]
            weights, scores, decays = blocks.products(
                ([(refs["dy"], blocks.transposed(refs["x"]))], None),
                ([(C, blocks.transposed(B))], None),
                meanwhile=lambda: jnp.where(other <= token, blocks.decays(tokens, rank=self.p.rank), 0.0),
            )
            attention = scores * decays
            weights = weights * decays
            passed = weights * scores
            self.put_slope("own", head, jnp.sum(jnp.where(other == token, passed, 0.0), axis=1))
            # The last head's sums read "passed", and products end in each warp by itself.
            synchronize()
            plgpu.barrier_wait(smem["sent"])
            for name, matrix in (("attention", attention), ("weights", weights), ("passed", passed)):
                store(smem[name], matrix.astype(C.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["made"])
            # Row t of the first product: for each s, the sum over the tokens from t.
            passing, y = blocks.products(
                ([(smem["from_row"], smem["passed"])], None), ([(C, blocks.transposed(refs["states"]))], None)
            )
            plgpu.barrier_arrive(smem["used"])
            self.put_slope("within", head, jnp.sum(jnp.where(other < token, passing, 0.0), axis=1))
            decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
            self.put_slope("from_start", head, decay * jnp.sum(blocks.load(refs["dy"]) * y, axis=1))

        self.over_heads(work, turns="C")

    def matrices(self) -> None:
        """Third warpgroup: the gradients of B, C and the angles."""
        gmem, (batch, chunk) = self.gmem, self.at
        parts = self.parts

        def work(head: Any, refs: Refs, dtheta: jax.Array) -> jax.Array:
            found = [self.gradients(part, head, refs, first=part is parts[0], last=part is parts[-1]) for part in parts]
            dangles, dstep_sizes = zip(*filter(None, found), strict=True)
            store(gmem["dstep_size"].at[batch, head, chunk], functools.reduce(jnp.add, dstep_sizes))
            step_size = blocks.by_row(blocks.load(refs["step_size"], blocks.ROWS), self.p.pairs)
            return dtheta + _beside(dangles) * step_size

        dtheta = plgpu.layout_cast(jnp.zeros((CHUNK, self.p.pairs), jnp.float32), blocks.LAYOUT)
        dtheta = self.over_heads(work, dtheta)
        store(gmem["dtheta"].at[self.piece, batch, chunk], dtheta)
        plgpu.wait_smem_to_gmem(0)

    def gradients(
        self, part: turning.Part, head: Any, refs: Refs, *, first: bool, last: bool
    ) -> tuple[jax.Array, jax.Array] | None:
        """Writes the gradients of a head's B and C, for a part of the state.

        Args:
            part: which part.
            head: number of the head.
            refs: what was loaded of it.
            first: whether it is the head's first part, and waits for the second warpgroup's weights.
            last: whether it is the last, and no other will read B, C and the weights.

        Returns:
            The gradients of the angles of their pairs, and, a number a token, what they are to the step sizes; None if
            none of them turns.
        """
        gmem, smem, tokens, (batch, chunk) = self.gmem, self.smem, refs["tokens"], self.at
        B, C, weights, buffer = (smem[name] for name in ("turned_B", "turned_C", "weights", "gradient"))

        def put(matrix: int, gradient: jax.Array) -> None:
            # Cosines and sines are made for each matrix: from one to the other they would take registers.
            turn = turning.turn_by(part, refs["angles"])
            gradient = turning.turned(gradient, turn, back=True).astype(buffer.dtype)
            for tiles in itertools.batched(enumerate(part.tiles), buffer.shape[0]):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for place, (i, _) in enumerate(tiles):
                    store(buffer.at[place], turning.columns(gradient, i * STATE_UNIT, (i + 1) * STATE_UNIT))
                plgpu.commit_smem()
                for place, (_, tile) in enumerate(tiles):
                    target = gmem["dmatrices"].at[matrix, batch, chunk, head, tile]
                    plgpu.copy_smem_to_gmem(buffer.at[place], target)

        def swing(gradient: jax.Array, matrix: Any) -> Any:
            return _swing(gradient, blocks.load(part.of(matrix)), part.pairs) if part.pairs else 0.0

        # What goes through the state after the chunk, while the second warpgroup still makes the weights.
        to_end = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[1], blocks.ROWS))
        dB = blocks.product((self.weighted(refs["x"], to_end), part.of(refs["dstates"])))
        into_state = swing(dB, B)
        if first:
            plgpu.barrier_wait(smem["made"])
        dB = blocks.product((blocks.transposed(weights), part.of(C)), plus=dB)
        swings = swing(dB, B)
        dy = self.weighted(refs["dy"], jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS)))
        dC, _ = blocks.products(
            ([(dy, part.of(refs["states"])), (weights, part.of(B))], None), meanwhile=lambda: put(0, dB)
        )
        swings = swings + swing(dC, C)
        if last:
            plgpu.barrier_arrive(smem["used"])
        if not part.pairs:
            put(1, dC)
            return None
        # So far a row a token; the state before the chunk turns as well, and adds what it does a row a channel.
        of_states = swing(blocks.load(part.of(refs["dstates"])), refs["states"])
        into_state = into_state + of_states * jnp.exp2(tokens[0, CHUNK - 1])
        theta = blocks.load(part.of_pairs(gmem["theta"].at[batch, chunk]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dangles = self.from_here(swings, into_state, buffer) * math.pi
        put(1, dC)
        return dangles, jnp.sum(dangles * theta, axis=1)

    def weighted(self, signal: Any, weight: jax.Array) -> jax.Array:
        """x or dy, each token times its weight."""
        return (blocks.load(signal) * blocks.by_row(weight, CHANNELS)).astype(signal.dtype)

    def from_here(self, swings: jax.Array, into_state: jax.Array, buffer: Any) -> jax.Array:
        """Sums from each token to the chunk's end, less the sum of all that turns the state after the chunk.

        By matrix products, of terms split into 16 bits and what follows them.

        Args:
            swings: by how much the loss grows as a token's B and C are turned on.
            into_state: terms of how much it grows as the state after the chunk is turned on.
            buffer: shared memory for two square matrices.
        """
        pieces, half = [], CHUNK // 2
        all_tokens = plgpu.layout_cast(jnp.full((CHUNK, CHUNK), -1.0, buffer.dtype), blocks.LAYOUT)
        for start in range(0, swings.shape[1], half):
            synchronize()
            for i, terms in enumerate((swings, into_state)):
                some = turning.columns(terms, start, start + half)
                # The first 16 bits of a float32 are a bfloat16.
                bits = lax.bitcast_convert_type(some, jnp.int32) & ~0xFFFF
                high = lax.bitcast_convert_type(bits, jnp.float32)
                store(buffer.at[i], jnp.concatenate([high, some - high], axis=1).astype(buffer.dtype))
            plgpu.commit_smem()
            sums = blocks.product((self.smem["from_row"], buffer.at[0]), (all_tokens, buffer.at[1]))
            pieces.append(turning.columns(sums, 0, half) + turning.columns(sums, half, CHUNK))
        return _beside(pieces)


def _beside(pieces: Sequence[jax.Array]) -> jax.Array:
    """Columns beside each other."""
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)


def _swing(gradient: jax.Array, matrix: jax.Array, pairs: int) -> jax.Array:
    """By how much the loss grows as the pairs of a matrix that has been turned are turned on, for an angle of 1.

    It is taken at the very numbers that were multiplied, the rounded ones: two tokens that are turned together do not
    change the product of their B and C, and what they contribute only cancels if it comes of the same numbers.
    """
    half = matrix.shape[1] // 2
    first, second = (0, pairs), (half, half + pairs)
    return turning.columns(gradient, *second) * turning.columns(matrix, *first) - turning.columns(
        gradient, *first
    ) * turning.columns(matrix, *second)


def _diagonal(matrix: jax.Array) -> jax.Array:
    """The numbers on a matrix' diagonal, one a row."""
    row, column = blocks.coordinates(matrix.shape)
    return jnp.sum(jnp.where(row == column, matrix, 0.0), axis=1)
