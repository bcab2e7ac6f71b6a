"""Backward kernel of the selective scan: one walk back over the sequence, the state's gradient in registers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu_compat import plgpu, store, synchronize
from pallas_kernels.selective_scan.mosaic_gpu import blocks
from pallas_kernels.selective_scan.mosaic_gpu.blocks import Problem, Refs, State
from pallas_kernels.selective_scan.mosaic_gpu.elementwise import LN_2, sigmoid, softplus_gradient

Tokens = tuple[jax.Array, ...]


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
        inputs: as ``Problem`` describes them, with "states" that ``forward.scan`` saved, "dy" and "dfinal_state"; with
            several parts also what ``parts.summarize`` returned for ``reverse``.

    Returns:
        "dx", "ddelta", "dz", "dB", "dC" and "dinitial_state" like their inputs. Sums to be finished outside: "dA",
        (batch, parts, *A's shape), "dD" and "ddelta_bias", (batch, parts, channels), over batch and parts.
    """
    g = p.geometry
    optional = [name for name in ("z", "keep") if name in inputs]
    streamed = ["x", "delta", "B", "C", "dy", *optional]
    matrix_dims = (p.blocks_per_group * p.batch, p.stored_length, *inputs["B"].shape[2:])
    matrix_type = jax.ShapeDtypeStruct(matrix_dims, jnp.float32)
    sums_type = jax.ShapeDtypeStruct((p.batch, p.num_parts, p.channels), jnp.float32)
    outputs = {
        "dx": p.token_type(inputs["x"]),
        "ddelta": p.token_type(inputs["delta"]),
        "dB": matrix_type,
        "dC": matrix_type,
        "dA": p.state_type(p.num_parts),
        "dinitial_state": p.state_type(),
    }
    if "z" in inputs:
        outputs["dz"] = p.token_type(inputs["z"])
    outputs |= {f"d{name}": sums_type for name in ("D", "delta_bias") if name in inputs}
    token_buffer = plgpu.SMEM((g.steps, g.channels), jnp.float32)
    lanes, channels, states = g.tile_shape
    scratch = p.buffers(inputs, streamed) | {
        "step_size": token_buffer,
        "input": token_buffer,
        "gated_dy": token_buffer,
        # The state before each step; once a step is done, the first two tiles of its slot hold dB and dC by channel.
        "history": plgpu.SMEM((g.history_steps, max(g.tiles, 2), lanes, channels, states), jnp.float32),
    }
    if "z" in inputs:
        scratch["C_h"] = token_buffer

    def backward(gmem: Refs, smem: Refs) -> None:
        block = p.block()
        A = blocks.load_state(g, gmem["A"].at[:, block.channels])
        p.load_parameters(gmem, smem, block)
        num_saved = inputs["states"].shape[1]

        def chunk(index: Any, refs: Refs, carry: Carry) -> Carry:
            # Chunks after the end of the sequence, where nothing was saved, change nothing, from whatever state.
            saved = gmem["states"].at[block.batch, jnp.minimum(index, num_saved - 1), :, block.channels]
            h_start = blocks.load_state(g, saved)
            _prepare(p, smem, refs, index)
            synchronize()
            dh, dA = carry.dh, carry.dA
            for start in reversed(range(0, g.steps, g.history_steps)):
                h = _recompute(p, smem, refs, A, h_start, start)
                dh, dA = _walk_back(p, smem, refs, A, h, dh, dA, start)
                synchronize()
                _sum_over_channels(p, smem, refs, start)
                synchronize()
            dD, ddelta_bias = _finish(p, smem, refs, index, carry)
            plgpu.commit_smem()
            rows = p.rows(index)
            for name, output in (("x", "dx"), ("delta", "ddelta"), ("z", "dz")):
                if name in refs:
                    plgpu.copy_smem_to_gmem(refs[name], gmem[output].at[block.batch, rows, block.channels])
            partial = lax.rem(block.index, p.blocks_per_group) * p.batch + block.batch
            for name in ("B", "C"):
                plgpu.copy_smem_to_gmem(refs[name], gmem[f"d{name}"].at[partial, rows, block.group])
            return Carry(dh, dA, dD, ddelta_bias)

        zeros = tuple(blocks.zero_tokens(g) for _ in g.token_tiles())
        dh = blocks.load_state(g, gmem["dfinal_state"].at[block.batch, :, block.channels])
        later = p.num_parts - 1
        dh = blocks.carry_over_parts(p, gmem, block, A, dh, 0, later - block.part, lambda i: later - i)
        carry = Carry(dh, blocks.zero_state(g), zeros, zeros)
        carry = p.stream(gmem, smem, streamed, block, chunk, carry, reverse=True)
        blocks.store_state(g, gmem["dA"].at[block.batch, block.part, :, block.channels], carry.dA)
        for name, sums in (("D", carry.dD), ("delta_bias", carry.ddelta_bias)):
            if name in gmem:
                blocks.store_sums(g, gmem[f"d{name}"].at[block.batch, block.part], block, sums)

        @pl.when(block.part == 0)
        def _() -> None:
            blocks.store_state(g, gmem["dinitial_state"].at[block.batch, :, block.channels], carry.dh)

    results = p.launch(backward, inputs, outputs, scratch)
    for name in ("dB", "dC"):
        terms = results[name].reshape(p.blocks_per_group, p.batch, *results[name].shape[1:])
        results[name] = jnp.sum(terms[:, :, : p.length], axis=0)
    for name in ("dx", "ddelta", "dz"):
        if name in results:
            results[name] = p.trim(results[name])
    return results


