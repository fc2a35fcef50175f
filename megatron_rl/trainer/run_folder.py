"""The run folder: what may stand in it, whether a run can start or go on there, and how it is made ready."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

from megatron_rl.config import Config, changed_keys, load_config
from megatron_rl.diagnostics import read_log
from megatron_rl.diagnostics.evaluations import EVALUATIONS_NAME
from megatron_rl.diagnostics.runlog import LOG_NAME
from megatron_rl.diagnostics.samples import SAMPLES_NAME
from megatron_rl.engines.offload import OFFLOADED_NAME, OffloadedEngines
from megatron_rl.errors import ConfigError
from megatron_rl.files import try_lock
from megatron_rl.loggers import check_loggers
from megatron_rl.plan import plan_algorithm
from megatron_rl.policy.checkpoint_files import find_defect
from megatron_rl.policy.checkpoint_state import newest_valid
from megatron_rl.sampling.rollouts import rollouts_folder
from megatron_rl.trainer.code_record import CODE_FILE, check_code, write_code
from megatron_rl.trainer.provenance import PROVENANCE_NAME
from megatron_rl.trainer.run_control import CONTROL_NAME

CONFIG_NAME = "config.yaml"
LOCK_NAME = "in-use"
# Keys that a run may change between two attempts: where it computes and how long, not what.
KEYS_OF_AN_ATTEMPT = {
    "rollout": ("servers", "urls", "urls_dir", "weights_dir", "timeout_s", "start_timeout_s", "api_key_file"),
    "run": ("dir", "name", "steps", "save_every", "keep", "deadline_margin_s", "loggers", "show_samples"),
}
_RECORDS = (
    *(LOG_NAME, "log.dropped.jsonl", SAMPLES_NAME, "samples.dropped.jsonl"),
    *(EVALUATIONS_NAME, "evaluations.dropped.jsonl", PROVENANCE_NAME),
)
FILES = (CONFIG_NAME, *_RECORDS, CODE_FILE, OFFLOADED_NAME, LOCK_NAME)
FOLDERS = (CONTROL_NAME, "checkpoints", "rollouts", "attribution", "servers", "tb", "hf", "report")


def check_run_folder(config: Config, *, resume: bool, accept_changed_code: bool = False) -> None:
    """Check that a run can start in its folder, or resume there.

    Args:
        config: the resolved configuration.
        resume: continue the run that the folder holds.
        accept_changed_code: do not compare the user's own code with what the run used before.

    Raises:
        ConfigError: the folder or something in it cannot be used, it holds a run and `resume` is False, the user's own
            code has changed, or a required checkpoint is missing.
        UserError: a line of the run log is malformed.
    """
    if accept_changed_code and not resume:
        raise ConfigError("--accept-changed-code is about a run that goes on: pass it together with --resume")
    folder = config.run.folder
    check_folder_paths(folder)
    if resume:
        _check_content(folder)
    if (folder / LOG_NAME).exists() and not resume:
        raise ConfigError(f"{folder} already holds a run: pass --resume to go on with it, or choose another run.name")
    if resume and not accept_changed_code:
        check_code(config)
    checkpoints = folder / "checkpoints"
    new = newest_valid(checkpoints)[0] is None  # a new run writes step 0 before it is needed
    for j in plan_algorithm(config).older_checkpoints:
        reason = find_defect(checkpoints / f"step_{j:06d}")
        if reason is not None and not (new and j == 0):
            raise ConfigError(
                f"objective.signals: student@{j} is the run's checkpoint after {j} steps, and {checkpoints} has no "
                f"usable one ({reason}): train to that step with another signal and run.steps={j}, "
                "then --resume with this one"
            )


def check_folder_paths(folder: Path) -> None:
    """Check that the run folder can be made or written, and that everything the run keeps there has its kind.

    Raises:
        ConfigError: names the path that is not a folder, not a file, or may not be written.
    """
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
        _check_place(nearest, is_folder=True)
        if nearest != folder:
            return
        for names, is_folder in ((FILES, False), (FOLDERS, True)):
            for path in (folder / name for name in names):
                if path.exists() or path.is_symlink():
                    _check_place(path, is_folder=is_folder)
    except OSError as error:
        raise _unusable(folder, error) from error


def _check_place(path: Path, *, is_folder: bool) -> None:
    if not (path.is_dir() if is_folder else path.is_file()):
        found = "a folder" if path.is_dir() else "a broken link" if not path.exists() else "no folder"
        kind = "a folder" if is_folder else "a file"
        raise ConfigError(
            f"{path} is {found}, and the run needs {kind} there: move it away, or choose another run.dir or run.name"
        )
    if not os.access(path, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0), effective_ids=True):
        raise ConfigError(f"{path} cannot be written by this user: change its permissions, or choose another run.dir")


def _check_content(folder: Path) -> None:
    """Check that the files that a resumed run reads can be read. Raise ConfigError or UserError."""
    _ = OffloadedEngines(folder / OFFLOADED_NAME).urls
    if (folder / LOG_NAME).is_file():
        read_log(folder)
    _earlier_config(folder)


def holds_same_run(config: Config) -> bool:
    """Return whether the run folder holds a run, of the same configuration.

    Keys that say where a run computes and how long, not what, may differ.

    Raises:
        ConfigError: the folder holds a run of another configuration.
    """
    folder = config.run.folder
    if not (folder / LOG_NAME).is_file():
        return False
    earlier = _earlier_config(folder)
    changed = [] if earlier is None else [text for text in changed_keys(earlier, config) if not _is_of_place(text)]
    if changed:
        raise ConfigError(
            f"{folder} holds a run of another configuration ({', '.join(changed)}): pass --resume to go on with it "
            "all the same, or choose another run.name"
        )
    return True


def _is_of_place(change: str) -> bool:
    section, key = change.partition(":")[0].split(".")
    return section == "parallel" or key in KEYS_OF_AN_ATTEMPT.get(section, ())


def _earlier_config(folder: Path) -> Config | None:
    """Return the configuration that the run had so far; None if it has none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        return load_config(path, accept_old_keys=True)
    except ConfigError as error:
        raise ConfigError(f"{error} (the settings that the run had so far: mend or remove {path})") from error


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the run folder {folder} cannot be used ({error}): mend it, or choose another run.dir")


