"""Record what `transformers` computes for a small random causal language model, as one .npz file.

Shared by the make_*.py scripts beside it, which run in an environment of their own: see make_mamba1.py.

An .npz holds
    config            the Hugging Face config.json, as a string
    versions          the versions of torch and transformers that made the file
    weights/NAME      every parameter, float32, under its Hugging Face name; a tied lm_head is left out
    input_ids         (batch, length) int32
    logits            (batch, length, vocabulary) float32
    loss              () float32, the mean cross-entropy of logits[:, :-1] against input_ids[:, 1:]
    gradients/NAME    of the loss, for every parameter
    continuation      (batch, 16) int32, the greedy tokens after input_ids
"""

from pathlib import Path

import numpy as np
import torch
import transformers

CONTINUATION_LENGTH = 16
# A greedy token says something about the model only where float32 rounding cannot change which logit is largest,
# and a continuation says something about its memory only where it does not repeat one token.
SMALLEST_MARGIN = 5e-3
FEWEST_DISTINCT_TOKENS = 8


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Replace every parameter, so that none is at an initial value (zero, one, 1..N) that could hide a mistake."""

    def normal(shape: torch.Size, scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = parameter.shape
            role = ".".join(name.split(".")[-2:])
            if role.endswith("A_log"):
                value = torch.log(uniform(shape, 0.3, 8.0))
            elif role.endswith(".D"):
                value = 1.0 + normal(shape, 0.5)
            elif role in ("dt_proj.bias", "mixer.dt_bias"):
                # From -6 to 0.5, softplus gives steps from 0.0025 to 1: memories from long to one token.
                value = uniform(shape, -6.0, 0.5)
            elif "norm" in role:
                value = uniform(shape, 0.5, 1.5)
            elif role.endswith(".bias"):
                value = normal(shape, 0.3)
            elif role == "embeddings.weight":
                # Small beside what the mixers add, or tied embeddings predict the last token again for ever.
                value = normal(shape, 0.2)
            else:
                fan_in = parameter[0].numel()
                value = normal(shape, fan_in**-0.5)
            parameter.copy_(value)


def greedy_continuation(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The tokens of the parallel form: the cached one of transformers 5.23 leaves Mamba-2's time_step_limit out."""
    tokens = input_ids
    for _ in range(CONTINUATION_LENGTH):
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits[:, -1]
        best, second = logits.topk(2, dim=-1).values.T
        if (best - second).min() < SMALLEST_MARGIN:
            raise SystemExit("Two logits are too close for a greedy token to be certain: choose another seed.")
        tokens = torch.cat([tokens, logits.argmax(dim=-1, keepdim=True)], dim=1)
    continuation = tokens[:, input_ids.shape[1] :]
    if min(len(row.unique()) for row in continuation) < FEWEST_DISTINCT_TOKENS:
        raise SystemExit("A continuation repeats a few tokens: choose another seed.")
    return continuation


def record(model: transformers.PreTrainedModel, path: Path, *, seed: int, batch_size: int, length: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    model.eval()
    input_ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)

    logits = model(input_ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
    loss.backward()

    parameters = dict(model.named_parameters())
    np.savez_compressed(
        path,
        config=np.array(model.config.to_json_string(use_diff=False)),
        versions=np.array(f"torch {torch.__version__}, transformers {transformers.__version__}"),
        input_ids=input_ids.numpy().astype(np.int32),
        logits=logits.detach().numpy(),
        loss=loss.detach().numpy(),
        continuation=greedy_continuation(model, input_ids).numpy().astype(np.int32),
        **{f"weights/{name}": parameter.detach().numpy() for name, parameter in parameters.items()},
        **{f"gradients/{name}": parameter.grad.numpy() for name, parameter in parameters.items()},
    )
    print(f"{path.name}: {len(parameters)} parameters, loss {loss:.4f}, {path.stat().st_size / 1000:.0f} kB")
