"""Weight sync: sends weights from the trainer to the engines over any transport, one transaction per version."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_rl.engines.control import Traits
from megatron_rl.engines.pool import EnginePool
from megatron_rl.errors import CheckpointError, EngineError, MegatronRLError, UserError
from megatron_rl.precision.finite import is_finite
from megatron_rl.weight_sync.confirmation import ScoreProbe, has_expected_digests
from megatron_rl.weight_sync.expected_digests import DigestFunction, ExpectedDigests
from megatron_rl.weight_sync.transaction import Transaction, Version
from megatron_rl.weight_sync.transports.transport import Transport, each
from megatron_rl.weights.digest import device_digests, tensor_digests
from megatron_rl.weights.hf_folder import ModelFiles


@dataclass(frozen=True, slots=True)
class PushReport:
    """The report of a committed version.

    Attributes:
        version: the version number.
        nbytes: bytes of its tensors.
        dropped: engine -> reason, for engines that are lost because they could not resume.
    """

    version: int
    nbytes: int
    dropped: dict[str, str]


class WeightSync:
    """Transactional weight updates."""

    def __init__(
        self,
        pool: EnginePool | None,
        source: ModelFiles,
        transport: Transport,
        *,
        mode: str = "retract",
        group: dist.ProcessGroup | None = None,
        probe: Callable[[], ScoreProbe] | None = None,
    ) -> None:
        """Start at version 0.

        Args:
            pool: the engines on global rank 0, None on the other ranks.
            source: the folder that the engines started from; it is version 0.
            transport: sends the weights.
            mode: mode of the engines' pause, `rollout.update_mode`.
            group: the ranks that receive the outcome of a push. None: all ranks, if torch.distributed is initialized.
            probe: scores a fixed text under the weights of the next push. Collective. It is called if the digests of an
                engine cannot be computed.
        """
        self._pool, self._transport, self._mode, self._group, self._probe = pool, transport, mode, group, probe
        self._committed = Version(0, source.path, None)
        self._traits: dict[str, Traits] = {}  # traits of the engines that confirmed the last push

    @property
    def version(self) -> int:
        """The version that the engines serve; valid on global rank 0."""
        return self._committed.number

    def push(self, tensors: Iterable[tuple[str, Tensor | None]], version: int) -> PushReport:
        """Send the weights to every engine, let every engine confirm them, and commit the version. Collective.

        Every rank returns the same report or raises the same error. After an error the engines serve the version
        before; an engine for which this is impossible is lost, or quarantined until a push succeeds.

        Args:
            tensors: names and tensors from `export_weights` or `WireTensors`.
            version: number of the new version, greater than the one before.

        Raises:
            CheckpointError: if the weights are not finite or cannot be written. With the disk transport no engine was
                changed.
            EngineError: naming engine and tensor, if an engine did not confirm.
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
                traits, outcome = self._read_traits(self._pool, version), []
                unsure = not all(has_expected_digests(found) for found in traits.values())
            except MegatronRLError as error:
                outcome = [error]
        probe = self._probe() if self._probe is not None and self._agreed(unsure) else None
        if self._pool is not None and not outcome:
            try:
                outcome = [self._push(self._pool, stream, version, traits, probe)]
            except Exception as error:  # noqa: BLE001  a rank boundary: the other ranks wait in the export
                outcome = [error]
        for _ in stream:  # the export is collective: every rank must run it to its end, also after a failure
            pass
        if dist.is_initialized():
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        if isinstance(outcome[0], MegatronRLError):
            outcome[0].everywhere = True
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        """Release the resources of the transport. The engines keep serving from memory."""
        self._transport.close(self._pool)

    def forget(self, urls: Iterable[str]) -> None:
        """Ask these engines for their traits again: another process may be there now."""
        for url in urls:
            self._traits.pop(url, None)

    @property
    def engines(self) -> EnginePool:
        """The engine pool. Raises UserError on ranks other than 0."""
        if self._pool is None:
            raise UserError("this call is for global rank 0, which has the engine pool")
        return self._pool

    def _agreed(self, flag: bool) -> bool:
        """Return the flag of global rank 0, on every rank."""
        box = [flag]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _check_version(self, version: int) -> None:
        if version <= self._committed.number:
            raise UserError(
                f"weight version {version} does not follow version {self._committed.number}: versions only grow"
            )

    def _read_traits(self, pool: EnginePool, version: int) -> dict[str, Traits]:
        """Return the traits of every live engine."""
        pool.find_lost()
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
        plain = plain_digests(traits.values()) if self._transport.in_buckets else None
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


def plain_digests(traits: Iterable[Traits]) -> DigestFunction | None:
    """Return what computes the plain digests of a version that is sent in buckets; None if no engine needs them.

    An embedded engine reports digests of the host. If no digest of an engine can be computed, versions are compared
    with each other alone. Then no weight needs to leave the trainer's device.
    """
    found = list(traits)
    if any(one.embedded for one in found):
        return tensor_digests
    return None if all(map(has_expected_digests, found)) else device_digests


class _Counted:
    """The stream on rank 0. It checks that every tensor is present and finite, and counts the bytes."""

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
