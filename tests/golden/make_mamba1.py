"""Make mamba1_tiny.npz and mamba1_options.npz: golden values of Mamba-1 from `transformers`.

Run it in an environment of its own, for the project itself never needs torch:

    python3.11 -m venv /tmp/golden
    /tmp/golden/bin/python -m pip install torch==2.13.0 transformers==5.23.0
    /tmp/golden/bin/python tests/golden/make_mamba1.py

The files in the repository were made with Python 3.11.7, torch 2.13.0 (CPU) and transformers 5.23.0. On one machine
the result is the same byte for byte; on another the last bits of the float32 values may differ. What a file holds is
said in record.py.
"""

from pathlib import Path

from record import record
from transformers import MambaConfig, MambaForCausalLM

HERE = Path(__file__).parent

# The settings of the published checkpoints: biased convolution, unbiased projections, tied embeddings.
TINY = MambaConfig(
    vocab_size=96,
    hidden_size=32,
    state_size=8,
    num_hidden_layers=2,
    conv_kernel=4,
    expand=2,
)

# Every setting that changes the mathematics or the set of parameters, away from its default.
OPTIONS = MambaConfig(
    vocab_size=61,
    hidden_size=24,
    state_size=5,
    num_hidden_layers=3,
    conv_kernel=3,
    expand=3,
    time_step_rank=7,
    use_bias=True,
    use_conv_bias=False,
    residual_in_fp32=False,
    layer_norm_epsilon=1e-3,
    tie_word_embeddings=False,
)

if __name__ == "__main__":
    record(MambaForCausalLM(TINY), HERE / "mamba1_tiny.npz", seed=7, batch_size=2, length=37)
    record(MambaForCausalLM(OPTIONS), HERE / "mamba1_options.npz", seed=3, batch_size=3, length=21)