def prepare_run_folder(
    config: Config, stack: ExitStack, *, resume: bool, accept_changed_code: bool = False, attribute_only: bool = False
) -> None:
    """Check the run folder, make it, lock it, and write the configuration and the record of the user's code there.

    Args:
        config: the resolved configuration.
        stack: releases the lock.
        resume: continue the run that the folder holds.
        accept_changed_code: do not compare the user's own code with what the run used before.
        attribute_only: the user's own code is neither compared nor recorded.

    Raises:
        ConfigError: see `check_run_folder`; or another process uses the folder, or it cannot be written.
    """
    check_run_folder(config, resume=resume, accept_changed_code=accept_changed_code or attribute_only)
    check_loggers(config.run.loggers)
    folder = config.run.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder, stack)
        if not resume:
            shutil.rmtree(rollouts_folder(config), ignore_errors=True)
        earlier = _earlier_config(folder) if resume else None
        changed = changed_keys(earlier, config) if earlier is not None else []
        if changed:
            print(f"resuming with other settings than the run had so far: {', '.join(changed)}", flush=True)
        (folder / CONFIG_NAME).write_text(config.dump(), encoding="utf-8")
        if not attribute_only:
            write_code(config)
    except OSError as error:
        raise _unusable(folder, error) from error


def _lock(folder: Path, stack: ExitStack) -> None:
    try:
        lock = try_lock(folder / LOCK_NAME)
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error}): see to it that no other process works there", flush=True)
        return
    if lock is None:
        raise ConfigError(f"{folder} is in use by another process: wait for it or end it, or choose another run.name")
    stack.callback(lock.release)
