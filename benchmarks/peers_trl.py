"""Train with TRL's GRPOTrainer and write one JSON line per step. Runs in TRL's environment; `peers.py` starts it.

    python peers_trl.py MODEL SETTINGS OUT

SETTINGS is `peers.py`'s JSON. A step is one generation and its updates.
"""

import json
import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

MODEL, SETTINGS, OUT = sys.argv[1:]
SIZES = json.loads(SETTINGS)
TRAJECTORIES = SIZES["prompts"] * SIZES["samples"]
rewards: list[float] = []
tokens: list[int] = []


def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: object) -> list[float]:
    """Return 1 for a right result, as the arithmetic task does."""
    found = [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]
    rewards.extend(found)
    tokens.extend(map(len, completion_ids))
    return found


class Log(TrainerCallback):
    """Write a line after the last update of a step."""

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step % SIZES["updates"]:  # type: ignore[attr-defined]
            return
        line = {"reward": sum(rewards) / max(1, len(rewards)), "tokens": sum(tokens)}
        rewards.clear()
        tokens.clear()
        with open(OUT, "a") as file:
            file.write(json.dumps(line) + "\n")


torch.set_num_threads(SIZES["threads"])
# The problems of the arithmetic task.
rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(50) for b in range(50)]
rows += [{"prompt": f"{a}-{b}=", "answer": str(a - b)} for a in range(50) for b in range(a + 1)]
config = GRPOConfig(
    output_dir=OUT + ".trl",
    per_device_train_batch_size=TRAJECTORIES // SIZES["updates"],
    steps_per_generation=SIZES["updates"],
    num_generations=SIZES["samples"],
    max_completion_length=SIZES["new_tokens"],
    learning_rate=SIZES["lr"],
    adam_beta2=0.99,
    beta=0.0,
    loss_type="dapo",
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    lr_scheduler_type="constant",
    max_steps=100_000,
    save_strategy="no",
    logging_steps=100_000,
    report_to=[],
    disable_tqdm=True,
)
trainer = GRPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
    reward_funcs=reward,
    args=config,
    train_dataset=Dataset.from_list(rows).shuffle(seed=0),
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    callbacks=[Log()],
)
trainer.train()
