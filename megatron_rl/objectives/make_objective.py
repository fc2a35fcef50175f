"""make_objective: builds the objective of a configuration, built in or the user's own class."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from megatron_rl.errors import ConfigError, MegatronRLError, did_you_mean
from megatron_rl.objectives.asympo import ASymPO
from megatron_rl.objectives.cispo import CISPO
from megatron_rl.objectives.cppo import CPPO
from megatron_rl.objectives.dppo import DPPOKL, DPPOTV, DPPOTopK
from megatron_rl.objectives.drpo import DRPO
from megatron_rl.objectives.erpd import ErpdCE, ErpdDistill, ErpdMSE
from megatron_rl.objectives.grpo import DAPO, GRPO, PPO
from megatron_rl.objectives.gspo import GSPO
from megatron_rl.objectives.inputs import OPTIONAL
from megatron_rl.objectives.minirl import MiniRL
from megatron_rl.objectives.objective import Objective
from megatron_rl.objectives.opd import OPD
from megatron_rl.objectives.ratio import RatioObjective
from megatron_rl.objectives.sapo import SAPO
from megatron_rl.objectives.scaled_po import Naive, ScaledPO
from megatron_rl.objectives.simple_po import SimplePO
from megatron_rl.plugins import is_import_path, load_plugin, raised_place, source_place
from megatron_rl.types import COLUMNS

_RATIO = (CISPO, CPPO, DAPO, DPPOKL, DPPOTV, DPPOTopK, DRPO, GRPO, GSPO, MiniRL, OPD, PPO, SAPO, SimplePO)
_OTHERS = (ASymPO, ErpdCE, ErpdDistill, ErpdMSE, Naive, ScaledPO)

OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (*_RATIO, *_OTHERS)}


def make_objective(spec: Mapping[str, Any]) -> Objective:
    """Build the objective `spec["name"]` from the other keys of `spec`.

    Raises:
        ConfigError: an objective or key is unknown (the message gives the nearest valid name), or a value is illegal.
    """
    if not isinstance(spec, Mapping):
        raise ConfigError(f"an objective is {spec!r}; it must be a mapping such as {{name: drpo, delta: 0.15}}")
    options = dict(spec)
    name = options.pop("name", None)
    kind = objective_class(name)
    keys = [f.name for f in fields(kind)]
    for key in options:
        if key not in keys:
            raise ConfigError(f"objective {kind.name} has no key '{key}'; {did_you_mean(key, keys)}")
    return _own_objective(kind, options) if is_import_path(name) else kind(**options)


def objective_class(name: Any) -> type[Objective]:
    """Return the class of an objective: of a built-in name, or the user's own by an import path.

    Raises:
        ConfigError: there is none, or it cannot be an objective. The message has file:line.
    """
    if not isinstance(name, str) or not is_import_path(name):
        if not isinstance(name, str) or name not in OBJECTIVES:
            raise ConfigError(f"unknown objective {name!r}; {did_you_mean(name, OBJECTIVES)}")
        return OBJECTIVES[name]
    kind: Any = load_plugin(name, "objective.name")
    place = f"objective.name: {name.rpartition(':')[2]} ({source_place(kind)})"
    if not isinstance(kind, type) or not issubclass(kind, Objective):
        raise ConfigError(f"{place} is no subclass of megatron_rl.objectives.Objective")
    missing: list[str] = sorted(kind.__abstractmethods__)
    if missing:
        raise ConfigError(f"{place} has no method {', '.join(missing)}")
    plain = {name for name, hint in vars(kind).get("__annotations__", {}).items() if "ClassVar" not in str(hint)}
    if plain - {f.name for f in fields(kind)}:
        raise ConfigError(f"{place} has options and is no dataclass; write @dataclass(frozen=True, kw_only=True) on it")
    return kind


def _own_objective(kind: type[Objective], options: dict[str, Any]) -> Objective:
    """Build an objective of the user's own. Its options may be plain fields, which are checked by their types."""
    place = f"objective.name: {kind.__name__} ({source_place(kind)})"
    inherited = {f.name for f in fields(RatioObjective)}
    for option in fields(kind):
        if option.name not in options:
            if option.default is MISSING and option.default_factory is MISSING:
                raise ConfigError(f"{place}: objective.{option.name} is missing and has no default")
        elif "kind" not in option.metadata and option.name not in inherited:
            options[option.name] = _typed(kind, option.name, options[option.name])
    known = {*OPTIONAL, *(name for name, column in COLUMNS.items() if column.answer_key)}
    try:
        objective = kind(**options)
        unknown = set(objective.needs) - known
    except MegatronRLError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{place} raised {type(error).__name__}: {error} ({raised_place(error)})") from error
    if unknown:
        raise ConfigError(f"{place} needs '{min(unknown)}'; {did_you_mean(min(unknown), sorted(known))}")
    return objective


def _typed(kind: type[Objective], name: str, value: Any) -> Any:
    try:
        return TypeAdapter(get_type_hints(kind)[name]).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"objective {kind.name}: '{name}' is {value!r}: {error.errors()[0]['msg']}") from error
