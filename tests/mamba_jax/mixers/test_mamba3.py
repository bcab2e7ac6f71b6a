from mamba_jax.mixers.mamba3 import Mamba3Config
from tests.mamba_jax.mixers.contract import MixerContract


class TestMamba3(MixerContract):
    config = Mamba3Config(state_size=8, head_dim=4)


class TestMamba3WithEveryOption(MixerContract):
    config = Mamba3Config(expand=3, state_size=6, head_dim=4, groups=2, rank=2, rotary_fraction=1.0, output_norm=True)
