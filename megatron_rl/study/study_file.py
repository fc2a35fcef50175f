"""The file of a study: which cells it has, how long each runs, and what is compared."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from megatron_rl.config.block import Block, check_names
from megatron_rl.config.load import explain_problems
from megatron_rl.config.read_yaml import KeySources, read_file
from megatron_rl.errors import ConfigError, shorten

Settings = dict[str, Any]
Axis = list[Any] | dict[str, Settings | None]


class BudgetConfig(Block):
    """How long a cell runs. A budget of tokens or seconds ends it with the step in which it is spent."""

    steps: int = Field(ge=1, description="number of steps of a cell, at most")
    tokens: float | None = Field(None, gt=0, le=1e18, description="trained and prompt tokens of a cell, at most")
    seconds: float | None = Field(None, gt=0, description="seconds inside steps of a cell, at most")


class VerdictConfig(Block):
    """What the report decides, fixed before the first run."""

    reference: str | None = Field(None, description="arm that the others are compared with; unset: no comparison")
    metric: Literal["sampled", "greedy"] = Field("sampled", description="held-out pass rate that is compared")
    margin: float | None = Field(
        None, gt=0, description="largest difference that counts as equal, in units of the reward; unset: no test of it"
    )
    alpha: float = Field(0.05, gt=0, lt=0.5, description="error rate of intervals and tests")
    k3_collapse: float | None = Field(None, gt=0, description="mismatch k3 above which a cell counts as collapsed")
    tried: int = Field(0, ge=0, description="configurations that were tried before this study, to choose its arms")


class Study(Block):
    """The keys of a study file."""

    name: str | None = Field(None, min_length=1, description="name of the study; unset: that of the file")
    folder: Path | None = Field(None, description="folder of the study; unset: runs/<name>")
    base: Path | dict[str, Any] = Field(description="configuration that all cells share: a file, or its sections")
    settings: Settings = Field(default_factory=dict, description="`section.key: value`, set in every cell")
    axes: dict[str, Axis] = Field(default_factory=dict, description="axis -> values; see docs/study.md")
    size: str | None = Field(None, description="axis that changes the size of the model")
    seeds: tuple[int, ...] = Field((0,), min_length=1, max_length=1000, description="seeds of every cell")
    budget: BudgetConfig
    only: tuple[dict[str, Any], ...] = Field((), description="cells to keep: those that match one of these")
    exclude: tuple[dict[str, Any], ...] = Field((), description="cells to leave out: those that match one of these")
    paired: bool = Field(True, description="cells of a seed share prompts, evaluation and warm start; refused if not")
    verdict: VerdictConfig = VerdictConfig()

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, value: str | None) -> str | None:
        if value is not None:
            check_names(value)
            if "/" in value or value in (".", ".."):
                raise ValueError(f"it is '{shorten(value)}'; it names one folder")
        return value

    @field_validator("seeds")
    @classmethod
    def _differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a seed is given twice")
        return value

    @model_validator(mode="after")
    def _names_an_axis(self) -> Self:
        if self.size is not None and self.size not in self.axes:
            raise ValueError(f"size: there is no axis '{shorten(self.size)}'; axes: {', '.join(self.axes) or 'none'}")
        return self

    @property
    def arm_axes(self) -> list[str]:
        """The axes whose values make the name of an arm: all but the size."""
        return [name for name in self.axes if name != self.size]


def load_study(path: Path) -> tuple[Study, dict[str, Any]]:
    """Read a study file. Return the study, with its name and folder, and the tree of its base configuration.

    A base file is relative to the folder of the study file.

    Raises:
        ConfigError: names file:line and key of the first problems.
    """
    if not path.is_file():
        raise ConfigError(f"no study file at {shorten(str(path))}")
    places: KeySources = {}
    tree = read_file(path, places)
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping; a study has at least the keys base and budget")
    try:
        study = Study(**tree)
    except ValidationError as error:
        raise ConfigError(explain_problems(error, places, Study)) from error
    name = study.name or path.stem
    study = study.model_copy(update={"name": name, "folder": (study.folder or Path("runs") / name).absolute()})
    if isinstance(study.base, dict):
        return study, study.base
    file = path.parent / study.base
    if not file.is_file():
        raise ConfigError(f"{places[('base',)]}: base: no configuration file at {file}")
    base = read_file(file, {})
    if not isinstance(base, dict):
        raise ConfigError(f"{file}: the top level must be a mapping of sections")
    return study.model_copy(update={"base": file.absolute()}), base
