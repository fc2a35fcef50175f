"""The parts of a `torch_dist` checkpoint: shard files as torch's writer writes them, and their common index.

The keys, shapes and objects are those that megatron-core's own checkpoints of one rank have.
"""

import argparse
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rl.convert.hf_parts import as_bytes, grouped
from megatron_rl.convert.parts import Part, PartReport
from megatron_rl.convert.sources import WeightSource
from megatron_rl.errors import CheckpointError
from megatron_rl.files import create_large_file
from megatron_rl.precision.finite import is_finite
from megatron_rl.weights.dist_index import METADATA_JSON
from megatron_rl.weights.families import ModelShape
from megatron_rl.weights.megatron_keys import extra_state_key, megatron_place
from megatron_rl.weights.name_table import Entry


@dataclass(frozen=True)
class DistFile:
    """One shard file.

    Attributes:
        number: its number, which is part of its name.
        entries: the parameters in it.
    """

    number: int
    entries: tuple[Entry, ...]

    @property
    def file(self) -> str:
        return f"__{self.number}_0.distcp"


def plan_files(units: Iterable[tuple[Entry, ...]], sizes: Callable[[Entry], int], limit: int) -> list[DistFile]:
    """Distribute parameters over files of at most `limit` bytes, or of one unit that is larger.

    Args:
        units: the parameters, in order; those of one unit stay together.
        sizes: returns the bytes of a parameter.
        limit: largest size of a file, in bytes.
    """
    return [DistFile(number, tuple(group)) for number, group in enumerate(grouped(units, sizes, limit))]


def file_part(file: DistFile, source: WeightSource, dtype: torch.dtype | None) -> Part:
    """Return the part that writes a shard file.

    Args:
        file: the file.
        source: the weights.
        dtype: dtype of the written parameters; None: as they are stored.
    """

    def write(path: Path, add: Callable[[int], None]) -> PartReport:
        planner = _Planner(file, source, dtype, add)
        plan = replace(planner.create_local_plan(), storage_data=_StoragePrefix(f"__{file.number}_"))
        # torch chooses the name of the file. A folder of its own keeps an unfinished one apart.
        own = path.with_name(f"{path.name}.d")
        own.mkdir(exist_ok=True)
        writer = FileSystemWriter(str(own), single_file_per_rank=True, sync_files=False, thread_count=1)
        writer.fs = _LargeFiles()
        # Readers do not check the CRC-32 of records, and the manifest has a SHA-256: computing it took an eighth.
        had = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            results = writer.write_data(plan, planner).value()
        finally:
            torch.serialization.set_crc32_options(had)
        (own / file.file).replace(path)
        own.rmdir()
        places = [
            [result.index.fqn, list(result.index.offset or ()), result.size_in_bytes, *_place(result)]
            for result in results
        ]
        return {"tensors": planner.records, "places": places}

    names = tuple(dict.fromkeys(name for entry in file.entries for name in entry.rule.hf))
    return Part(file.file, sum(source.nbytes(entry) for entry in file.entries), names, write)


class _LargeFiles(FileSystem):
    """torch's access to files, whose streams write large contents fast."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with create_large_file(Path(path)) if mode == "wb" else super().create_stream(path, mode) as stream:
            yield stream


def _place(result: WriteResult) -> tuple[int, int]:
    return result.storage_data.offset, result.storage_data.length


def write_index(
    folder: Path,
    files: Sequence[DistFile],
    source: WeightSource,
    dtype: torch.dtype | None,
    records: Iterable[PartReport],
) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json` of a checkpoint whose shard files are complete.

    Args:
        folder: the checkpoint.
        files: the shard files.
        source: the weights.
        dtype: dtype of the written parameters; None: as they are stored.
        records: what `file_part` recorded of each file.
    """
    plans = [_Planner(file, source, dtype, lambda _: None).create_local_plan() for file in files]
    _, metadata = create_default_global_save_plan(plans)
    results = [
        [
            WriteResult(
                index=MetadataIndex(key, torch.Size(offset)) if offset else MetadataIndex(key),
                size_in_bytes=size,
                storage_data=_StorageInfo(record["file"], at, length),
            )
            for key, offset, size, at, length in record["places"]
        ]
        for record in records
    ]
    _restore_indices(metadata, results)
    FileSystemWriter(str(folder)).finish(metadata, results)
    torch.save(common_state(source.shape), folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(METADATA_JSON), encoding="utf-8")


