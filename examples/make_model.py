"""Write a small Qwen3 model with random weights to a folder: `make_model.py DIR`. Every digit is one token."""

import sys
from pathlib import Path

from megatron_rl.tiny_model import make_tiny_model

make_tiny_model(Path(sys.argv[1]), [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)], seed=0)
