"""Write a small Qwen3 model with random weights: `make_model.py DIR [LAYERS]`. Every digit is one token."""

import sys
from pathlib import Path

from megatron_rl.tiny_model import make_tiny_model

layers = int(sys.argv[2]) if len(sys.argv) > 2 else 2
make_tiny_model(Path(sys.argv[1]), [f"{a}+{b}={a + b}" for a in range(20) for b in range(20)], seed=0, layers=layers)