def _prepare(p: Problem, smem: Refs, refs: Refs, index: Any) -> None:
    """Computes what the steps need of each token: delta', delta' x, and the gradient of C h + D x."""
    g = p.geometry
    for channels in g.token_tiles():
        step_size = p.step_sizes(smem, refs, index, channels)
        store(smem["step_size"].at[:, channels], step_size)
        store(smem["input"].at[:, channels], step_size * blocks.load_token(g, refs["x"], channels))
        dy = blocks.load_token(g, refs["dy"], channels)
        if "z" in refs:
            z = blocks.load_token(g, refs["z"], channels)
            dy = dy * (z * sigmoid(z))
        store(smem["gated_dy"].at[:, channels], dy)


def _recompute(p: Problem, smem: Refs, refs: Refs, A: State, h: State, start: int) -> State:
    """Walks from the state before the chunk over a piece of it, keeping the state before each step of the piece."""
    g = p.geometry

    def step(t: Any, h: State, *, keep_state: bool) -> State:
        B, C = blocks.load_matrix(g, refs["B"], t), blocks.load_matrix(g, refs["C"], t)
        keep = refs["keep"][t] if "keep" in refs else None
        new = []
        for tile, channels in enumerate(g.register_tiles()):
            step_size = blocks.load_channel(g, smem["step_size"], t, channels)
            x = blocks.load_channel(g, smem["input"], t, channels)
            new.append(blocks.decay(step_size, A[tile], keep) * h[tile] + x * B)
            if keep_state:
                store(smem["history"].at[t - start, tile], h[tile])
                if "C_h" in smem:
                    store(smem["C_h"].at[t, channels], _sum_over_states(new[tile] * C))
        return tuple(new)

    def steps(i: Any, h: State, *, first: int, keep_state: bool) -> State:
        for u in range(g.unroll):
            h = step(first + i * g.unroll + u, h, keep_state=keep_state)
        return h

    h = lax.fori_loop(0, start // g.unroll, functools.partial(steps, first=0, keep_state=False), h)
    count = g.history_steps // g.unroll
    return lax.fori_loop(0, count, functools.partial(steps, first=start, keep_state=True), h)


def _walk_back(
    p: Problem, smem: Refs, refs: Refs, A: State, h: State, dh: State, dA: State, start: int
) -> tuple[State, State]:
    """Walks back over a piece of the chunk; returns the gradients of the state before it and of A.

    Leaves in place of "input" the sum over the states of B dh, in place of "gated_dy" that of A times the gradient of
    delta' A, and in "history" the terms of dB and dC, one a channel of a register tile.
    """
    g = p.geometry

    def operands(t: Any) -> tuple[Any, ...]:
        tokens = [
            tuple(blocks.load_channel(g, smem[name], t, channels) for name in ("step_size", "input", "gated_dy"))
            for channels in g.register_tiles()
        ]
        history = [
            plgpu.load(smem["history"].at[t - start, tile], layout=g.state_layout, optimized=False)
            for tile in range(g.tiles)
        ]
        keep = refs["keep"][t] if "keep" in refs else None
        return tokens, history, blocks.load_matrix(g, refs["B"], t), blocks.load_matrix(g, refs["C"], t), keep

    def steps(i: Any, carry: tuple[State, State, State]) -> tuple[State, State, State]:
        rows = [start + g.history_steps - 1 - i * g.unroll - u for u in range(g.unroll)]
        # Loaded before the first store, past which the compiler would not move them.
        loaded = [operands(t) for t in rows]
        for t, (tokens, before, B, C, keep) in zip(rows, loaded, strict=True):
            h, dh, dA = carry
            new_dh, new_dA, dB_terms, dC_terms = [], [], [], []
            for tile, channels in enumerate(g.register_tiles()):
                step_size, x, dy = tokens[tile]
                d = dh[tile] + dy * C
                dC_terms.append(dy * h[tile])
                dB_terms.append(x * d)
                passed = blocks.decay(step_size, A[tile], keep) * d
                dlog_decay = passed * before[tile]
                new_dA.append(dA[tile] + step_size * dlog_decay)
                new_dh.append(passed)
                store(smem["input"].at[t, channels], _sum_over_states(d * B))
                store(smem["gated_dy"].at[t, channels], _sum_over_states(dlog_decay * A[tile]))
            store(smem["history"].at[t - start, 0], functools.reduce(jnp.add, dB_terms))
            store(smem["history"].at[t - start, 1], functools.reduce(jnp.add, dC_terms))
            carry = tuple(before), tuple(new_dh), tuple(new_dA)
        return carry

    _, dh, dA = lax.fori_loop(0, g.history_steps // g.unroll, steps, (h, dh, dA))
    return dh, dA


def _sum_over_states(tile: jax.Array) -> jax.Array:
    """Sums a register tile over the states of each channel."""
    return jnp.sum(jnp.sum(tile, axis=2), axis=0)


def _sum_over_channels(p: Problem, smem: Refs, refs: Refs, start: int) -> None:
    """Puts the block's dB and dC of a piece of the chunk in place of B and C."""
    g = p.geometry
    for slot, name in enumerate(("B", "C")):
        terms = plgpu.load(smem["history"].at[:, slot], layout=g.channel_sum_layout, optimized=False)
        store(refs[name].at[pl.ds(start, g.history_steps)], jnp.sum(terms, axis=2))


def _finish(p: Problem, smem: Refs, refs: Refs, index: Any, carry: Carry) -> tuple[Tokens, Tokens]:
    """Puts the gradients of x, delta and z in place of these; adds to those of D and delta_bias."""
    g = p.geometry
    new_dD, new_ddelta_bias = [], []
    for tile, channels in enumerate(g.token_tiles()):
        x = blocks.load_token(g, refs["x"], channels)
        dy = blocks.load_token(g, refs["dy"], channels)
        D = blocks.per_channel(g, smem["D"], channels) if "D" in smem else None
        if "z" in refs:
            z = blocks.load_token(g, refs["z"], channels)
            gate = sigmoid(z)
            y = blocks.load_token(g, smem["C_h"], channels)
            y = y if D is None else y + D * x
            dz = dy * y * gate * (1.0 + z * (1.0 - gate))
            store(refs["z"].at[:, channels], dz.astype(refs["z"].dtype))
            dy = dy * (z * gate)
        step_size = blocks.load_token(g, smem["step_size"], channels)
        B_dh = blocks.load_token(g, smem["input"], channels)
        dx = step_size * B_dh
        dx = dx if D is None else dx + D * dy
        # A comes times log2(e), which its gradient must not.
        ddelta = x * B_dh + LN_2 * blocks.load_token(g, smem["gated_dy"], channels)
        if p.delta_softplus:
            ddelta = ddelta * softplus_gradient(step_size)
        new_dD.append(carry.dD[tile] + dy * x)
        new_ddelta_bias.append(carry.ddelta_bias[tile] + p.mask(ddelta, index))
        store(refs["x"].at[:, channels], dx.astype(refs["x"].dtype))
        store(refs["delta"].at[:, channels], ddelta.astype(refs["delta"].dtype))
    return tuple(new_dD), tuple(new_ddelta_bias)
