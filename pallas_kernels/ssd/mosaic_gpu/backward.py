"""Backward kernel of the SSD operator: every chunk by itself, one head after the other.

Given the state before each chunk and the state's gradient after it, chunks depend on nothing else. So a block takes a
chunk and walks over the heads of a group, and the gradients of B and C, which are sums over these, stay in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store
from pallas_kernels.ssd.mosaic_gpu import blocks
from pallas_kernels.ssd.mosaic_gpu.blocks import CHANNELS, CHUNK, Problem, Refs

MAX_COLUMNS = 128
"""States whose gradients of B and C fit in registers; more take a pass for each so many."""

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
        heads, CHANNELS), to be summed; and four numbers a token and head that ``tokens.gradients`` explains: "row",
        "column", "to_end", "across".
    """
    results: dict[str, jax.Array] = {}
    matrices = []
    for first in range(0, p.state, MAX_COLUMNS):
        columns = slice(first, min(first + MAX_COLUMNS, p.state))
        results = _Backward(p, splits, stages, columns).run(inputs)
        matrices.append({name: results.pop(name) for name in ("dB", "dC")})
    for name in ("dB", "dC"):
        pieces = [m[name].reshape(*m[name].shape[:3], p.groups, -1) for m in matrices]
        results[name] = jnp.concatenate(pieces, axis=-1).reshape(splits, p.batch, p.chunks * CHUNK, -1)
    return results


