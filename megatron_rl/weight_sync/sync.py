"""Weights from the trainer to the engines, over any transport, as one transaction per version."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_rl.engines.control import Traits
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import CheckpointError, EngineError, MegatronRLError, UserError
from megatron_rl.weight_sync.confirmation import ScoreProbe, has_expected_digests
from megatron_rl.weight_sync.expected_digests import ExpectedDigests
from megatron_rl.weight_sync.transaction import Transaction, Version
from megatron_rl.weight_sync.transports.transport import Transport, each
from megatron_rl.weights.hf_folder import HFFolder
from megatron_rl.weights.quantized import is_finite


@dataclass(frozen=True, slots=True)
class PushReport:
    """A committed version. nbytes: of its tensors. dropped: engine -> reason, for engines that could not resume."""

    version: int
    nbytes: int
    dropped: dict[str, str]


class WeightSync:
    """Transactional weight updates.

    pool: the engines on global rank 0, None on the other ranks. source: the folder the engines started from; it is
    version 0. mode: of the engines' pause, `rollout.update_mode`. group: the ranks that learn a push's outcome (default:
    the world when torch.distributed runs). probe: collective, scores a fixed text under the weights that are about to be
    pushed; asked for when an engine's digests cannot be computed.
    """

    def __init__(
        self,
        pool: EnginePool | None,
        source: HFFolder,
        transport: Transport,
        *,
        mode: str = "retract",
        group: dist.ProcessGroup | None = None,
        probe: Callable[[], ScoreProbe] | None = None,
    ) -> None:
        self._pool, self._transport, self._mode, self._group, self._probe = pool, transport, mode, group, probe
        self._committed = Version(0, source.path, None)
        self._traits: dict[str, Traits] = {}  # of the engines that confirmed the last push

    @property
    def version(self) -> int:
        """The version the engines serve (known on global rank 0)."""
        return self._committed.number

    def push(self, tensors: Iterable[tuple[str, Tensor | None]], version: int) -> PushReport:
        """Collective: send what `export_weights` or `WireTensors` yields, have every engine confirm it, commit.

        Every rank returns the same report or raises the same error: CheckpointError when the weights are not finite or
        cannot be written (over the disk transport no engine was touched then), EngineError naming engine and tensor when
        one did not confirm. Engines then serve the version before; those that could not be brought back are dropped, or
        kept from being routed to until a push succeeds.
        """
        stream = iter(tensors)
        outcome: list[PushReport | Exception] = [
            EngineError("no engine pool on global rank 0: give WeightSync one there")
        ]
        traits: dict[str, Traits] = {}
        unsure = False
        if self._pool is not None:
            try:
                self._check_version(version)
                traits, outcome = self._look(self._pool, version), []
                unsure = not all(has_expected_digests(found) for found in traits.values())
            except MegatronRLError as error:
                outcome = [error]
        probe = self._probe() if self._probe is not None and self._agreed(unsure) else None
        if self._pool is not None and not outcome:
            try:
                outcome = [self._push(self._pool, stream, version, traits, probe)]
            except Exception as error:  # noqa: BLE001  a rank boundary: the others wait in the export
                outcome = [error]
        for _ in stream:  # the export is collective: after a failure too, every rank runs it to its end
            pass
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], MegatronRLError):
            outcome[0].everywhere = True
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def readmit(self) -> tuple[str, ...]:
        """On global rank 0: let dropped engines that answer again take part in the next push; nothing is routed to them
        before. Returns their urls."""
        return tuple(self.engines.recover_lost())

    def close(self) -> None:
        """Give back what the transport holds. The engines keep serving from memory."""
        self._transport.close(self._pool)

    @property
    def engines(self) -> EnginePool:
        """The engines. Raises UserError on another rank than 0."""
        if self._pool is None:
            raise UserError("this call is for global rank 0, which has the engine pool")
        return self._pool

    def _agreed(self, flag: bool) -> bool:
        """Global rank 0's flag, on every rank."""
        box = [flag]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _check_version(self, version: int) -> None:
        if version <= self._committed.number:
            raise UserError(
                f"weight version {version} does not follow version {self._committed.number}: versions only grow"
            )

    def _look(self, pool: EnginePool, version: int) -> dict[str, Traits]:
        """What the engines are that live."""
        pool.drop_dead()
        urls = list(pool.live_urls)
        if not urls:
            raise EngineError(
                f"weight version {version} has no engine to go to: every engine was dropped or none was started"
            )
        traits, mute = each(urls, lambda url: self._traits.get(url) or pool.traits(url))
        self._traits = {}
        if mute:
            reasons = "; ".join(str(error) for error in mute.values())
            raise EngineError(f"weight version {version} is not served ({reasons}). No engine was touched")
        return traits

    def _push(
        self,
        pool: EnginePool,
        stream: Iterator[tuple[str, Tensor | None]],
        version: int,
        traits: Mapping[str, Traits],
        probe: ScoreProbe | None,
    ) -> PushReport:
        plain = self._transport.in_buckets and any(
            found.embedded or not has_expected_digests(found) for found in traits.values()
        )
        expected = ExpectedDigests(
            plain, {found.dtype for found in traits.values() if not found.embedded and has_expected_digests(found)}
        )
        sent = _Counted(stream)
        self._transport.prepare(iter(sent), version, expected)
        update = Transaction(
            pool, self._transport, expected, version, self._committed, traits=traits, mode=self._mode, probe=probe
        )
        dropped = update.run()
        self._committed = Version(version, self._transport.commit(), expected, update.confirmed)
        self._traits = {url: found for url, found in traits.items() if url not in dropped}
        return PushReport(version, sent.nbytes, dropped)


class _Counted:
    """The stream as rank 0 needs it: every tensor present and finite; its bytes counted."""

    def __init__(self, stream: Iterator[tuple[str, Tensor | None]]) -> None:
        self._stream = stream
        self.nbytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream:
            if tensor is None:
                raise UserError(
                    f"tensor '{name}' of a push is None on the rank with the engines: that must be global rank 0"
                )
            if not is_finite(tensor):
                raise CheckpointError(
                    f"tensor '{name}' holds values that are not finite: the engines keep the weights they have"
                )
            self.nbytes += tensor.nbytes
            yield name, tensor
