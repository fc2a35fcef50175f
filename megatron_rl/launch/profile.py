"""Cluster profiles: what one cluster needs, in YAML. `profiles/` holds those of the package."""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_rl.config.block import Block
from megatron_rl.config.read_yaml import read_file, read_value
from megatron_rl.errors import ConfigError, did_you_mean, shorten

PROFILES = Path(__file__).parent / "profiles"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d\d){0,2}")
# Options of sbatch that the job file itself decides.
_DECIDED = ("array", "chdir", "dependency", "error", "export", "het-group", "job-name", "nodes", "ntasks", "output")


class ContainerProfile(Block):
    """How roles run in a container."""

    backend: Literal["none", "pyxis", "apptainer"] = Field("none", description="none: roles run in the environment")
    image: str = Field("", description="pyxis: image or .sqsh file; apptainer: .sif file")
    mounts: tuple[str, ...] = Field((), description="SRC:DST[:ro]; the run folder and the model are added")
    workdir: str = Field("", description="working folder inside; empty: the image's")
    home: bool = Field(False, description="mount the home folder")
    writable: bool = Field(False, description="the container's file system can be written")
    args: tuple[str, ...] = Field((), description="further options, passed unchanged")

    @model_validator(mode="after")
    def _has_image(self) -> Self:
        if self.backend != "none" and not self.image:
            raise ValueError(f"backend {self.backend} needs an image")
        return self


class RequeueProfile(Block):
    """After which ends a job is tried again, and how often."""

    max: int = Field(20, ge=0, le=1000, description="most further attempts of one submission")
    max_without_progress: int = Field(
        2, ge=1, le=100, description="attempts in a row without a new checkpoint after which to give up"
    )
    on: tuple[Literal["deadline", "preempted", "node_fail", "crash"], ...] = Field(
        ("deadline", "preempted", "node_fail", "crash"), description="ends after which to try again"
    )


class RolloutProfile(Block):
    """Mode het: options of the second group, on which the engines run. Unset: as for the trainer."""

    partition: str | None = Field(None, description="partition of the engines")
    constraint: str | None = Field(None, description="features that nodes of the engines must have")
    gpus_per_node: int | None = Field(None, ge=0, le=64, description="GPUs of a node of the engines")


