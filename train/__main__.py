"""``python -m train`` is ``mamba-jax train``."""

import sys

from train.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
