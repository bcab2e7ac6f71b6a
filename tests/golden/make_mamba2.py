"""Make mamba2_tiny.npz and mamba2_options.npz: golden values of Mamba-2 from `transformers`.

Run it as make_mamba1.py says; the versions are the same ones.
"""

from pathlib import Path

from record import record
from transformers import Mamba2Config, Mamba2ForCausalLM

HERE = Path(__file__).parent

# One group, as in the published state-spaces checkpoints; the length is not a multiple of the chunk.
TINY = Mamba2Config(
    vocab_size=96,
    hidden_size=32,
    state_size=16,
    num_hidden_layers=2,
    conv_kernel=4,
    expand=2,
    num_heads=8,
    head_dim=8,
    n_groups=1,
    chunk_size=16,
    tie_word_embeddings=True,
)

# Several groups, a step clamped on both sides, and every other setting that changes the mathematics or the parameters.
OPTIONS = Mamba2Config(
    vocab_size=61,
    hidden_size=24,
    state_size=6,
    num_hidden_layers=3,
    conv_kernel=3,
    expand=3,
    num_heads=12,
    head_dim=6,
    n_groups=4,
    chunk_size=8,
    time_step_limit=(0.02, 0.5),
    use_bias=True,
    use_conv_bias=False,
    residual_in_fp32=False,
    layer_norm_epsilon=1e-3,
    tie_word_embeddings=False,
)

if __name__ == "__main__":
    record(Mamba2ForCausalLM(TINY), HERE / "mamba2_tiny.npz", seed=1, batch_size=2, length=37)
    record(Mamba2ForCausalLM(OPTIONS), HERE / "mamba2_options.npz", seed=0, batch_size=3, length=21)
