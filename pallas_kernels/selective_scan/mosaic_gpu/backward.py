"""Backward kernel of the selective scan: one walk back over the sequence, the state's gradient in registers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.elementwise import LN_2, sigmoid, softplus_gradient
from pallas_kernels.mosaic_gpu_compat import load_float32, plgpu, store, synchronize
from pallas_kernels.mosaic_gpu_launch import Refs
from pallas_kernels.selective_scan.mosaic_gpu import blocks
from pallas_kernels.selective_scan.mosaic_gpu.blocks import Problem, State
from pallas_kernels.selective_scan.mosaic_gpu.lane_sums import store_sums
from pallas_kernels.selective_scan.mosaic_gpu.stream import Stream, share_out

Tokens = tuple[jax.Array, ...]

# Columns of "tokens": what a step needs, and what it leaves in place of that.
_STEP_SIZE, _INPUT, _GATED_DY = range(3)
_B_DH, _A_DA, _C_H = range(1, 4)


class Carry(NamedTuple):
    """What goes from chunk to chunk, the last one first."""

    dh: State
    """Gradient of the state after the chunk."""
    dA: State
    dD: Tokens
    """Summed over chunks, not yet over the steps of a chunk; the same for the bias."""
    ddelta_bias: Tokens


def scan(p: Problem, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Runs the gradient of ``forward.scan``.

    Args:
        p: shapes and options.
        inputs: as ``Problem`` describes them, with "states" that ``forward.scan`` saved, "dy", perhaps "dfinal_state";
            with several parts also what ``parts.summarize`` returned for ``reverse``.

    Returns:
        "dx", "ddelta", "dz", "dBC" and "dinitial_state" like their inputs. Sums over batch and parts to be finished
        outside: "dA", (batch, parts, state_lanes, channels, states_per_lane), "dD" and "ddelta_bias", (batch, parts,
        channels).
    """
    g = p.geometry
    optional = [name for name in ("z", "keep") if name in inputs]
    streamed = ["x", "delta", "BC", "dy", *optional]
    # Partial sums that XLA adds up; with bfloat16 data they are rounded like the sums, which halves what it must read.
    sums_dtype = jnp.bfloat16 if inputs["x"].dtype == jnp.bfloat16 else jnp.float32
    matrix_dims = (p.pieces_per_group * p.batch, p.stored_length, *inputs["BC"].shape[2:])
    sums_type = jax.ShapeDtypeStruct((p.batch, p.num_parts, p.channels), jnp.float32)
    outputs = {
        "dx": p.token_type(inputs["x"]),
        "ddelta": p.token_type(inputs["delta"]),
        "dBC": jax.ShapeDtypeStruct(matrix_dims, sums_dtype),
        "dA": p.state_type(p.num_parts),
        "dinitial_state": p.state_type(),
    }
    if "z" in inputs:
        outputs["dz"] = p.token_type(inputs["z"])
    outputs |= {f"d{name}": sums_type for name in ("D", "delta_bias") if name in inputs}
    lanes, channels, states = g.tile_shape
    terms_dtype = jnp.float32 if inputs["x"].dtype.itemsize > 2 else jnp.bfloat16
    scratch = p.buffers(inputs, streamed) | {
        "tokens": p.token_columns(4 if "z" in inputs else 3),
        # The state before every piece; those within it are computed again on the way back.
        "history": p.scratch((g.steps // g.piece_steps, g.tiles, lanes, channels, states), jnp.float32),
        # Terms of dB and dC, one a channel of a register tile. With 16-bit data they are rounded like the sums they
        # make, which halves the traffic of shared memory, the bottleneck of this kernel.
        "terms": p.scratch((g.summed_steps, 2, channels, lanes, states), terms_dtype),
    }

    def backward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        A = blocks.load_A(g, gmem, block)
        p.load_parameters(gmem, smem, block)
        num_saved = inputs["states"].shape[1]

        def chunk(index: Any, refs: Refs, carry: Carry) -> Carry:
            # Chunks after the end of the sequence, where nothing was saved, change nothing, from whatever state.
            saved = gmem["states"].at[block.batch, jnp.minimum(index, num_saved - 1), :, block.channels]
            h_start = blocks.load_state(g, saved)
            _prepare(p, smem, refs, index)
            synchronize()
            dh, dA = carry.dh, carry.dA
            _save_states(p, smem, refs, A, h_start)
            partial = lax.rem(block.index, p.pieces_per_group) * p.batch + block.batch
            for start in reversed(range(0, g.steps, g.summed_steps)):
                dh, dA = _walk_back(p, smem, refs, A, dh, dA, start)
                synchronize()
                summed = pl.ds(index * g.steps + start, g.summed_steps)
                _sum_over_channels(p, smem, gmem["dBC"].at[partial, summed, block.group])
                synchronize()
            dD, ddelta_bias = _finish(p, smem, refs, index, carry)
            plgpu.commit_smem()
            rows = p.rows(index)
            copies = []
            for name, output in (("x", "dx"), ("delta", "ddelta"), ("z", "dz")):
                if name in refs:
                    copies.append((refs[name], gmem[output].at[block.batch, rows, block.channels]))
            share_out([functools.partial(plgpu.copy_smem_to_gmem, *copy) for copy in copies])
            return Carry(dh, dA, dD, ddelta_bias)

        zeros = tuple(blocks.fold_steps(g, blocks.zero_tokens(g)) for _ in g.token_tiles())
        dh = blocks.given_state(g, gmem, "dfinal_state", block)
        later = p.num_parts - 1
        dh = blocks.carry_over_parts(p, gmem, block, A, dh, later - block.part, lambda i: later - i)
        carry = Carry(dh, blocks.zero_state(g), zeros, zeros)
        carry = Stream(p, gmem, smem, streamed, block, reverse=True).walk(chunk, carry)
        blocks.store_state(g, gmem["dA"].at[block.batch, block.part, :, block.channels], carry.dA)
        for name, sums in (("D", carry.dD), ("delta_bias", carry.ddelta_bias)):
            if name in gmem:
                blocks.store_sums(g, gmem[f"d{name}"].at[block.batch, block.part], block, sums)

        @pl.when(block.part == 0)
        def _() -> None:
            blocks.store_state(g, gmem["dinitial_state"].at[block.batch, :, block.channels], carry.dh)

    results = p.launch(backward, inputs, outputs, scratch)
    dBC = results["dBC"].reshape(p.pieces_per_group, p.batch, *results["dBC"].shape[1:])
    results["dBC"] = jnp.sum(dBC[:, :, : p.length], axis=0, dtype=jnp.float32)
    for name in ("dx", "ddelta", "dz"):
        if name in results:
            results[name] = p.trim(results[name])
    return results


def _prepare(p: Problem, smem: Refs, refs: Refs, index: Any) -> None:
    """Computes what the steps need of each token: delta', delta' x, and the gradient of C h + D x."""
    g = p.geometry
    step_sizes, inputs, gradients = [], [], []
    for channels in g.token_tiles():
        step_sizes.append(p.step_sizes(smem, refs, index, channels))
        inputs.append(step_sizes[-1] * blocks.load_token(g, refs["x"], channels))
        dy = blocks.load_token(g, refs["dy"], channels)
        if "z" in refs:
            z = blocks.load_token(g, refs["z"], channels)
            dy = dy * (z * sigmoid(z))
        gradients.append(dy)
    for column, tokens in ((_STEP_SIZE, step_sizes), (_INPUT, inputs), (_GATED_DY, gradients)):
        blocks.store_tokens(g, smem["tokens"], tokens, column=column)


def _save_states(p: Problem, smem: Refs, refs: Refs, A: State, h: State) -> None:
    """Walks over the chunk from the state before it, keeping the state before each of its pieces."""
    g = p.geometry

    def piece(i: Any, h: State) -> State:
        blocks.store_tiles(g, smem["history"].at[i], h)
        states, _ = _advance(p, smem, refs, A, h, i * g.piece_steps)
        return states[-1]

    last = g.steps // g.piece_steps - 1
    h = lax.fori_loop(0, last, piece, h)
    blocks.store_tiles(g, smem["history"].at[last], h)


class _Operands(NamedTuple):
    """What a step needs, in registers: by register tile, then the rows of B and C."""

    step_size: State
    x: State
    dy: State
    B: jax.Array
    C: jax.Array


def _advance(p: Problem, smem: Refs, refs: Refs, A: State, h: State, first: Any) -> tuple[list[State], list[State]]:
    """Returns the states after each step of a piece, and the decays in these steps."""
    g = p.geometry
    states, decays = [], []
    for t in [first + u for u in range(g.piece_steps)]:
        step_size, x = blocks.spread_columns(g, blocks.load_columns(g, smem["tokens"], t, 2))
        B = blocks.spread_matrix(g, blocks.load_B(g, refs, t))
        keep = refs["keep"][t] if "keep" in refs else None
        decays.append(tuple(blocks.decay(s, a, keep) for s, a in zip(step_size, A, strict=True)))
        h = tuple(decays[-1][tile] * h[tile] + x[tile] * B for tile in range(g.tiles))
        states.append(h)
    return states, decays


def _walk_back(p: Problem, smem: Refs, refs: Refs, A: State, dh: State, dA: State, start: int) -> tuple[State, State]:
    """Walks back over ``summed_steps`` of the chunk; returns the gradients of the state before them and of A.

    Leaves in "tokens" the sums over the states of B dh, of A times the gradient of delta' A, and of C h; in "terms"
    those of dB and dC.
    """
    g = p.geometry

    def operands(t: Any) -> _Operands:
        step_size, x, dy = blocks.spread_columns(g, blocks.load_columns(g, smem["tokens"], t, 3))
        B, C = blocks.load_B(g, refs, t), blocks.load_C(g, refs, t)
        return _Operands(step_size, x, dy, blocks.spread_matrix(g, B), blocks.spread_matrix(g, C))

    def step(t: Any, o: _Operands, decay: State, before: State, h: State, dh: State, dA: State) -> tuple[State, State]:
        new_dh, new_dA, dB_terms, dC_terms, B_dh, A_da, C_h = [], [], [], [], [], [], []
        for tile in range(g.tiles):
            d = dh[tile] + o.dy[tile] * o.C
            dC_terms.append(o.dy[tile] * h[tile])
            dB_terms.append(o.x[tile] * d)
            passed = decay[tile] * d
            dlog_decay = passed * before[tile]
            new_dA.append(dA[tile] + o.step_size[tile] * dlog_decay)
            new_dh.append(passed)
            B_dh.append(jnp.sum(d * o.B, axis=2))
            A_da.append(jnp.sum(dlog_decay * A[tile], axis=2))
            if "z" in refs:
                C_h.append(jnp.sum(h[tile] * o.C, axis=2))
        parts = B_dh + A_da + C_h
        store_sums(g, smem["tokens"].at[t, g.channels : g.channels + len(parts) * g.tile_channels], parts)
        for slot, terms in enumerate((dB_terms, dC_terms)):
            term = functools.reduce(jnp.add, terms)
            store(_terms(smem, t - start, slot), term.astype(smem["terms"].dtype))
        return tuple(new_dh), tuple(new_dA)

    pieces = g.summed_steps // g.piece_steps

    def piece(i: Any, carry: tuple[State, State]) -> tuple[State, State]:
        dh, dA = carry
        index = start // g.piece_steps + pieces - 1 - i
        first = index * g.piece_steps
        h = blocks.load_tiles(g, smem["history"].at[index])
        states, decays = _advance(p, smem, refs, A, h, first)
        befores = [h, *states]
        for u in reversed(range(g.piece_steps)):
            dh, dA = step(first + u, operands(first + u), decays[u], befores[u], states[u], dh, dA)
        return dh, dA

    return lax.fori_loop(0, pieces, piece, (dh, dA))


def _terms(smem: Refs, steps: Any, slot: int) -> Any:
    """Terms of dB or dC in steps, as register tiles have them, though lanes of a channel are neighbours in memory.

    So a warp's lanes meet in no bank, when they store a step's terms and when they load those of several channels.
    """
    ref = smem["terms"].at[steps, slot]
    dims = (1, 0, 2) if len(ref.shape) == 3 else (0, 2, 1, 3)
    return ref.transpose(dims)


def _sum_over_channels(p: Problem, smem: Refs, target: Any) -> None:
    """Stores dB and dC of ``summed_steps`` steps, summed over the warpgroup's channels."""
    g = p.geometry
    for slot in range(2):
        total = jnp.sum(load_float32(_terms(smem, slice(None), slot), g.channel_sum_layout), axis=2)
        store(target.at[:, pl.ds(slot * g.state_lanes, g.state_lanes)], total.astype(target.dtype))


def _finish(p: Problem, smem: Refs, refs: Refs, index: Any, carry: Carry) -> tuple[Tokens, Tokens]:
    """Puts the gradients of x, delta and z in place of these; adds to those of D and delta_bias."""
    g = p.geometry
    new_dD, new_ddelta_bias, all_dx, all_ddelta, all_dz = [], [], [], [], []
    for tile, channels in enumerate(g.token_tiles()):
        x = blocks.load_token(g, refs["x"], channels)
        dy = blocks.load_token(g, refs["dy"], channels)
        D = blocks.per_channel(g, smem["D"], channels) if "D" in smem else None
        if "z" in refs:
            z = blocks.load_token(g, refs["z"], channels)
            gate = sigmoid(z)
            y = blocks.load_token(g, smem["tokens"], channels, column=_C_H)
            y = y if D is None else y + D * x
            dz = dy * y * gate * (1.0 + z * (1.0 - gate))
            all_dz.append(dz)
            dy = dy * (z * gate)
        step_size = blocks.load_token(g, smem["tokens"], channels, column=_STEP_SIZE)
        B_dh = blocks.load_token(g, smem["tokens"], channels, column=_B_DH)
        dx = step_size * B_dh
        dx = dx if D is None else dx + D * dy
        # A comes times log2(e), which its gradient must not.
        ddelta = x * B_dh + LN_2 * blocks.load_token(g, smem["tokens"], channels, column=_A_DA)
        if p.delta_softplus:
            ddelta = ddelta * softplus_gradient(step_size)
        new_dD.append(carry.dD[tile] + blocks.fold_steps(g, dy * x))
        new_ddelta_bias.append(carry.ddelta_bias[tile] + blocks.fold_steps(g, p.mask(ddelta, index)))
        all_dx.append(dx)
        all_ddelta.append(ddelta)
    blocks.store_tokens(g, refs["x"], all_dx)
    blocks.store_tokens(g, refs["delta"], all_ddelta)
    if "z" in refs:
        blocks.store_tokens(g, refs["z"], all_dz)
    return tuple(new_dD), tuple(new_ddelta_bias)