@dataclasses.dataclass(frozen=True)
class _Backward:
    """One launch: all gradients, those of B and C for some of the states.

    Three warpgroups share the work on a head. In a first phase, one makes the weights of the chunk's attention and
    another those of the gradients of B and C; in the second, they use them, and a third one adds to these gradients.
    """

    p: Problem
    splits: int
    stages: int
    columns: slice

    @property
    def num_columns(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def heads_per_split(self) -> int:
        return self.p.heads_per_group // self.splits

    def run(self, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Launches the kernel."""
        p, dtype = self.p, inputs["x"].dtype
        matrix_dims = (self.splits, p.batch, p.chunks * CHUNK, p.groups * self.num_columns)
        outputs: dict[str, Any] = {
            "dx": jax.ShapeDtypeStruct(inputs["x"].shape, dtype),
            **{name: jax.ShapeDtypeStruct(matrix_dims, jnp.float32) for name in ("dB", "dC")},
            **{name: p.tokens_type() for name in ("row", "column", "to_end", "across")},
        }
        if "D" in inputs:
            outputs["dD"] = jax.ShapeDtypeStruct((p.batch, p.chunks, p.heads, CHANNELS), jnp.float32)
        square = blocks.operand(CHUNK, CHUNK, dtype=dtype)
        scratch = {
            **{name: blocks.operand(CHUNK, p.state, dtype=dtype) for name in ("B", "C")},
            **{name: blocks.operand(self.stages, CHUNK, CHANNELS, dtype=dtype) for name in ("x", "dy")},
            **{name: blocks.operand(self.stages, CHANNELS, p.state, dtype=dtype) for name in ("states", "dstates")},
            "tokens": plgpu.SMEM((self.stages, blocks.TOKEN_ROWS, CHUNK), jnp.float32),
            **dict.fromkeys(("weights", "weighted_x", "weighted_dy", "dx"), square),
            "matrices": plgpu.Barrier(num_arrivals=2),
            "full": plgpu.Barrier(num_arrivals=len(_STREAMED), num_barriers=self.stages),
            "made": plgpu.Barrier(num_arrivals=3),
            "used": plgpu.Barrier(num_arrivals=3),
        }
        # The name that a kernel's launch is known by.
        def backward(gmem: Refs, smem: Refs) -> None:
            self.body(gmem, smem)

        grid = {"group": p.groups, "batch": p.batch, "chunk": p.chunks, "split": self.splits}
        return blocks.launch(backward, inputs, outputs, scratch, grid, 3)

    def body(self, gmem: Refs, smem: Refs) -> None:
        """What each warpgroup does."""
        p = self.p
        batch, chunk, group = (lax.axis_index(name) for name in ("batch", "chunk", "group"))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 2)
        def _() -> None:
            for name in ("B", "C"):
                source = gmem[name].at[batch, blocks.chunk_rows(chunk), pl.ds(group * p.state, p.state)]
                plgpu.copy_gmem_to_smem(source, smem[name], smem["matrices"])
            for i in range(min(self.stages, self.heads_per_split)):
                self.load(gmem, smem, i, i)

        plgpu.barrier_wait(smem["matrices"])
        for number, role in enumerate((self.attention, self.slopes, self.matrices)):
            pl.when(warpgroup == number)(lambda role=role: role(gmem, smem))

    def head(self, i: Any) -> Any:
        """Number of the block's i-th head."""
        return lax.axis_index("group") * self.p.heads_per_group + lax.axis_index("split") * self.heads_per_split + i

    def load(self, gmem: Refs, smem: Refs, i: Any, slot: Any) -> None:
        """Starts the copies of what belongs to the i-th head."""
        batch, chunk, head = lax.axis_index("batch"), lax.axis_index("chunk"), self.head(i)
        for name in _STREAMED:
            if name in ("x", "dy"):
                source = gmem[name].at[batch, blocks.chunk_rows(chunk), blocks.head_channels(head)]
            else:
                source = gmem[name].at[batch, head, chunk]
            plgpu.copy_gmem_to_smem(source, smem[name].at[slot], smem["full"].at[slot])

    def over_heads(self, smem: Refs, make: Any, use: Any, carry: Any, refill: Any = None) -> Any:
        """Calls ``make`` and ``use`` for each head, in step with the other warpgroups."""

        def step(i: Any, carry: Any) -> Any:
            slot = lax.rem(i, self.stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            refs = {name: smem[name].at[slot] for name in _STREAMED}
            carry = make(i, refs, carry)
            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["made"])
            plgpu.barrier_wait(smem["made"])
            carry = use(i, refs, carry)
            plgpu.barrier_arrive(smem["used"])
            plgpu.barrier_wait(smem["used"])
            if refill is not None and self.heads_per_split > self.stages:
                pl.when(i + self.stages < self.heads_per_split)(lambda: refill(i + self.stages, slot))
            return carry

        return lax.fori_loop(0, self.heads_per_split, step, carry)

    def put(self, ref: Any, i: Any, numbers: jax.Array) -> None:
        """Writes a number a token of the i-th head."""
        store(ref.at[lax.axis_index("batch"), self.head(i), lax.axis_index("chunk")], numbers)

    def attention(self, gmem: Refs, smem: Refs) -> None:
        """First warpgroup: the attention's weights, then dx and what it says about the decays."""
        scores = blocks.product((smem["C"], blocks.transposed(smem["B"])))
        dtype = smem["dx"].dtype

        def make(i: Any, refs: Refs, carry: None) -> None:
            del i
            tokens = refs["tokens"]
            to_end = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[1], blocks.ROWS))
            store(smem["weights"], blocks.decayed(scores, tokens).astype(dtype))
            weighted = blocks.load(refs["x"]) * blocks.by_row(to_end, CHANNELS)
            store(smem["weighted_x"], weighted.astype(dtype))

        def use(i: Any, refs: Refs, carry: None) -> None:
            tokens, x = refs["tokens"], blocks.load(refs["x"])
            from_state, within = blocks.products(
                ([(smem["B"], blocks.transposed(refs["dstates"]))], None),
                ([(blocks.transposed(smem["weights"]), refs["dy"])], None),
            )
            decay = jnp.exp2(tokens[0, CHUNK - 1] - blocks.load(tokens.at[0], blocks.ROWS))
            from_state = from_state * blocks.by_row(decay, CHANNELS)
            self.put(gmem["to_end"], i, jnp.sum(x * from_state, axis=1))
            self.put(gmem["column"], i, jnp.sum(x * within, axis=1))
            dx = within + from_state * blocks.by_row(blocks.load(tokens.at[2], blocks.ROWS), CHANNELS)
            head = self.head(i)
            if "D" in gmem:
                dy = blocks.load(refs["dy"])
                D = blocks.load(gmem["D"].at[head], blocks.COLUMNS)
                dx = dx + dy * blocks.by_column(D, CHUNK)
                store(gmem["dD"].at[lax.axis_index("batch"), lax.axis_index("chunk"), head], jnp.sum(dy * x, axis=0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(smem["dx"], dx.astype(dtype))
            plgpu.commit_smem()
            rows = blocks.chunk_rows(lax.axis_index("chunk"))
            plgpu.copy_smem_to_gmem(
                smem["dx"], gmem["dx"].at[lax.axis_index("batch"), rows, blocks.head_channels(head)]
            )

        self.over_heads(smem, make, use, None)
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(smem["made"])

    def slopes(self, gmem: Refs, smem: Refs) -> None:
        """Second warpgroup: weights of the gradients of B and C within the chunk, and y's part in those of decays."""
        dtype = smem["weights"].dtype

        def make(i: Any, refs: Refs, weights: jax.Array) -> jax.Array:
            del i
            tokens = refs["tokens"]
            decay = jnp.exp2(blocks.load(tokens.at[0], blocks.ROWS))
            weighted = blocks.load(refs["dy"]) * blocks.by_row(decay, CHANNELS)
            store(smem["weighted_dy"], weighted.astype(dtype))
            scores = blocks.product((refs["dy"], blocks.transposed(refs["x"])))
            return weights + blocks.decayed(scores, tokens)

        def use(i: Any, refs: Refs, weights: jax.Array) -> jax.Array:
            total = blocks.load(refs["tokens"].at[0], blocks.ROWS)
            y, across = blocks.products(
                ([(smem["C"], blocks.transposed(refs["states"]))], None),
                ([(refs["dstates"], blocks.transposed(refs["states"]))], None),
            )
            self.put(gmem["across"], i, blocks.diagonal(across))
            y = blocks.product((smem["weights"], refs["x"]), plus=y * blocks.by_row(jnp.exp2(total), CHANNELS))
            self.put(gmem["row"], i, jnp.sum(blocks.load(refs["dy"]) * y, axis=1))
            return weights

        weights = plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), blocks.LAYOUT)
        weights = self.over_heads(smem, make, use, weights)
        store(smem["weights"], weights.astype(dtype))
        plgpu.commit_smem()
        plgpu.barrier_arrive(smem["made"])

    def matrices(self, gmem: Refs, smem: Refs) -> None:
        """Third warpgroup: loads, and the gradients of B and C."""
        columns = pl.ds(self.columns.start, self.num_columns)

        def use(i: Any, refs: Refs, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            del i
            dB, dC = gradients
            dB, dC = blocks.products(
                ([(smem["weighted_x"], refs["dstates"].at[:, columns])], dB),
                ([(smem["weighted_dy"], refs["states"].at[:, columns])], dC),
            )
            return dB, dC

        zeros = plgpu.layout_cast(jnp.zeros((CHUNK, self.num_columns), jnp.float32), blocks.LAYOUT)
        refill = lambda i, slot: self.load(gmem, smem, i, slot)  # noqa: E731
        dB, dC = self.over_heads(smem, lambda i, refs, carry: carry, use, (zeros, zeros), refill)
        plgpu.barrier_arrive(smem["made"])
        plgpu.barrier_wait(smem["made"])
        weights = smem["weights"]
        dB, dC = blocks.products(
            ([(blocks.transposed(weights), smem["C"].at[:, columns])], dB), ([(weights, smem["B"].at[:, columns])], dC)
        )
        for name, gradient in (("dB", dB), ("dC", dC)):
            rows = blocks.chunk_rows(lax.axis_index("chunk"))
            target = pl.ds(lax.axis_index("group") * self.num_columns, self.num_columns)
            store(gmem[name].at[lax.axis_index("split"), lax.axis_index("batch"), rows, target], gradient)
