"""Rules between keys of a configuration that need only the configuration. Each raises ConfigError."""

from megatron_rl.config.schema import Config, SGLangConfig
from megatron_rl.errors import ConfigError

MOST_TRAJECTORIES = 1_000_000  # of one step, waiting versions included; they are Python objects of rank 0


def _a_trajectory_fits_a_microbatch(config: Config) -> None:
    """Check that the longest trajectory, padded for context parallelism, fits the micro-batch, which divides evenly."""
    longest = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens
    budget, parallel = config.optimizer.tokens_per_microbatch, config.parallel
    align = 2 * parallel.context if parallel.context > 1 else 1
    if -(-longest // align) * align > budget:
        raise ConfigError(
            f"optimizer.tokens_per_microbatch is {budget}, but one trajectory may "
            f"have rollout.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens: raise the former or "
            "lower the latter"
        )
    unit = 2 * parallel.context * parallel.tensor
    if budget % unit:
        raise ConfigError(f"optimizer.tokens_per_microbatch must be a multiple of 2 x context x tensor = {unit}")


def _every_update_has_a_prompt(config: Config) -> None:
    """Check that no update is without a prompt."""
    if config.optimizer.updates_per_step > config.rollout.prompts_per_step:
        raise ConfigError(
            "optimizer.updates_per_step exceeds rollout.prompts_per_step: an update needs at least one prompt"
        )


def _a_step_fits_memory(config: Config) -> None:
    """Check that a step has a number of trajectories that one process can hold."""
    rollout = config.rollout
    versions = rollout.max_staleness + 1
    count = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.oversample * versions
    if count > MOST_TRAJECTORIES:
        raise ConfigError(
            f"rollout.prompts_per_step x samples_per_prompt x oversample x (max_staleness + 1) = {count:.0f} "
            f"trajectories may be held at once; at most {MOST_TRAJECTORIES} are possible: lower one of them"
        )


def _the_overlong_part_is_of_a_response(config: Config) -> None:
    """Check that the lengths over which the reward falls are lengths of a response."""
    if config.objective.overlong_buffer > config.rollout.max_new_tokens:
        raise ConfigError(
            "objective.overlong_buffer exceeds rollout.max_new_tokens: it is a part of the longest response"
        )


def _math_needs_data(config: Config) -> None:
    """Check that the task that has no problems of its own has a file of them."""
    if config.task.name == "math" and config.task.data is None:
        raise ConfigError("task.data is required for task.name: math")


def _an_output_fits_a_response(config: Config) -> None:
    """Check that a response has a second turn, and room for an output of the tool."""
    task, room = config.task, config.rollout.max_new_tokens
    if task.name != "tool":
        return
    if task.max_turns < 2:
        raise ConfigError("task.max_turns is 1, but task.name: tool needs a second turn, in which an output is read")
    if task.tool_tokens >= room:
        raise ConfigError(
            f"task.tool_tokens is {task.tool_tokens}, but rollout.max_new_tokens, which a response has for "
            f"all its turns and outputs, is {room}: lower the former or raise the latter"
        )


def _a_router_is_for_own_sglang_servers(config: Config) -> None:
    """Check that a router has servers to route to, and drops nothing that the run needs."""
    rollout = config.rollout
    if not rollout.sglang.router:
        return
    if rollout.engine != "sglang":
        raise ConfigError(
            "rollout.sglang.router: true needs engine: sglang; requests to embedded servers are spread by the trainer"
        )
    if not rollout.own_servers:
        raise ConfigError(
            "rollout.sglang.router: true starts a router for servers of our own, and rollout.urls or urls_dir names "
            "others: leave out one"
        )
    if rollout.routing_replay:
        raise ConfigError(
            "rollout.routing_replay: true does not go with rollout.sglang.router: the router drops the request for "
            "experts"
        )


def _engines_are_named_in_one_way(config: Config) -> None:
    """Check that engines are named by URL or by a folder, and that a key is for engines that others have started."""
    rollout = config.rollout
    if rollout.urls and rollout.urls_dir is not None:
        raise ConfigError("rollout.urls and rollout.urls_dir both name the engines: leave out one")
    if rollout.own_servers and rollout.api_key_file is not None:
        raise ConfigError(
            "rollout.api_key_file is the key of the engines of rollout.urls or urls_dir; own servers get one by "
            "themselves: leave it out, or name the engines"
        )


def _keys_of_sglang_need_sglang(config: Config) -> None:
    """Check that the options of SGLang's servers are given for SGLang's servers."""
    rollout = config.rollout
    if rollout.engine != "sglang" and rollout.sglang != SGLangConfig():
        raise ConfigError(
            "rollout.sglang.* is about servers of engine: sglang, and rollout.engine is embedded: leave it out, or "
            "change engine"
        )


def _only_the_embedded_engine_is_deterministic(config: Config) -> None:
    """Check that deterministic is asked of the engine that can promise it."""
    if config.rollout.deterministic and config.rollout.engine == "sglang":
        raise ConfigError(
            "rollout.deterministic: true is a promise of engine: embedded; SGLang's samples depend on their batch"
        )


def _deterministic_takes_every_group(config: Config) -> None:
    """Check that a deterministic run trains on every group it samples."""
    rollout = config.rollout
    if rollout.deterministic and rollout.oversample > 1:
        raise ConfigError(
            f"rollout.oversample: {rollout.oversample} takes the groups that finish first, which is chance, and "
            "rollout.deterministic: true leaves nothing to chance: drop one of them"
        )


def _replaced_groups_have_several_samples(config: Config) -> None:
    """Check that groups that may be replaced have several samples: a group of one sample is always replaced."""
    rollout = config.rollout
    if rollout.max_resampled_groups and rollout.samples_per_prompt == 1:
        raise ConfigError(
            "rollout.max_resampled_groups replaces groups whose rewards are all equal, and with "
            "rollout.samples_per_prompt: 1 every group is one of them: raise the latter"
        )


def _kept_caches_need_staleness(config: Config) -> None:
    """Check that in_place is used with staleness: only requests that run through an update keep a cache."""
    rollout = config.rollout
    if rollout.update_mode == "in_place" and not rollout.max_staleness:
        raise ConfigError(
            "rollout.update_mode: in_place keeps the cache of requests that run through a weight update, and with "
            "rollout.max_staleness: 0 no request does: set retract, or raise max_staleness"
        )


def _retraction_and_replayed_experts(config: Config) -> None:
    """Check that retract is not combined with replay: retracted requests report the experts of newer weights."""
    rollout = config.rollout
    if (
        rollout.routing_replay
        and rollout.engine == "sglang"
        and rollout.update_mode == "retract"
        and rollout.max_staleness
    ):
        raise ConfigError(
            "rollout.update_mode: retract has SGLang choose the experts of tokens again that older weights sampled, "
            "and rollout.routing_replay would replay those: take abort or in_place, or rollout.max_staleness: 0"
        )


def _staging_folder_needs_disk(config: Config) -> None:
    """Check that weights_dir is used with disk: only the disk transport writes to a folder."""
    rollout = config.rollout
    if rollout.weights_dir is not None and rollout.transport != "disk":
        raise ConfigError(
            f"rollout.weights_dir is where transport: disk writes, and rollout.transport is {rollout.transport}: "
            "leave it out"
        )


def _bucket_size_needs_buckets(config: Config) -> None:
    """Check that bucket_mb is used with a transport that has buckets."""
    rollout = config.rollout
    if rollout.bucket_mb != type(rollout).model_fields["bucket_mb"].default and rollout.transport == "disk":
        raise ConfigError(
            f"rollout.bucket_mb: {rollout.bucket_mb} is about transports distributed and tensor, and disk writes a "
            "whole version at once: leave it out, or change rollout.transport"
        )


def _samples_are_of_the_step(config: Config) -> None:
    """Check that a step has as many prompts as its samples show."""
    if config.run.show_samples > config.rollout.prompts_per_step:
        raise ConfigError(
            f"run.show_samples: {config.run.show_samples} exceeds rollout.prompts_per_step: "
            f"{config.rollout.prompts_per_step}: lower it"
        )


_RULES = (
    _engines_are_named_in_one_way,
    _a_router_is_for_own_sglang_servers,
    _keys_of_sglang_need_sglang,
    _only_the_embedded_engine_is_deterministic,
    _a_trajectory_fits_a_microbatch,
    _every_update_has_a_prompt,
    _a_step_fits_memory,
    _the_overlong_part_is_of_a_response,
    _math_needs_data,
    _an_output_fits_a_response,
    _deterministic_takes_every_group,
    _replaced_groups_have_several_samples,
    _kept_caches_need_staleness,
    _retraction_and_replayed_experts,
    _staging_folder_needs_disk,
    _bucket_size_needs_buckets,
    _samples_are_of_the_step,
)


def check_rules(config: Config) -> None:
    """Raise ConfigError for the first rule that a configuration breaks."""
    for rule in _RULES:
        rule(config)
