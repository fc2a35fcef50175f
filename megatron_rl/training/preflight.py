"""Everything that can be known to fail before a process is started or a byte allocated."""

from transformers import AutoTokenizer

from megatron_rl.config import Config
from megatron_rl.errors import ConfigError
from megatron_rl.objectives import make_objective
from megatron_rl.tasks import make_task
from megatron_rl.training.rollouts import stop_token_ids
from megatron_rl.weights.hf import HFFolder
from megatron_rl.weights.plan import check_folder


def check(config: Config) -> None:
    """Objective, checkpoint headers, layout against the model, the task's data.

    Raises ConfigError, CheckpointError or UserError.
    """
    make_objective(config.objective.spec())
    _, shape = check_folder(HFFolder(config.model.path), tensor_parallel=config.parallel.tensor)
    stages = config.parallel.pipeline * config.parallel.virtual_pipeline
    if shape.num_layers % stages:
        raise ConfigError(f"parallel.pipeline x parallel.virtual_pipeline = {stages} does not divide {shape.num_layers} layers")
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    if longest > shape.max_position_embeddings:
        raise ConfigError(
            f"rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} exceeds the model's "
            f"max_position_embeddings = {shape.max_position_embeddings}"
        )
    stop_token_ids(config.model.path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    make_task(config.task, tokenizer, seed=config.run.seed, max_prompt_tokens=config.rollout.max_prompt_tokens).close()


def check_run_folder(config: Config, *, resume: bool) -> None:
    """Raises ConfigError when the run folder already holds a run that is not to be resumed."""
    folder = config.run.folder
    if (folder / "log.jsonl").exists() and not resume:
        raise ConfigError(f"{folder} already holds a run: pass --resume to go on with it, or choose another run.name")
