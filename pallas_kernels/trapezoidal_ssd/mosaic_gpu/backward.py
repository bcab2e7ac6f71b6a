"""Backward kernel of the trapezoidal SSD operator: every chunk by itself, one head after the other.

As the SSD operator's, whose page explains what is added up for the decays, but that each head has a B and C of its own:
they are made anew of the group's for every head, and their gradients are turned back before they leave the block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, slopes, turning
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem
from pallas_kernels.ssd.mosaic_gpu.turning import Turn

_EVEN_SHARE = 168
"""Registers of a lane, where three warpgroups have the same."""
_REGISTERS = {"attention": 144, "slopes": 144, "matrices": 216}
"""Of a lane of each warpgroup, by its work. With fewer for the third each matrix instruction waits for the last."""
# A warpgroup that wants more than the others have left waits for ever.
assert sum(_REGISTERS.values()) <= len(_REGISTERS) * _EVEN_SHARE

_STREAMED = ("x", "dy", "states", "dstates", "tokens", "angles")


def shared_memory(state: int, pairs: int, token_rows: int) -> tuple[int, int]:
    """Bytes of a block: those that it needs once, and those of each stage."""
    square = CHUNK * CHUNK * 2
    stage = 2 * square + 2 * CHANNELS * state * 2 + token_rows * CHUNK * 4 + CHUNK * pairs * 2
    return 4 * CHUNK * state * 2 + 5 * square, stage


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
        "dx"; "dB" and "dC", (batch, length, heads · state), of every head; "dstep_size", (batch, heads, chunks, CHUNK),
        and "dtheta", (groups · splits, batch, chunks, CHUNK, pairs), to be summed: what comes of a row's angle within
        its chunk; with D also "dD", (batch, chunks, heads, CHANNELS), to be summed; and those of ``slopes.names``.
    """
    dtype, groups = inputs["x"].dtype, p.groups // p.shared_by
    matrix = jax.ShapeDtypeStruct((p.batch, p.chunks * CHUNK, p.heads * p.state), dtype)
    outputs: dict[str, Any] = {
        "dx": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
        "dB": matrix,
        "dC": matrix,
        "dtheta": jax.ShapeDtypeStruct((groups * splits, p.batch, p.chunks, CHUNK, p.pairs), jnp.float32),
        "dstep_size": p.tokens_type(),
        **{name: p.tokens_type() for name in slopes.names(own_weights=True)},
    }
    if "D" in inputs:
        outputs["dD"] = jax.ShapeDtypeStruct((p.batch, p.chunks, p.heads, CHANNELS), jnp.float32)
    scratch = {
        **{name: blocks.operand(CHUNK, p.state, dtype=dtype) for name in ("B", "C", "turned_B", "turned_C")},
        **{name: blocks.operand(stages, CHUNK, CHANNELS, dtype=dtype) for name in ("x", "dy")},
        **{name: blocks.operand(stages, CHANNELS, p.state, dtype=dtype) for name in ("states", "dstates")},
        "tokens": plgpu.SMEM((stages, p.token_rows, CHUNK), jnp.float32),
        "angles": plgpu.SMEM((stages, CHUNK, p.pairs), jnp.int16),
        **{name: blocks.operand(CHUNK, CHUNK, dtype=dtype) for name in ("dx", "pairs", "weights", "from_row", "side")},
        "loaded": plgpu.Barrier(num_arrivals=2),
        "full": plgpu.Barrier(num_arrivals=len(_STREAMED), num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "turned": plgpu.Barrier(num_arrivals=2),
        "made": plgpu.Barrier(),
    }

    def backward(gmem: Refs, smem: Refs) -> None:
        _Block(p, splits, stages, gmem, smem).run()

    grid = {"group": groups, "batch": p.batch, "chunk": p.chunks, "split": splits}
    return launch("trapezoidal_ssd", backward, inputs, outputs, scratch, grid, warpgroups=3)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block does: three warpgroups share the work on a head.

    The first makes B, the second C of the head; the second also the weights that the third needs.
    """

    p: Problem
    splits: int
    stages: int
    gmem: Refs
    smem: Refs

    @property
    def heads(self) -> int:
        return self.p.heads // (self.p.groups // self.p.shared_by) // self.splits

    def head(self, i: Any) -> Any:
        """The block's i-th head."""
        return self.piece * self.heads + i

    @property
    def piece(self) -> Any:
        """Which of the pieces of all heads the block has."""
        return lax.axis_index("group") * self.splits + lax.axis_index("split")

    @property
    def at(self) -> tuple[Any, Any]:
        return lax.axis_index("batch"), lax.axis_index("chunk")

    def run(self) -> None:
        """Starts the first loads and sends each warpgroup to its work."""
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _() -> None:
            batch, chunk = self.at
            columns = pl.ds(lax.axis_index("group") * self.p.state, self.p.state)
            for name in ("B", "C"):
                source = self.gmem[name].at[batch, blocks.chunk_rows(chunk), columns]
                plgpu.copy_gmem_to_smem(source, self.smem[name], self.smem["loaded"])
            for i in range(min(self.stages, self.heads)):
                self.load(i, i)

        plgpu.barrier_wait(self.smem["loaded"])
        for number, (work, registers) in enumerate(_REGISTERS.items()):
            pl.when(warpgroup == number)(functools.partial(self.start, work, registers))

    def start(self, work: str, registers: int) -> None:
        """Does a warpgroup's work, with its share of the registers."""
        plgpu.set_max_registers(registers, action="increase" if registers > _EVEN_SHARE else "decrease")
        getattr(self, work)()

    def load(self, i: Any, slot: Any) -> None:
        """Starts the copies of what belongs to the i-th head."""
        (batch, chunk), head = self.at, self.head(i)
        for name in _STREAMED:
            if name in ("x", "dy"):
                source = self.gmem[name].at[batch, blocks.chunk_rows(chunk), blocks.head_channels(head)]
            else:
                number = self.p.token_head(head) if name in self.p.numbers else head
                source = self.gmem[name].at[batch, number, chunk]
            plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem["full"].at[slot])

    def over_heads(self, work: Any, carry: Any = None, *, turns: str | None = None) -> Any:
        """Calls ``work(head, refs, carry) -> carry`` for each head, with references to what was loaded.

        Args:
            work: of a warpgroup.
            carry: passed from head to head.
            turns: the matrix that this warpgroup makes for every head; one that makes none loads.
        """
        stages = min(self.stages, self.heads)

        def step(i: Any, carry: Any) -> Any:
            slot, head = lax.rem(i, stages), self.head(i)
            plgpu.barrier_wait(self.smem["full"].at[slot])
            refs = {name: self.smem[name].at[slot] for name in _STREAMED}
            if turns is not None:

                @pl.when(i > 0)
                def _() -> None:
                    plgpu.barrier_wait(self.smem["free"].at[lax.rem(i + stages - 1, stages)])

                self.turn(turns, head, refs)
                plgpu.barrier_arrive(self.smem["turned"])
            plgpu.barrier_wait(self.smem["turned"])
            carry = work(head, refs, carry)
            plgpu.barrier_arrive(self.smem["free"].at[slot])
            if turns is None and self.heads > stages:

                @pl.when(i + stages < self.heads)
                def _() -> None:
                    plgpu.barrier_wait(self.smem["free"].at[slot])
                    self.load(i + stages, slot)

            return carry

        return lax.fori_loop(0, self.heads, step, carry)

    def turn(self, name: str, head: Any, refs: Refs) -> None:
        """Makes a head's B or C."""
        bias = f"{name}_bias"
        own_bias = self.gmem[bias].at[self.p.token_head(head)] if bias in self.gmem else None
        turning.turn_into(self.smem[f"turned_{name}"], self.smem[name], turning.turn_by(refs["angles"]), own_bias)
        plgpu.commit_smem()

    def decays(self, tokens: Any, *, transpose: bool = False) -> jax.Array:
        """``blocks.decays``, bounded."""
        return blocks.finite(blocks.decays(tokens, transpose=transpose, rank=self.p.rank))

    def put(self, name: str, head: Any, numbers: jax.Array) -> None:
        """Writes a number a token of a head."""
        batch, chunk = self.at
        store(self.gmem[name].at[batch, head, chunk], numbers)

    def attention(self) -> None:
        """First warpgroup: B, dx, and what inputs say about the decays. Rows are the tokens that were added."""
        gmem, smem, (batch, chunk) = self.gmem, self.smem, self.at
        B, C = smem["turned_B"], smem["turned_C"]
        row, column = blocks.token_coordinates(self.p.rank)

        def work(head: Any, refs: Refs, carry: None) -> None:
            del carry
            tokens = refs["tokens"]
            scores = blocks.product((B, blocks.transposed(C))) * self.decays(tokens, transpose=True)
            weights = jnp.where(row <= column, scores, 0.0).astype(B.dtype)
            from_state, within = blocks.products(
                ([(B, blocks.transposed(refs["dstates"]))], None), ([(weights, refs["dy"])], None)
            )
            x = blocks.load(refs["x"])
            decay = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[0], blocks.ROWS))
            from_state = from_state * blocks.by_row(decay, CHANNELS)
            self.put("to_end", head, jnp.sum(x * from_state, axis=1))
            self.put("to_outputs", head, jnp.sum(x * within, axis=1))
            dx = within + from_state * blocks.by_row(blocks.load(tokens.at[2], blocks.ROWS), CHANNELS)
            if "D" in gmem:
                dy = blocks.load(refs["dy"])
                dx = dx + dy * blocks.by_column(blocks.load(gmem["D"].at[head], blocks.COLUMNS), CHUNK)
                store(gmem["dD"].at[batch, chunk, head], jnp.sum(dy * x, axis=0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(smem["dx"], dx.astype(B.dtype))
            plgpu.commit_smem()
            target = gmem["dx"].at[batch, blocks.chunk_rows(chunk), blocks.head_channels(head)]
            plgpu.copy_smem_to_gmem(smem["dx"], target)

        self.over_heads(work, turns="B")
        plgpu.wait_smem_to_gmem(0)

    def slopes(self) -> None:
        """Second warpgroup: C, what outputs say about the decays, and weights for the gradients of B and C."""
        smem, pairs = self.smem, self.smem["pairs"]
        B, C = smem["turned_B"], smem["turned_C"]
        row, column = blocks.coordinates((CHUNK, CHUNK))
        token, other = blocks.token_coordinates(self.p.rank)
        # -1 where the other token comes later, 1 where it comes before; the diagonal and the rest of the token between.
        own = jnp.where(row == column, 0.0, -0.5)
        side = jnp.where(other < token, 1.0, jnp.where(other > token, -1.0, own))
        store(smem["side"], side.astype(C.dtype))
        store(smem["from_row"], jnp.where(column >= row, 1.0, 0.0).astype(C.dtype))
        plgpu.commit_smem()

        def work(head: Any, refs: Refs, carry: None) -> None:
            del carry
            tokens, states = refs["tokens"], blocks.transposed(refs["states"])
            weights, scores = blocks.products(
                ([(refs["dy"], blocks.transposed(refs["x"]))], None), ([(C, blocks.transposed(B))], None)
            )
            side = blocks.load(smem["side"])
            weights = jnp.where(side >= -0.5, weights * self.decays(tokens), 0.0)
            passed = weights * scores
            self.put("own", head, jnp.sum(jnp.where(side <= 0.0, passed, 0.0), axis=1))
            synchronize()
            store(smem["weights"], weights.astype(C.dtype))
            store(pairs, passed.astype(C.dtype))
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["made"])
            # Row t of the first product: for each s, the sum over the tokens from t.
            passing, y = blocks.products(([(smem["from_row"], pairs)], None), ([(C, states)], None))
            self.put("within", head, jnp.sum(passing * jnp.maximum(blocks.load(smem["side"]), 0.0), axis=1))
            decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
            self.put("from_start", head, decay * jnp.sum(blocks.load(refs["dy"]) * y, axis=1))
            across = blocks.product((refs["dstates"], states))
            across = jnp.where(blocks.load(smem["side"]) == 0.0, across, 0.0)
            self.put("across", head, jnp.sum(across, axis=1))

        self.over_heads(work, turns="C")

    def matrices(self) -> None:
        """Third warpgroup: loads, and the gradients of B, C and the angles."""
        gmem, smem, (batch, chunk) = self.gmem, self.smem, self.at
        B, C, weights = smem["turned_B"], smem["turned_C"], smem["weights"]

        def work(head: Any, refs: Refs, dtheta: jax.Array) -> jax.Array:
            tokens = refs["tokens"]
            to_end = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[1], blocks.ROWS))
            decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
            x, dy = (
                (blocks.load(refs[name]) * blocks.by_row(weight, CHANNELS)).astype(B.dtype)
                for name, weight in (("x", to_end), ("dy", decay))
            )
            # What goes through states, while the second warpgroup still makes the weights.
            dB, dC = blocks.products(([(x, refs["dstates"])], None), ([(dy, refs["states"])], None))
            plgpu.barrier_wait(smem["made"])
            dB, dC = blocks.products(([(blocks.transposed(weights), C)], dB), ([(weights, B)], dC))
            turn = turning.turn_by(refs["angles"])

            def finish(name: str, gradient: jax.Array, matrix: Any) -> jax.Array:
                columns = pl.ds(head * self.p.state, self.p.state)
                target = gmem[f"d{name}"].at[batch, blocks.chunk_rows(chunk), columns]
                store(target, turning.turned(gradient, turn, back=True).astype(matrix.dtype))
                return _swing(gradient, blocks.load(matrix), turn)

            dangles = self.to_chunk_end(finish("B", dB, B) + finish("C", dC, C))
            self.put("dstep_size", head, jnp.sum(dangles * blocks.load(gmem["theta"].at[batch, chunk]), axis=1))
            step_size = blocks.load(gmem["step_size"].at[batch, self.p.token_head(head), chunk], blocks.ROWS)
            return dtheta + dangles * blocks.by_row(step_size, self.p.pairs)

        dtheta = plgpu.layout_cast(jnp.zeros((CHUNK, self.p.pairs), jnp.float32), blocks.LAYOUT)
        dtheta = self.over_heads(work, dtheta)
        store(gmem["dtheta"].at[self.piece, batch, chunk], dtheta)

    def to_chunk_end(self, dangles: jax.Array) -> jax.Array:
        """Sums from each token to the chunk's end, by matrix products: of 16 bits, and of those that follow.

        The weights for the gradients of B and C have been used.
        """
        buffer, pieces = self.smem["weights"], []
        half = CHUNK // 2
        for start in range(0, self.p.pairs, half):
            some = turning.columns(dangles, start, start + half)
            high = some.astype(buffer.dtype)
            low = (some - high.astype(jnp.float32)).astype(buffer.dtype)
            synchronize()
            store(buffer, jnp.concatenate([high, low], axis=1))
            plgpu.commit_smem()
            sums = blocks.product((self.smem["from_row"], buffer))
            pieces.append(turning.columns(sums, 0, half) + turning.columns(sums, half, CHUNK))
        return (pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)) * math.pi


def _swing(gradient: jax.Array, matrix: jax.Array, turn: Turn) -> jax.Array:
    """By how much the loss grows as the pairs of a matrix that has been turned are turned on, for an angle of 1.

    It is taken at the very numbers that were multiplied, the rounded ones: two tokens that are turned together do not
    change the product of their B and C, and what they contribute only cancels if it comes of the same numbers.
    """
    pairs, half = turn.cos.shape[1], matrix.shape[1] // 2
    first, second = (0, pairs), (half, half + pairs)
    return turning.columns(gradient, *second) * turning.columns(matrix, *first) - turning.columns(
        gradient, *first
    ) * turning.columns(matrix, *second)
