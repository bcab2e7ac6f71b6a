"""Backward kernel of the SSD operator: every chunk by itself, one head after the other.

Given the state before each chunk and the state's gradient after it, chunks depend on nothing else. So a block takes a
chunk and walks over the heads of a group, and the gradients of B and C, which are sums over these, stay in registers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs, launch
from pallas_kernels.ssd.mosaic_gpu import blocks, matrices, slopes
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem

MAX_COLUMNS = 128
"""States whose gradients of B and C fit in registers; those of more are left to ``matrices``."""

_EVEN_SHARE = 168
"""Registers of a lane, where three warpgroups have the same."""
_REGISTERS = {"attention": 160, "slopes": 160, "matrices": 184}
"""Of a lane of each warpgroup, by its work."""

_CONSTANT = ("scores", "from_row", "before")
"""Matrices that are the same for all heads. Kept in registers, there would be no room for those that are not."""
_STREAMED = ("x", "dy", "states", "dstates", "tokens")


def scan(p: Problem, inputs: Mapping[str, jax.Array], *, splits: int, stages: int) -> dict[str, jax.Array]:
    """Computes the gradients of the inputs, given those of the states.

    Args:
        p: shapes.
        inputs: as ``Problem`` describes them: "x", "dy", "B", "C", "tokens", "states", "dstates", perhaps "D".
        splits: pieces that the heads of a group are cut into, which run at the same time; they divide these heads.
        stages: heads in shared memory at once.

    Returns:
        "dx"; "dB" and "dC", (splits, batch, length, groups · state), to be summed; with D also "dD", (batch, chunks,
        heads, CHANNELS), to be summed; and "slopes", as in ``slopes.array_type``.
    """
    # Rounded once: here, or after the sum of the splits.
    dtype = inputs["x"].dtype if splits == 1 else jnp.dtype(jnp.float32)
    results = _Backward(p, splits, stages, dtype).run(inputs)
    if "weights" not in results:
        return results
    inputs = {**inputs, "weights": results.pop("weights")}
    for name in ("B", "C"):
        rest = matrices.gradient(p, inputs, name, splits=splits, first=MAX_COLUMNS, dtype=dtype)
        by_group = [piece.reshape(*piece.shape[:3], p.groups, -1) for piece in (results[f"d{name}"], rest)]
        results[f"d{name}"] = jnp.concatenate(by_group, axis=-1).reshape(splits, p.batch, p.chunks * CHUNK, -1)
    return results


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The launch for all gradients, those of B and C for the first states.

    Three warpgroups share the work on a head: what comes of the chunk's attention, the weights of its gradient, and
    the parts of the gradients of B and C that go through states. Until the end they share loaded data only.
    """

    p: Problem
    splits: int
    stages: int
    matrix_dtype: jnp.dtype
    """Of the gradients of B and C."""

    @property
    def columns(self) -> int:
        """States whose gradients of B and C it computes."""
        return min(self.p.state, MAX_COLUMNS)

    @property
    def heads_per_split(self) -> int:
        return self.p.heads_per_group // self.splits

    def run(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Launches the kernel."""
        p, dtype = self.p, inputs["x"].dtype
        matrix_dims = (self.splits, p.batch, p.chunks * CHUNK, p.groups * self.columns)
        outputs: dict[str, Any] = {
            "dx": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
            **{name: jax.ShapeDtypeStruct(matrix_dims, self.matrix_dtype) for name in ("dB", "dC")},
            "slopes": slopes.array_type(p),
        }
        if "D" in inputs:
            outputs["dD"] = jax.ShapeDtypeStruct((p.batch, p.chunks, p.heads, CHANNELS), jnp.float32)
        if self.columns < p.state:
            outputs["weights"] = matrices.weights_type(p, self.splits, dtype)
        scratch = {
            **{name: blocks.operand(CHUNK, p.state, dtype=dtype) for name in ("B", "C")},
            **{name: blocks.operand(self.stages, CHUNK, CHANNELS, dtype=dtype) for name in ("x", "dy")},
            **{name: blocks.operand(self.stages, CHANNELS, p.state, dtype=dtype) for name in ("states", "dstates")},
            "tokens": plgpu.SMEM((self.stages, blocks.TOKEN_ROWS, CHUNK), jnp.float32),
            "dx": blocks.operand(CHUNK, CHANNELS, dtype=dtype),
            **{name: blocks.operand(CHUNK, CHUNK, dtype=dtype) for name in ("pairs", *_CONSTANT)},
            "matrices": plgpu.Barrier(num_arrivals=2),
            "full": plgpu.Barrier(num_arrivals=len(_STREAMED), num_barriers=self.stages),
            "free": plgpu.Barrier(num_arrivals=3, num_barriers=self.stages),
            "made": plgpu.Barrier(),
        }

        def backward(gmem: Refs, smem: Refs) -> None:
            _Block(self, gmem, smem).run()

        grid = {"group": p.groups, "batch": p.batch, "chunk": p.chunks, "split": self.splits}
        return launch("ssd", backward, inputs, outputs, scratch, grid, warpgroups=3)


class _Block:
    """What a block does."""

    def __init__(self, launch: _Backward, gmem: Refs, smem: Refs) -> None:
        self.launch, self.gmem, self.smem = launch, gmem, smem
        self.group, self.batch, self.chunk, split = (lax.axis_index(n) for n in ("group", "batch", "chunk", "split"))
        self.first_head = self.group * launch.p.heads_per_group + split * launch.heads_per_split
        self.split = split
        self.dtype = smem["x"].dtype

    def run(self) -> None:
        """Starts the first loads and sends each warpgroup to its work."""
        p, warpgroup = self.launch.p, lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _() -> None:
            for name in ("B", "C"):
                columns = pl.ds(self.group * p.state, p.state)
                source = self.gmem[name].at[self.batch, blocks.chunk_rows(self.chunk), columns]
                plgpu.copy_gmem_to_smem(source, self.smem[name], self.smem["matrices"])
            for i in range(min(self.launch.stages, self.launch.heads_per_split)):
                self.load(i, i)

        plgpu.barrier_wait(self.smem["matrices"])
        for number, (work, registers) in enumerate(_REGISTERS.items()):
            pl.when(warpgroup == number)(functools.partial(self.start, work, registers))

    def start(self, work: str, registers: int) -> None:
        """Does a warpgroup's work, with its share of the registers."""
        if registers != _EVEN_SHARE:
            plgpu.set_max_registers(registers, action="increase" if registers > _EVEN_SHARE else "decrease")
        getattr(self, work)()

    def load(self, i: Any, slot: Any) -> None:
        """Starts the copies of what belongs to the i-th head."""
        head = self.first_head + i
        for name in _STREAMED:
            if name in ("x", "dy"):
                source = self.gmem[name].at[self.batch, blocks.chunk_rows(self.chunk), blocks.head_channels(head)]
            else:
                number = self.launch.p.token_head(head) if name == "tokens" else head
                source = self.gmem[name].at[self.batch, number, self.chunk]
            plgpu.copy_gmem_to_smem(source, self.smem[name].at[slot], self.smem["full"].at[slot])

    def over_heads(self, work: Any, carry: Any, *, refill: bool = False) -> Any:
        """Calls ``work(head, refs, carry) -> carry`` for each head, with references to what was loaded."""
        count, stages = self.launch.heads_per_split, min(self.launch.stages, self.launch.heads_per_split)

        def step(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(self.smem["full"].at[slot])
            carry = work(self.first_head + i, {name: self.smem[name].at[slot] for name in _STREAMED}, carry)
            plgpu.barrier_arrive(self.smem["free"].at[slot])
            if refill and count > stages:

                @pl.when(i + stages < count)
                def _() -> None:
                    plgpu.barrier_wait(self.smem["free"].at[slot])
                    self.load(i + stages, slot)

            return carry

        return lax.fori_loop(0, count, step, carry)

    def put_slope(self, name: str, head: Any, numbers: jax.Array) -> None:
        """Writes a number a token of a head, one of ``Slopes``."""
        slopes.put(self.gmem["slopes"].at[self.batch, head, self.chunk], name, numbers)

    def attention(self) -> None:
        """First warpgroup: dx, and what inputs say about the decays. Rows are the tokens that were added."""
        gmem, smem = self.gmem, self.smem
        row, column = blocks.coordinates((CHUNK, CHUNK))
        scores = blocks.product((smem["B"], blocks.transposed(smem["C"])))
        scores = jnp.where(row <= column, scores, 0.0)

        def work(head: Any, refs: Refs, carry: None) -> None:
            tokens = refs["tokens"]
            weights = (scores * blocks.finite(blocks.decays(tokens, transpose=True))).astype(self.dtype)
            from_state, within, (x, decay) = blocks.products(
                ([(smem["B"], blocks.transposed(refs["dstates"]))], None),
                ([(weights, refs["dy"])], None),
                meanwhile=lambda: (
                    blocks.load_operand(refs["x"]),
                    jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[0], blocks.ROWS)),
                ),
            )
            x = x.astype(jnp.float32)
            self.put_slope("to_end", head, decay * jnp.sum(x * from_state, axis=1))
            self.put_slope("to_outputs", head, jnp.sum(x * within, axis=1))
            decayed_delta = decay * blocks.load(tokens.at[2], blocks.ROWS)
            dx = within + from_state * blocks.by_row(decayed_delta, CHANNELS)
            if "D" in gmem:
                D = blocks.load(gmem["D"].at[head], blocks.COLUMNS)
                dx = dx + blocks.load(refs["dy"]) * blocks.by_column(D, CHUNK)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(smem["dx"], dx.astype(self.dtype))
            plgpu.commit_smem()
            target = gmem["dx"].at[self.batch, blocks.chunk_rows(self.chunk), blocks.head_channels(head)]
            plgpu.copy_smem_to_gmem(smem["dx"], target)

        self.over_heads(work, None)
        plgpu.wait_smem_to_gmem(0)

    def make_constants(self) -> None:
        """Fills shared memory with what ``slopes`` needs for every head."""
        row, column = blocks.coordinates((CHUNK, CHUNK))
        scores = blocks.product((self.smem["C"], blocks.transposed(self.smem["B"])))
        below, above = jnp.where(column < row, 1.0, 0.0), jnp.where(column >= row, 1.0, 0.0)
        matrices = (jnp.where(column <= row, scores, 0.0), above, below)
        for name, matrix in zip(_CONSTANT, matrices, strict=True):
            store(self.smem[name], matrix.astype(self.dtype))
        plgpu.commit_smem()

    def slopes(self) -> None:
        """Second warpgroup: what outputs say about the decays, and weights for the gradients of B and C."""
        smem, pairs = self.smem, self.smem["pairs"]
        self.make_constants()

        def work(head: Any, refs: Refs, sum_of_weights: jax.Array) -> jax.Array:
            tokens, states = refs["tokens"], blocks.transposed(refs["states"])
            weights, decays = blocks.products(
                ([(refs["dy"], blocks.transposed(refs["x"]))], None),
                meanwhile=lambda: blocks.finite(blocks.decays(tokens)),
            )
            weights = weights * decays
            synchronize()
            store(pairs, (weights * blocks.load(smem["scores"])).astype(self.dtype))
            plgpu.commit_smem()
            sum_of_weights = sum_of_weights + weights
            # Row t of the first product: for each s, the sum over the tokens from t.
            passing, y = blocks.products(([(smem["from_row"], pairs)], None), ([(smem["C"], states)], None))
            self.put_slope("within", head, jnp.sum(passing * blocks.load(smem["before"]), axis=1))
            decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
            self.put_slope("from_start", head, decay * jnp.sum(blocks.load(refs["dy"]) * y, axis=1))
            return sum_of_weights

        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), blocks.LAYOUT)
        row, column = blocks.coordinates((CHUNK, CHUNK))
        weights = jnp.where(column <= row, self.over_heads(work, zeros), 0.0)
        synchronize()
        store(pairs, weights.astype(self.dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem["made"])
        if "weights" in self.gmem:
            plgpu.copy_smem_to_gmem(pairs, self.gmem["weights"].at[self.split, self.batch, self.group, self.chunk])
            plgpu.wait_smem_to_gmem(0)

    def put_across(self, head: Any, refs: Refs) -> None:
        """Writes what the gradient of the state after the chunk makes of the state before it, a number a channel."""
        # Products are rounded to 16 bits, and added up in float32: the sum is over thousands.
        columns = [pl.ds(first, blocks.STATE_UNIT) for first in range(0, self.launch.p.state, blocks.STATE_UNIT)]
        products = [
            blocks.load_operand(refs["states"].at[:, some]) * blocks.load_operand(refs["dstates"].at[:, some])
            for some in columns
        ]
        numbers = jnp.sum(functools.reduce(jnp.add, products).astype(jnp.float32), axis=1)
        self.put_slope("across", head, numbers)

    def put_dD(self, head: Any, refs: Refs) -> None:
        """Writes what the chunk adds to the gradient of D."""
        if "D" in self.gmem:
            # Channels as rows: sums over the columns of a matrix have to pass through shared memory.
            x, dy = (blocks.load(blocks.transposed(refs[name])) for name in ("x", "dy"))
            store(self.gmem["dD"].at[self.batch, self.chunk, head], jnp.sum(x * dy, axis=1))

    def matrices(self) -> None:
        """Third warpgroup: loads, the gradients of B, C and D, and what passes through the whole chunk."""
        smem = self.smem
        width = self.launch.columns

        def work(head: Any, refs: Refs, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            dB, dC = gradients
            tokens = refs["tokens"]
            weighted = matrices.into_state(refs["x"], tokens)
            dstates, states = (refs[name].at[:, :width] for name in ("dstates", "states"))
            put_across = functools.partial(self.put_across, head, refs)
            dB, _ = blocks.products(([(weighted, dstates)], dB), meanwhile=put_across)
            weighted = matrices.from_state(refs["dy"], tokens)
            put_dD = functools.partial(self.put_dD, head, refs)
            dC, _ = blocks.products(([(weighted, states)], dC), meanwhile=put_dD)
            return dB, dC

        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, width), jnp.float32), blocks.LAYOUT)
        dB, dC = self.over_heads(work, (zeros, zeros), refill=True)
        plgpu.barrier_wait(smem["made"])
        weights = smem["pairs"]
        dB, dC = blocks.products(
            ([(blocks.transposed(weights), smem["C"].at[:, :width])], dB), ([(weights, smem["B"].at[:, :width])], dC)
        )
        for name, gradient in (("dB", dB), ("dC", dC)):
            target = self.gmem[name].at[self.split, self.batch, blocks.chunk_rows(self.chunk)]
            store(target.at[:, pl.ds(self.group * width, width)], gradient.astype(target.dtype))
