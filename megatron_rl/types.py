"""The data that the training loop passes around: a prompt, a sampled response, and the columns of one batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np

from megatron_rl.errors import UserError


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


class VersionSpan(NamedTuple):
    """Response tokens [start, end), sampled under weight version `version`."""

    version: int
    start: int
    end: int


class TopK(NamedTuple):
    """The K most likely tokens of the behavior policy at each of R response positions, most likely first.

    The sampled token need not be among them.

    Attributes:
        ids: token ids, [R, K] int32.
        logmu: their log-probabilities, [R, K] float32, finite.
    """

    ids: np.ndarray
    logmu: np.ndarray


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled response, exactly as the engine produced it (token in, token out: never re-tokenized).

    Attributes:
        id: unique in the run.
        group: shared by the trajectories of one prompt.
        prompt_id: the task's own name of the prompt.
        logmu: behavior log-probabilities of the response tokens; None if the objective does not need them.
        finish_reason: "stop", "length" or "abort".
        versions: the weight versions that sampled the response tokens.
        reward: None until the task has verified the response.
        topk: None if the objective does not need it; not compared.
        response_mask: 1 for tokens that the model wrote and that are trained on, 0 for tool output (whose logmu is 0)
            and for void turns; None means all 1.
        routing: [T - 1, L, K] int32, the experts that the engine chose for each input token of prompt and response
            except the last one, in each of L mixture-of-experts layers; not compared.
    """

    id: int
    group: int
    prompt_id: str
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    logmu: tuple[float, ...] | None
    finish_reason: str
    versions: tuple[VersionSpan, ...] = ()
    reward: float | None = None
    topk: TopK | None = field(default=None, compare=False)
    response_mask: tuple[int, ...] | None = None
    routing: np.ndarray | None = field(default=None, compare=False)

    @property
    def last_turn(self) -> tuple[int, ...]:
        """The response tokens after the last masked one.

        The answer is searched for in these tokens only, never in tool output.
        """
        if self.response_mask is None:
            return self.response_tokens
        written = len(self.response_mask)
        while written and self.response_mask[written - 1]:
            written -= 1
        return self.response_tokens[written:]

    def with_reward(self, reward: float) -> Self:
        return replace(self, reward=reward)


@dataclass(frozen=True, slots=True)
class Batch:
    """Trajectories as columns; identical on every rank.

    B trajectories, N = sum of their lengths (prompt and response). Per-token columns are flat and in *token* order:
    entry t describes token t itself. Packing later shifts the entries to the position that predicts the token.

    Attributes:
        ids: trajectory ids, [B] int64.
        groups: group of each trajectory, [B] int64.
        tokens: [N] int32.
        cu_seqlens: [B + 1] int64; trajectory i is tokens[cu[i]:cu[i + 1]].
        mask: [N] float32, 1 on trained response tokens.
        rewards: [B] float32.
        advantages: [B] float32.
        logmu: [N] float32, 0 where mask is 0; or None.
        logold: same layout as logmu.
        logref: same layout as logmu.
        prompt_ids: the task's own names of the prompts.
        topk_ids: [N, K] int32, the behavior policy's K most likely tokens at the position of each token, 0 where mask
            is 0; or None.
        topk_logmu: [N, K] float32, their log-probabilities, 0 where mask is 0; or None.
        token_advantages: [N] float32, used in the loss in place of `advantages`; 0 where mask is 0.
        versions: [N] int32, weight version that sampled the token, -1 where mask is 0; or None.
        staleness: [N] float32, versions between the one that sampled the token and the one the step trains from, 0
            where mask is 0; or None.
        routing: [N, L, K] int32, experts that the engine chose with this token as input, -1 where it chose none.
    """

    ids: np.ndarray
    groups: np.ndarray
    tokens: np.ndarray
    cu_seqlens: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    logmu: np.ndarray | None = None
    logold: np.ndarray | None = None
    logref: np.ndarray | None = None
    prompt_ids: tuple[str, ...] = field(default=())
    topk_ids: np.ndarray | None = None
    topk_logmu: np.ndarray | None = None
    token_advantages: np.ndarray | None = None
    versions: np.ndarray | None = None
    staleness: np.ndarray | None = None
    routing: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per trajectory, [B] int64."""
        return np.diff(self.cu_seqlens)

    def check_finite(self) -> None:
        """Check that every number of a trained token is finite.

        Raises:
            UserError: a value is not finite; the message names the column and the trajectories.
        """
        trained = self.mask > 0
        per_token = {
            name: column
            for name in ("logmu", "logold", "logref", "token_advantages", "topk_logmu")
            if (column := getattr(self, name)) is not None
        }
        spread = {name: np.repeat(getattr(self, name), self.lengths) for name in ("advantages", "rewards")}
        for name, column in {**per_token, **spread}.items():
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
        flat = np.concatenate([np.arange(self.cu_seqlens[r], self.cu_seqlens[r + 1]) for r in rows])

        def per_token(column: np.ndarray | None) -> np.ndarray | None:
            return None if column is None else column[flat]

        return Batch(
            ids=self.ids[rows],
            groups=self.groups[rows],
            tokens=self.tokens[flat],
            cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]),
            mask=self.mask[flat],
            rewards=self.rewards[rows],
            advantages=self.advantages[rows],
            logmu=per_token(self.logmu),
            logold=per_token(self.logold),
            logref=per_token(self.logref),
            prompt_ids=tuple(self.prompt_ids[r] for r in rows) if self.prompt_ids else (),
            topk_ids=per_token(self.topk_ids),
            topk_logmu=per_token(self.topk_logmu),
            token_advantages=per_token(self.token_advantages),
            versions=per_token(self.versions),
            staleness=per_token(self.staleness),
            routing=per_token(self.routing),
        )
