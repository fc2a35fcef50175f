"""The data that the training loop passes around: a prompt, a sampled response, and the columns of one batch.

`COLUMNS` is the one place where a column is declared. Selecting, packing, saving, loading, checking and handing columns
to objectives loop over it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from megatron_rl.errors import UserError

# Token ids, as a task or a tokenizer gives them or as an array.
TokenIds = tuple[int, ...] | list[int] | np.ndarray


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem of a task.

    Attributes:
        id: the task's own name of the problem.
        text: the prompt text; the content of the last message if the prompt is a chat.
        tokens: the token ids of the prompt.
        answer: what the verifier compares the response with; "" if there is nothing to compare with.
        messages: the chat messages, each with `role` and `content`; empty if the prompt is plain text.
        metadata: all columns of the data row but that of the prompt; empty without a data row.
    """

    id: str
    text: str
    tokens: tuple[int, ...]
    answer: str
    messages: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Column:
    """One column of a batch.

    Per-token columns are in *token* order: entry t describes token t itself. They may have further dimensions.

    Attributes:
        name: name of the column.
        dtype: numpy's dtype.
        doc: what an entry is.
        per_token: one entry per token; False: one per trajectory.
        sampled: a trajectory carries the column for its response tokens.
        fill: value on prompt tokens and on tokens that are not trained on.
        packed: where the entry of token t goes in a micro-batch: to the position that predicts the token ("label"), to
            the position of the token itself ("input"), or nowhere.
        packed_dtype: dtype in a micro-batch; "" for the same one.
        finite: an entry of a trained token must be finite.
        required: every batch has the column.
        answer_key: name of the list in the engine's `meta_info` that has one number per output token; "" if the column
            does not come from such a list.
    """

    name: str
    dtype: str
    doc: str
    per_token: bool = True
    sampled: bool = False
    fill: float = 0
    packed: Literal["label", "input", ""] = "label"
    packed_dtype: str = ""
    finite: bool = False
    required: bool = False
    answer_key: str = ""