class Profile(Block):
    """A cluster: options of sbatch, the environment of the roles, folders, ports, and rules of trying again."""

    partition: str | None = Field(None, description="partition")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    reservation: str | None = Field(None, description="reservation")
    constraint: str | None = Field(None, description="features that nodes must have")
    exclude: str | None = Field(None, description="nodes not to use, as a host list")
    nodelist: str | None = Field(None, description="nodes to use, as a host list")
    gpus_per_node: int = Field(8, ge=0, le=64, description="GPUs of a node; 0: a cluster without GPUs")
    gpu_request: str = Field(
        "gpus_per_node", description="how GPUs are requested: gpus_per_node, gres, gres:TYPE, none"
    )
    ranks_per_node: int | None = Field(None, ge=1, le=1024, description="ranks of a node; unset: one per GPU, else 1")
    engines_per_node: int | None = Field(
        None, ge=1, le=64, description="engines of a node; unset: as many as its GPUs hold"
    )
    cpus_per_task: int = Field(0, ge=0, le=4096, description="CPUs of a rank and of an engine; 0: not requested")
    mem: str | None = Field("0", description="memory of a node; 0: all of it")
    exclusive: bool = Field(True, description="no other job on the nodes")
    time: str = Field("24:00:00", description="time limit: [days-]hours[:minutes[:seconds]]")
    signal_margin_s: int = Field(600, ge=5, le=86400, description="seconds before the end at which a run stops")
    start_timeout_s: float = Field(600.0, gt=0, description="seconds until every engine must be healthy")
    python: str = Field("", description="Python with megatron-rl, absolute; empty: the one that submits")
    host_python: str = Field("/usr/bin/python3", description="Python of the nodes, 3.6 or later, outside of containers")
    setup: tuple[str, ...] = Field((), description="lines of bash that run first")
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    env: dict[str, str] = Field(default_factory=dict, description="variables of all roles")
    pass_env: tuple[str, ...] = Field((), description="variables that jobs take from the submitting shell")
    shared: tuple[Path, ...] = Field((), description="folders that all nodes share; empty: not checked")
    scratch: Path = Field(Path("/tmp"), description="folder of each node for temporary files")
    min_free_gb: float = Field(1.0, ge=0, description="free space that preflight requires in scratch and run folder")
    min_shm_gb: float = Field(1.0, ge=0, description="free space that preflight requires in /dev/shm")
    min_bandwidth_gb_s: float = Field(0.0, ge=0, description="preflight --bandwidth: fewest GB/s between two nodes")
    ports: tuple[int, int] = Field((20000, 32767), description="first and last port that jobs may use")
    preflight: Literal["off", "facts"] = Field("facts", description="what is checked on the nodes before a start")
    on_engine_loss: Literal["requeue", "continue"] = Field(
        "requeue", description="an engine ends while the trainer runs: try the job again, or train with the others"
    )
    min_engines: int = Field(
        1, ge=1, le=4096, description="with on_engine_loss: continue, the fewest that must be left"
    )
    engine_restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="with on_engine_loss: continue, how often one engine is started again in an attempt",
    )
    spare_nodes: int = Field(
        0, ge=0, le=4096, description="with on_engine_loss: continue, nodes that wait for the engines of lost ones"
    )
    rollout: RolloutProfile = RolloutProfile()
    container: ContainerProfile = ContainerProfile()
    requeue: RequeueProfile = RequeueProfile()
    array_limit: int = Field(8, ge=1, le=1000, description="tasks of an array that run at the same time")
    sbatch: dict[str, str | int | None] = Field(
        default_factory=dict, description="further options of sbatch; null: without a value"
    )

    @field_validator("gpu_request")
    @classmethod
    def _known_request(cls, value: str) -> str:
        kinds = ("gpus_per_node", "gres", "none")
        if value not in kinds and not re.fullmatch(r"gres:[\w.-]+", value):
            raise ValueError(f"it is '{shorten(value)}'; {did_you_mean(value, kinds)}, gres:TYPE")
        return value

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if not _TIME.fullmatch(value):
            raise ValueError(f"it is '{shorten(value)}'; write [days-]hours:minutes:seconds, for example 24:00:00")
        return value

    @field_validator("env", "pass_env")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"'{shorten(name)}' is no name of a variable")
        return value

    @field_validator("sbatch")
    @classmethod
    def _are_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, one in value.items():
            if not re.fullmatch(r"[a-z][a-z-]*", key) or (isinstance(one, str) and "\n" in one):
                raise ValueError(f"'{shorten(key)}' is no long option of sbatch, or its value has a line break")
            if key in _DECIDED:
                raise ValueError(f"'{key}' is decided by the launcher: remove it")
        return value

    @field_validator("python", "host_python")
    @classmethod
    def _absolute(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError(f"it is '{shorten(value)}'; a job has another working folder: give an absolute path")
        return value

    @field_validator("ports")
    @classmethod
    def _is_a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= value[0] < value[1] <= 65535:
            raise ValueError(f"they are {list(value)}; a range is [first, last] within 1024 and 65535")
        return value

    @model_validator(mode="after")
    def _one_line_each(self) -> Self:
        for name in ("partition", "account", "qos", "reservation", "constraint", "exclude", "nodelist", "mem"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[^\s#'\"\\]+", value):
                raise ValueError(f"{name}: it is '{shorten(value)}'; it must be one word")
        return self

    @model_validator(mode="after")
    def _has_cpus(self) -> Self:
        if not self.exclusive and not self.cpus_per_task and self.ranks > 1:
            raise ValueError(
                f"cpus_per_task: a node holds {self.ranks} ranks, and without exclusive it would get one CPU: set it"
            )
        return self

    @model_validator(mode="after")
    def _uses_spares(self) -> Self:
        if self.spare_nodes and self.on_engine_loss != "continue":
            raise ValueError("spare_nodes: they are for on_engine_loss: continue, and it is requeue: set it too")
        return self

    @property
    def ranks(self) -> int:
        """Ranks that a node of the trainer holds."""
        return self.ranks_per_node or max(1, self.gpus_per_node)

    def time_s(self) -> int:
        """Return the time limit in seconds."""
        days, _, rest = self.time.rpartition("-")
        parts = [int(part) for part in rest.split(":")]
        if days or len(parts) == 3:
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:  # Slurm reads one number as minutes and two as minutes:seconds
            hours, (minutes, seconds) = 0, (*parts, 0)[:2]
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def profile_names() -> list[str]:
    """Return the names of the package's profiles and of those in ~/.config/megatron-rl/profiles."""
    return sorted({path.stem for folder in (PROFILES, _own_folder()) for path in folder.glob("*.yaml")})


def _own_folder() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "megatron-rl" / "profiles"


def find_profile(name: str) -> Path:
    """Return the file of a profile: a path, a name in ~/.config/megatron-rl/profiles, or a name of the package.

    Raises:
        ConfigError: there is no such profile.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"--profile: no file at {shorten(name)}")
        return Path(name)
    for folder in (_own_folder(), PROFILES):
        path = folder / f"{name}.yaml"
        if path.is_file():
            return path
    raise ConfigError(f"--profile: there is no profile '{shorten(name)}'; {did_you_mean(name, profile_names())}")


def load_profile(name: str, settings: list[str] | None = None) -> Profile:
    """Read a profile and apply `key=value` settings to it.

    Args:
        name: a path or a name.
        settings: each `key=value` or `section.key=value`.

    Raises:
        ConfigError: naming file:line and key of the first problem.
    """
    path = find_profile(name)
    places: dict[tuple[str, ...], str] = {}
    tree = read_file(path, places) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of keys")
    for setting in settings or []:
        _apply_setting(tree, setting, places)
    try:
        return Profile(**tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(item, path, places) for item in error.errors()[:10])) from error
    except TypeError as error:  # a key that is no text
        raise ConfigError(f"{path}: {error}") from error


def _apply_setting(tree: dict[str, Any], setting: str, places: dict[tuple[str, ...], str]) -> None:
    place = f"--set '{shorten(setting)}'"
    key, separator, value = setting.partition("=")
    parts = tuple(key.split("."))
    if not separator or not all(parts):
        raise ConfigError(f"{place} must read key=value")
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{place}: '{part}' is not a section")
    tree[parts[-1]] = read_value(value, place)
    places[parts] = place


def _describe(item: Any, path: Path, places: dict[tuple[str, ...], str]) -> str:
    where = tuple(str(part) for part in item["loc"])
    place = next((places[where[:n]] for n in range(len(where), 0, -1) if where[:n] in places), str(path))
    key = shorten(".".join(where))
    if item["type"] == "extra_forbidden":
        block: Any = Profile
        for part in where[:-1]:
            block = block.model_fields[part].annotation
        return f"{place}: unknown key '{key}'; {did_you_mean(where[-1], block.model_fields)}"
    if item["type"] == "value_error":
        return f"{place}: {key + ': ' if key else ''}{item['ctx']['error']}"
    return f"{place}: '{key}' is {shorten(repr(item['input']))}: {item['msg']}"


def dump_profile(profile: Profile) -> str:
    """Return a profile with all its keys as YAML."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)
