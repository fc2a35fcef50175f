"""plugins.json of a run folder: the SHA-256 of the user's own code that the run uses, so that a change is noticed."""

import json

from megatron_rl.config import Config
from megatron_rl.config.code_paths import code_digests, code_paths
from megatron_rl.errors import ConfigError
from megatron_rl.files import parse_json, replace_file

CODE_FILE = "plugins.json"


def check_code(config: Config) -> None:
    """Raise ConfigError if the user's own code is not what the run used before. A run without a record passes."""
    record = config.run.folder / CODE_FILE
    if not record.is_file():
        return
    try:
        content = parse_json(record.read_bytes())
        before = {key: entry["sha256"] for key, entry in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{record} is no record of code ({problem}): remove it, or pass --accept-changed-code"
        ) from error
    for key, digest in code_digests(config).items():
        old = before.get(key, digest)
        if old != digest:
            source = code_paths(config)[key].rpartition(":")[0]
            raise ConfigError(
                f"{key}: {source} has changed since the run used it: its SHA-256 is {digest}, and {record} has {old}; "
                "restore the file, or pass --accept-changed-code to go on with the new one"
            )


def write_code(config: Config) -> None:
    """Write the record of a run. A run without code of the user's own has none. For rank 0."""
    paths, record = code_paths(config), config.run.folder / CODE_FILE
    if not paths:
        record.unlink(missing_ok=True)
        return
    content = {key: {"path": paths[key], "sha256": digest} for key, digest in code_digests(config).items()}
    replace_file(record, json.dumps(content, indent=2).encode() + b"\n")