def _per_trajectory(name: str, dtype: str, doc: str, **more: Any) -> Column:
    return Column(name, dtype, doc, per_token=False, **{"packed": "", "required": True, **more})


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        _per_trajectory("ids", "int64", "id of the trajectory"),
        _per_trajectory("groups", "int64", "group of the trajectory"),
        _per_trajectory("prompt_ids", "str", "the task's own name of the prompt", required=False),
        _per_trajectory("rewards", "float32", "reward", packed="label", finite=True),
        _per_trajectory("advantages", "float32", "advantage of the whole response", packed="label", finite=True),
        Column("tokens", "int32", "token id", sampled=True, packed="", required=True),
        Column("mask", "float32", "1 on trained response tokens, else 0", sampled=True, required=True),
        Column("versions", "int32", "weight version that sampled the token", sampled=True, fill=-1, packed=""),
        Column("logmu", "float32", "log-probability under the behavior policy", sampled=True, finite=True),
        Column("logold", "float32", "log-probability under the trainer's policy before the step", finite=True),
        Column("logref", "float32", "log-probability under the reference policy", finite=True),
        Column(
            "topk_ids",
            "int32",
            "[K] most likely tokens of the behavior policy, most likely first; the sampled one may be absent",
            sampled=True,
            packed_dtype="int64",
        ),
        Column("topk_logmu", "float32", "[K] log-probabilities of topk_ids", sampled=True, finite=True),
        Column("token_advantages", "float32", "packed in place of `advantages`", finite=True),
        Column("staleness", "float32", "versions between the one that sampled the token and the one of the step"),
        Column(
            "routing",
            "int32",
            "[L, K] experts that the engine chose with this token as input, -1 where it chose none",
            fill=-1,
            packed="input",
        ),
    )
}


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One sampled response, exactly as the engine produced it (token in, token out: never re-tokenized).

    Attributes:
        id: unique in the run.
        group: shared by the trajectories of one prompt.
        prompt_id: the task's own name of the prompt.
        prompt_tokens: [P] int32.
        columns: the sampled columns of the R response tokens, by name: always `tokens` [R] int32 and `mask` [R] int8,
            which is 0 for tool output and void turns.
        finish_reason: "stop", "length" or "abort".
        reward: None until the task has verified the response.
        routing: [P + R - 1, L, K] int32, the experts that the engine chose for each input token of prompt and response
            except the last one, in each of L mixture-of-experts layers; None if they are not replayed.
    """

    id: int
    group: int
    prompt_id: str
    prompt_tokens: np.ndarray
    columns: Mapping[str, np.ndarray]
    finish_reason: str
    reward: float | None = None
    routing: np.ndarray | None = field(default=None)

    @property
    def response_tokens(self) -> np.ndarray:
        """Token ids of the response, [R] int32."""
        return self.columns["tokens"]

    @property
    def logmu(self) -> np.ndarray | None:
        """Behavior log-probabilities of the response tokens, [R] float32; None if the objective does not need them."""
        return self.columns.get("logmu")

    @property
    def last_turn(self) -> np.ndarray:
        """The response tokens after the last masked one.

        The answer is searched for in these tokens only, never in tool output.
        """
        masked = np.flatnonzero(self.columns["mask"] == 0)
        return self.response_tokens[masked[-1] + 1 :] if len(masked) else self.response_tokens

    @property
    def sampled_by(self) -> tuple[int, ...]:
        """The weight versions that sampled response tokens, ascending."""
        return tuple(sorted(version for version in set(self.columns["versions"].tolist()) if version >= 0))

    def with_reward(self, reward: float) -> Self:
        return replace(self, reward=reward)


class Batch:
    """Trajectories as columns. A column is an attribute, None if the batch does not have it.

    The batch of a step is on rank 0. Other ranks hold a batch of the same columns without trajectories, so every rank
    runs the same code; see `policy.shares`.

    B trajectories, N = sum of their lengths (prompt and response). Per-token columns are flat: [N, ...].

    Args:
        cu_seqlens: [B + 1] int64; trajectory i is tokens[cu[i]:cu[i + 1]].
        columns: arrays by the names of `COLUMNS`.
    """

    cu_seqlens: np.ndarray

    def __init__(self, *, cu_seqlens: np.ndarray, **columns: np.ndarray | None) -> None:
        unknown = columns.keys() - COLUMNS.keys()
        missing = [name for name, column in COLUMNS.items() if column.required and columns.get(name) is None]
        if unknown or missing:
            raise TypeError(f"a batch has no columns {sorted(unknown)} and needs {missing}")
        self.__dict__.update({"cu_seqlens": cu_seqlens}, **{name: columns.get(name) for name in COLUMNS})

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a batch does not change: use with_columns({name}=...)")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per trajectory, [B] int64."""
        return np.diff(self.cu_seqlens)

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns that the batch has, by name."""
        return {name: value for name in COLUMNS if (value := self.__dict__.get(name)) is not None}

    def with_columns(self, **columns: np.ndarray | None) -> "Batch":
        """Return the batch with these columns replaced or added; None removes a column."""
        return Batch(cu_seqlens=self.cu_seqlens, **{**self.columns, **columns})

    def without_rows(self) -> "Batch":
        """Return a batch of the same columns that has no trajectory."""
        return self.select(np.zeros(0, dtype=np.int64))

    def check_finite(self) -> None:
        """Check that every number of a trained token is finite.

        Raises:
            UserError: a value is not finite; the message names the column and the trajectories.
        """
        trained = self.mask > 0
        for name, values in self.columns.items():
            if not COLUMNS[name].finite:
                continue
            column = values if COLUMNS[name].per_token else np.repeat(values, self.lengths)
            bad = trained & ~np.isfinite(column.reshape(len(trained), -1)).all(1)
            if bad.any():
                rows = np.searchsorted(self.cu_seqlens, np.flatnonzero(bad), side="right") - 1
                raise UserError(
                    f"{name} is not finite in trajectories {np.unique(self.ids[rows])[:20].tolist()}: "
                    "the update is refused"
                )

    def select(self, rows: np.ndarray) -> "Batch":
        """Return the batch of the trajectories with row indices `rows`, in that order."""
        lengths = self.lengths[rows]
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.arange(cu_seqlens[-1]) + np.repeat(self.cu_seqlens[rows] - cu_seqlens[:-1], lengths)
        return Batch(
            cu_seqlens=cu_seqlens,
            **{name: values[flat if COLUMNS[name].per_token else rows] for name, values in self.columns.items()},
        )
