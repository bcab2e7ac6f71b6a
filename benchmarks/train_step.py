"""Speed and memory of whole models: training, prefill and decoding.

    python benchmarks/train_step.py [--models mamba_130m:8x2048 …] [--decode mamba_130m:64] [--out FILE.json]

Prints a table: milliseconds of an update, tokens a second, share of the device's peak, peak memory. Updates follow each
other as in training, without waiting for each; the time is the median of three rounds of them. A model is
NAME:BATCHxLENGTH; weights and tokens are random. ``--layers loop`` compiles a loop over the layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.generation import Sampling, generate
from mamba_jax.models.presets import preset
from train.config import DataConfig, Experiment, OptimizerConfig, TrainConfig
from train.metrics import peak_flops_per_second
from train.step import init_state, make_train_step


def time_training(name: str, batch_size: int, length: int, *, remat: str, layers: str, steps: int) -> dict[str, object]:
    model = preset(name, compute_dtype="bfloat16", remat=remat)
    experiment = Experiment(
        model=model,
        data=DataConfig(global_batch_size=batch_size, sequence_length=length),
        train=TrainConfig(steps=1000, loss_chunk=4096, unroll_layers=layers == "unrolled"),
        optimizer=OptimizerConfig(),
    )
    state = jax.jit(lambda: init_state(experiment))()
    train_step = make_train_step(experiment)
    tokens = jax.random.randint(jax.random.key(0), (batch_size, length), 0, model.vocab_size)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "segment_ids": jnp.zeros_like(tokens),
        "loss_weights": jnp.ones(tokens.shape, jnp.float32),
    }
    began = time.perf_counter()
    state, metrics = train_step(state, batch)
    jax.block_until_ready(metrics)
    compile_seconds = time.perf_counter() - began
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = train_step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append((time.perf_counter() - began) / steps)
    seconds = statistics.median(times)
    flops = 3 * batch_size * state.model.flops(length)
    peak = peak_flops_per_second(jax.devices()[0].device_kind)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "model": name,
        "batch": f"{batch_size}x{length}",
        "remat": remat,
        "layers": layers,
        "ms": 1e3 * seconds,
        "tokens_per_second": batch_size * length / seconds,
        "mfu": flops / seconds / peak if peak else None,
        "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30,
        "compile_s": compile_seconds,
        "loss": float(metrics["loss"]),
    }


def time_decoding(name: str, batch_size: int, prompt_length: int = 512, new_tokens: int = 128) -> dict[str, object]:
    config = preset(name, compute_dtype="bfloat16")
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    prompts = jax.random.randint(jax.random.key(0), (batch_size, prompt_length), 0, config.vocab_size).tolist()

    def run() -> float:
        began = time.perf_counter()
        generate(model, prompts, max_new_tokens=new_tokens, sampling=Sampling(temperature=0.0))
        return time.perf_counter() - began

    run()
    seconds = statistics.median(run() for _ in range(3))
    return {
        "model": name,
        "batch": batch_size,
        "prompt": prompt_length,
        "new": new_tokens,
        "ms": 1e3 * seconds,
        "new_tokens_per_second": batch_size * new_tokens / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mamba_130m:8x2048"])
    parser.add_argument("--decode", nargs="*", default=[])
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--layers", default="unrolled", choices=["unrolled", "loop"])
    parser.add_argument("--steps", type=int, default=20, help="updates in a round")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    def show(row: dict[str, object]) -> dict[str, object]:
        cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print("  ".join(cells), flush=True)
        return row

    rows = []
    for spec in args.models:
        name, _, shape = spec.partition(":")
        batch_size, length = map(int, shape.split("x"))
        rows.append(
            show(time_training(name, batch_size, length, remat=args.remat, layers=args.layers, steps=args.steps))
        )
    for spec in args.decode:
        name, _, batch_size = spec.partition(":")
        rows.append(show(time_decoding(name, int(batch_size))))
    if args.out:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