def _restore_indices(metadata: Metadata, results: list[list[WriteResult]]) -> None:
    """Give the results the numbers of their chunks, which the global plan hands out and readers look up by."""
    numbers = {
        (key, tuple(chunk.offsets)): number
        for key, entry in metadata.state_dict_metadata.items()
        for number, chunk in enumerate(getattr(entry, "chunks", ()))
    }
    for written in results:
        for position, result in enumerate(written):
            index = result.index
            number = numbers.get((index.fqn, tuple(index.offset or ())))
            if index.offset is not None and number is not None:
                written[position] = replace(result, index=replace(index, index=number))


def common_state(shape: ModelShape) -> dict[str, Any]:
    """Return the content of `common.pt`: the arguments that Megatron-LM documents for a model of this shape.

    Tools read sizes from them. They are written from the format's description; no Megatron-LM has read them here.
    """
    experts = shape.experts
    args = argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=shape.num_kv_heads != shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        padded_vocab_size=shape.vocab_size,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        rotary_percent=shape.rope.dim / shape.head_dim,
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        num_experts=None if experts is None else experts.count,
        moe_router_topk=None if experts is None else experts.per_token,
        moe_ffn_hidden_size=None if experts is None else experts.ffn_hidden_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
    )
    return {"args": args, "iteration": 0, "checkpoint_version": 3.0}


class _Planner(SavePlanner):
    """Plans one shard file, and reads each parameter when torch's writer asks for it."""

    def __init__(
        self, file: DistFile, source: WeightSource, dtype: torch.dtype | None, add: Callable[[int], None]
    ) -> None:
        self._file, self._source, self._dtype, self._add = file, source, dtype, add
        self._held: dict[MetadataIndex, tuple[Entry, tuple[int, ...]]] = {}
        self._hashes: dict[str, Any] = {}
        self.records: dict[str, PartReport] = {}

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        return None

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("`write_index` makes the global plan, from the files of all processes")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def create_local_plan(self) -> SavePlan:
        items = []
        for entry in self._file.entries:
            place = megatron_place(entry, self._source.shape)
            local = entry.rule.layout.local_shape(1)
            offset = torch.Size((*place.index, *(0 for _ in local)))
            chunk = (1,) * len(place.index) + local
            index = MetadataIndex(place.key, offset)
            self._held[index] = entry, chunk
            stored = self._source.tensors[entry.rule.hf[0]].dtype
            dtype = stored if self._dtype is None or entry.rule.buffer else self._dtype
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offset, torch.Size(chunk)),
                properties=TensorProperties(dtype=dtype),
                size=torch.Size((*place.counts, *local)),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
            state = extra_state_key(entry, place)
            if state is not None:
                items.append(WriteItem(index=MetadataIndex(state), type=WriteItemType.BYTE_IO))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)
            empty.seek(0)
            return empty
        entry, chunk = self._held[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensors = self._source.read(entry)
        for name, tensor in zip(entry.rule.hf, tensors, strict=True):
            self._record(name, entry, tensor)
        parts = [lambda start, stop, dim=0, t=tensor: t.narrow(dim, start, stop - start) for tensor in tensors]
        parameter = entry.rule.layout.read(parts, 0, 1).reshape(chunk)
        assert write_item.tensor_data is not None
        return parameter.to(write_item.tensor_data.properties.dtype)

    def _record(self, name: str, entry: Entry, tensor: Tensor) -> None:
        if not is_finite(tensor):
            raise CheckpointError(f"tensor '{name}' of {self._source.path} has values that are NaN or infinite")
        content = as_bytes(tensor)
        self._add(len(content))
        # The parts of a stacked tensor come in the order of its experts, as torch's writer asks for them.
        self._hashes.setdefault(name, hashlib.sha256()).update(content)
        self.records[name] = {
            "shape": list(self._source.tensors[name].shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "sha256": self._hashes[name].hexdigest(),
            "from": self._source.origin(entry),
        }
        if self._dtype is not None and self._dtype != tensor.dtype and not entry.rule.buffer:
            self.records[name]["cast_to"] = str(self._dtype).removeprefix("torch.")
