"""Tensors to safetensors files and back, through torch.distributed.checkpoint; nothing is pickled into a file."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from distmuon.checkpoint.manifest import SUFFIX, Chunk, Manifest, StoredTensor
from distmuon.comm import Group
from distmuon.config import plain
from distmuon.errors import CheckpointError


class Part(NamedTuple):
    """Rows of a tensor that this rank writes."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor


class Request(NamedTuple):
    """A rectangle of a stored tensor that this rank wants, and where to put it."""

    key: str
    offsets: tuple[int, ...]
    into: Tensor


def write_tensors(directory: Path, parts: Mapping[str, Part], group: Group) -> dict[str, StoredTensor]:
    """Write this rank's parts to one file, or to none if there are none; every rank of the group calls it.

    Args:
        directory: exists.
        parts: on the CPU, by the names they are stored under.
        group: the ranks that write into the directory.

    Returns:
        The parts as the manifest describes them.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _quiet():
        save(
            dict(parts),
            storage_writer=writer,
            planner=_PartsPlanner(),
            process_group=group.process_group,
            no_dist=group.size == 1,
        )
    file = "".join(path.name for path in own_files(directory, group.rank))
    return {
        key: StoredTensor(
            shape=part.shape,
            dtype=plain(part.values.dtype),
            chunks=(Chunk(file=file, offsets=part.offsets, sizes=tuple(part.values.shape)),),
        )
        for key, part in parts.items()
    }


def own_files(directory: Path, rank: int) -> list[Path]:
    """The files that a rank wrote.

    Args:
        directory: of the checkpoint.
        rank: within the group that wrote.

    Returns:
        At most one path.
    """
    return sorted(directory.glob(f"shard-{rank + 1:05d}-*{SUFFIX}"))


def read_tensors(directory: Path, manifest: Manifest, requests: Sequence[Request]) -> None:
    """Read rectangles of stored tensors, whatever the chunks they were written in; without communication.

    Args:
        directory: of a checkpoint whose files were checked.
        manifest: of that checkpoint.
        requests: every one within the shape that the manifest gives.
    """
    if requests:
        reader = _ManifestReader(directory, manifest)
        with _quiet():
            load({}, storage_reader=reader, planner=_RequestsPlanner(requests), no_dist=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch warns whoever saves alone that he does, which is what is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _PartsPlanner(DefaultSavePlanner):
    """Plans to write rectangles, which torch's own planner knows only from DTensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        """One item a part."""
        self.plan = SavePlan([_write_item(key, part) for key, part in self.state_dict.items()])
        return self.plan

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        """Refuse what torch would take for copies of one tensor."""
        seen: set[MetadataIndex] = set()
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                if item.index in seen:
                    raise CheckpointError(
                        f'rank {rank} and a rank before both hold "{item.index.fqn}"; if they are different experts, '
                        'give "rename" so that each has a name of its own.'
                    )
                seen.add(item.index)
        return all_plans

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The values of a part."""
        values = self.state_dict[index.fqn].values
        assert isinstance(values, Tensor)
        return values.contiguous()


class _RequestsPlanner(DefaultLoadPlanner):
    """Plans to read rectangles into given tensors."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._requests: dict[str, list[Request]] = {}
        for request in requests:
            self._requests.setdefault(request.key, []).append(request)

    def create_local_plan(self) -> LoadPlan:
        """Every overlap of a request with a stored chunk."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, requests in self._requests.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(
                key, stored, [_chunk(request.offsets, request.into.shape) for request in requests]
            )
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the elements of an item go."""
        index = read_item.dest_index
        assert index.index is not None
        view = self._requests[index.fqn][index.index].into
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, offset, length)
        return view


class _StoredIn(NamedTuple):
    """What the reader of torch wants to know of a chunk."""

    relative_path: str


class _ManifestReader(HuggingFaceStorageReader):
    """Reads what the manifest lists, instead of whatever lies in the directory."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        super().__init__(str(directory))
        self._directory, self._manifest = directory, manifest

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Tensors and chunks of the manifest."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, _StoredIn] = {}
        for key, tensor in self._manifest.tensors.items():
            chunks = [_chunk(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]
            properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
            tensors[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for chunk in tensor.chunks:
                index = MetadataIndex(key, torch.Size(chunk.offsets))
                places[index] = _StoredIn(str(self._directory / chunk.file))
        return Metadata(state_dict_metadata=tensors, storage_data=places)


def _write_item(key: str, part: Part) -> WriteItem:
    data = TensorWriteData(
        chunk=_chunk(part.offsets, part.values.shape),
        properties=TensorProperties(dtype=part.values.dtype),
        size=torch.Size(part.shape),
    )
    return WriteItem(MetadataIndex(key, torch.Size(part.offsets)), WriteItemType.SHARD, tensor_data=data)


def _chunk(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
