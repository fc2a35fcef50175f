"""Rules between keys of a configuration that need only the configuration. Each raises ConfigError."""

from megatron_rl.config.schema import Config
from megatron_rl.errors import ConfigError


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
