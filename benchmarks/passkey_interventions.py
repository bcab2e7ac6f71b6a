"""Why LongMamba finds a passkey or loses it: its filter is put on parts of the text, of the layers, or of the heads.

    python -m benchmarks.passkey_interventions --checkpoint runs/passkey_mamba2 --calibration c.npz
        [--tables text layers] [--lengths 8192 131072] [--decay_thresholds 5e-2 1e-30] [--depths 0.5 1] [--tries 20]
        [--out FILE.json]

Tables, for each length and threshold:

- ``kept``: share of the tokens that the global channels of each layer keep, median over channels: of the text before
  the needle, of the needle, of the key in it, of the question.
- ``text``: keys found where only some of the text is filtered.
- ``layers``: keys found where only some layers are filtered, or the first one otherwise than the rest.
- ``channels``: keys found with the first threshold and, in one layer, the channels of the last one.

The passkeys are those of ``mamba-jax evaluate --task passkey``, the filter is that of one g(S) (whole).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mamba_jax.long_context.attach import with_extenders
from mamba_jax.long_context.calibration import Calibration
from mamba_jax.long_context.diagnostics import collect
from mamba_jax.long_context.longmamba import LongMambaConfig, chosen_channels, interpolated
from mamba_jax.long_context.token_filter import TokenFilter
from mamba_jax.mixers.selective import Extender
from mamba_jax.models.language_model import LanguageModel
from train.checkpoint import load_for_inference
from train.data import pipeline
from train.tasks.example import Example
from train.tasks.methods import load_calibration
from train.tasks.passkey import NEEDLE, QUESTION, Passkey
from train.tasks.reading import Reading, answers
from train.tasks.text import Text

TABLES = ("kept", "text", "layers", "channels")
PARTS = ("before", "needle", "behind")
CHUNK, TOKENS_AT_A_TIME = 4096, 1 << 18

Row = dict[str, Any]


class PartOfText(nnx.Module):
    """A filter that leaves tokens out in some of three parts only: before the needle, in it, and behind it."""

    A_scale = None

    def __init__(self, token_filter: TokenFilter, needle: tuple[int, int], where: Sequence[str], layers: int):
        self.token_filter = token_filter
        self.first, self.last = (nnx.data(jnp.full((layers,), place, jnp.int32)) for place in needle)
        self.parts = nnx.data(jnp.tile(jnp.array([part in where for part in PARTS]), (layers, 1)))

    def __call__(self, delta, bias, position):
        part = (position >= self.first).astype(jnp.int32) + (position > self.last)
        return jnp.where(self.parts[part][..., None], self.token_filter(delta, bias, position), delta)


@dataclasses.dataclass(frozen=True)
class Question:
    """Examples of one length and depth, all of which hold the needle at the same place."""

    examples: Sequence[Example]
    needle: tuple[int, int]
    """First and last position of the needle, from 1."""

    @staticmethod
    def of(task: Passkey, length: int, depth: float, tries: int) -> Question:
        examples = [task.example(index, length, depth) for index in range(tries)]
        encoded = lambda text: len(task.text.tokenizer.encode(text))  # noqa: E731
        needle, behind_key = (encoded(text.format(key=examples[0].expected)) for text in (NEEDLE, " is the pass key. "))
        last = examples[0].foretold.stop + behind_key
        return Question(examples, (last - needle + 1, last))


class Study:
    def __init__(self, model: LanguageModel, calibration: Calibration, task: Passkey, tries: int):
        if len(model.config.pattern) != 1:
            raise SystemExit(f"a model of one kind of layer is needed: this one's pattern is {model.config.pattern!r}.")
        self.model, self.calibration, self.task, self.tries = model, calibration, task, tries
        self.layers = model.config.num_layers

    def question(self, length: int, depth: float) -> Question:
        return Question.of(self.task, length, depth, self.tries)

    def chosen(self, threshold: float) -> np.ndarray:
        """The global channels of a threshold, (layers, channels)."""
        return chosen_channels(self.calibration, LongMambaConfig(decay_threshold=threshold))[0]

    def token_filter(self, length: int, channels: np.ndarray, scaled: np.ndarray | None = None) -> TokenFilter:
        """LongMamba's filter of these channels, (layers, channels), and a slower clock, L/S, for those ``scaled``."""
        ratios = np.array([length / self.calibration.training_length])
        thresholds = interpolated(self.calibration.places[0].thresholds, ratios)
        scaled = np.zeros_like(channels) if scaled is None else scaled
        return TokenFilter(
            np.where((channels & ~scaled)[:, None], thresholds, 0.0),
            scales=np.where(scaled[:, None], 1 / ratios, 1.0),
        )

    def found(self, extender: Extender, questions: Sequence[Question]) -> list[float]:
        """Share of the keys that a model with this extender finds, for each question."""
        model, shares = with_extenders(self.model, {0: extender}), []
        for question in questions:
            texts = answers(
                model,
                question.examples,
                self.task.text.tokenizer,
                Reading(CHUNK, TOKENS_AT_A_TIME),
                max_new_tokens=len(question.examples[0].answer) + 1,
            )
            right = [self.task.is_right(text, one.expected) for text, one in zip(texts, question.examples, strict=True)]
            shares.append(float(np.mean(right)))
        return shares

    def kept(self, length: int, threshold: float, depths: Sequence[float]) -> Iterator[Row]:
        channels = self.chosen(threshold)
        for depth in depths:
            question = self.question(length, depth)
            model = with_extenders(self.model, {0: self.token_filter(length, channels)})
            tokens = jnp.asarray(question.examples[0].prompt)[None]
            first, last = question.needle
            key, end = question.examples[0].foretold, len(self.task.text.tokenizer.encode(QUESTION))
            parts = {
                "text": slice(first - 1),
                "needle": slice(first - 1, last),
                "key": key,
                "question": slice(-end, None),
            }
            for layer, kept in collect(model, tokens, lambda s: s.delta[0] > 0).items():
                if channels[layer].any():
                    kept = np.asarray(kept)[:, channels[layer]]
                    shares = {name: float(np.median(kept[part].mean(axis=0))) for name, part in parts.items()}
                    yield {"depth": depth, "layer": layer, "channels": int(channels[layer].sum()), **shares}

    def text(self, length: int, threshold: float, depths: Sequence[float]) -> Iterator[Row]:
        token_filter = self.token_filter(length, self.chosen(threshold))
        for where in ((), *((part,) for part in PARTS), ("before", "behind"), PARTS):
            shares = []
            for depth in depths:
                question = self.question(length, depth)
                part = PartOfText(token_filter, question.needle, where, self.layers)
                shares += self.found(part, [question])
            yield {"filtered": " and ".join(where) or "nothing", "found": shares}

    def by_layer(self, length: int, threshold: float, depths: Sequence[float]) -> Iterator[Row]:
        questions = [self.question(length, depth) for depth in depths]
        channels = self.chosen(threshold)
        number = np.arange(self.layers)[:, None]

        def row(name: str, channels: np.ndarray, scaled: np.ndarray | None = None) -> Row:
            return {"filtered": name, "found": self.found(self.token_filter(length, channels, scaled), questions)}

        yield row("no layer", channels & False)
        yield row("all layers", channels)
        for layer in range(self.layers):
            if channels[layer].any():
                yield row(f"layer {layer} alone", channels & (number == layer))
                yield row(f"all but layer {layer}", channels & (number != layer))
        yield row("all, but layer 0 scaled", channels, channels & (number == 0))
        yield row("none, but all scaled", channels, channels)

    def by_channels(self, length: int, thresholds: Sequence[float], depths: Sequence[float]) -> Iterator[Row]:
        questions = [self.question(length, depth) for depth in depths]
        high, low = self.chosen(thresholds[0]), self.chosen(thresholds[-1])
        for layer in range(self.layers):
            channels = high | (low & (np.arange(self.layers)[:, None] == layer))
            if added := int((channels & ~high).sum()):
                shares = self.found(self.token_filter(length, channels), questions)
                yield {"layer": layer, "channels added": added, "found": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--decay_thresholds", type=float, nargs="+", default=[5e-2, 1e-30])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--tries", type=int, default=20, help="passkeys a length and depth")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    checkpoint = load_for_inference(options.checkpoint)
    text = Text(pipeline.load(checkpoint.experiment.data).held_out)
    _, model = checkpoint.restore_model()
    calibration = load_calibration(
        options.calibration, ["longmamba"], model, options.checkpoint, read=text.fingerprint, text=text
    )
    assert calibration is not None  # the method needs one
    study = Study(model, calibration, Passkey(text, seed=0), options.tries)

    results: dict[str, list[Row]] = {}
    for title, rows in _tables(study, options):
        print(f"\n{title}, depths {' '.join(map(str, options.depths))}", flush=True)
        results[title] = []
        for row in rows:
            results[title].append(row)
            print("  ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1) + "\n")


def _tables(study: Study, options: argparse.Namespace) -> Iterator[tuple[str, Iterator[Row]]]:
    of_one_threshold = {"kept": study.kept, "text": study.text, "layers": study.by_layer}
    for length in options.lengths:
        for table in options.tables:
            if table == "channels":
                yield (
                    f"channels, {length:,} tokens",
                    study.by_channels(length, options.decay_thresholds, options.depths),
                )
                continue
            for threshold in options.decay_thresholds:
                rows = of_one_threshold[table](length, threshold, options.depths)
                yield f"{table}, {length:,} tokens, Th = {threshold:g}", rows


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
