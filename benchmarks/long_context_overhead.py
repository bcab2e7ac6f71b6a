"""Time of a long prefill with and without extenders, and what it needs in memory.

    python -m benchmarks.long_context_overhead [--models mamba_130m …] [--forms plain …] [--length 131072] [--repeats 5]
                                               [--out FILE.json]

Prints, for each model and form, milliseconds of a prefill (median, least), how much longer than the plain model's that
is, and the temporary memory of the compiled prefill. The forms take turns, so that a change of the clock meets all of
them. Weights and tokens are random; so the thresholds are, but they cost what any others do.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from mamba_jax.generation import prefill
from mamba_jax.long_context.calibration import calibrate
from mamba_jax.long_context.decimamba import DeciMambaConfig, apply_decimamba
from mamba_jax.long_context.longmamba import LongMambaConfig, apply_longmamba
from mamba_jax.models.language_model import LanguageModel
from mamba_jax.models.presets import preset

_TRAINING_LENGTH = 2000


FORMS = ("plain", "streaming", "whole", "rescaled", "decimamba")
"""The model as it is; LongMamba with g of the position, with one g, and scaling what it keeps; DeciMamba."""


def forms(model: LanguageModel, length: int, names: Sequence[str]) -> dict[str, LanguageModel]:
    """The model in some forms; all channels are taken to be global, so that LongMamba costs the most it can."""
    tokens = jax.random.randint(jax.random.key(1), (2, _TRAINING_LENGTH), 0, model.config.vocab_size)
    calibration = calibrate(model, tokens)
    longmamba = functools.partial(LongMambaConfig, decay_threshold=1e-300)
    make = {
        "plain": lambda: model,
        "streaming": lambda: apply_longmamba(model, calibration, longmamba()),
        "whole": lambda: apply_longmamba(model, calibration, longmamba(length=length)),
        "rescaled": lambda: apply_longmamba(model, calibration, longmamba(rescale=True)),
        "decimamba": lambda: apply_decimamba(model, DeciMambaConfig(layers=(model.config.num_layers // 2,))),
    }
    return {name: make[name]() for name in dict.fromkeys(("plain", *names))}


def measure(name: str, names: Sequence[str], length: int, repeats: int) -> list[dict[str, object]]:
    """One row for each form of a model."""
    config = preset(name, compute_dtype="bfloat16")
    model = jax.jit(lambda: config.build(nnx.Rngs(0)))()
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab_size)
    segment_ids = jnp.ones_like(tokens)
    models = forms(model, length, names)
    compiled = {form: prefill.lower(extended, tokens, segment_ids).compile() for form, extended in models.items()}
    times: dict[str, list[float]] = {form: [] for form in models}
    for i in range(repeats + 1):
        for form, extended in models.items():
            began = time.perf_counter()
            jax.block_until_ready(compiled[form](extended, tokens, segment_ids))
            if i > 0:  # the first one warms up
                times[form].append(time.perf_counter() - began)
    plain = statistics.median(times["plain"])
    return [
        {
            "model": name,
            "form": form,
            "length": length,
            "ms": 1e3 * statistics.median(seconds),
            "least_ms": 1e3 * min(seconds),
            "overhead_percent": 100 * (statistics.median(seconds) / plain - 1),
            "temporary_gib": _temporary_bytes(compiled[form]) / 2**30,
        }
        for form, seconds in times.items()
    ]


def _temporary_bytes(compiled: jax.stages.Compiled) -> float:
    memory = compiled.memory_analysis()
    return math.nan if memory is None else memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mamba_130m"])
    parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for row in measure(name, options.forms, options.length, options.repeats):
            cells = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
            print("  ".join(cells), flush=True)
            rows.append(row)
    if options.out:
        versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        options.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
