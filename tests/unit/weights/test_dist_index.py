"""The index of a checkpoint can neither run code nor change the classes that it is made of."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import metadata

from megatron_rl.weights.dist_index import Unreadable, read_metadata


def index(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sets_an_attribute(module: str, name: str, attribute: str, value: bytes) -> bytes:
    """A pickle that sets an attribute of a class: BUILD with a class as the object and a state of slots."""
    return f"c{module}\n{name}\n(N(V{attribute}\n".encode() + value + b"dtb."


@pytest.mark.parametrize(("attribute", "value"), [("load_id", b"Vours\n"), ("__init__", b"ctorch\nSize\n")])
def test_an_index_that_changes_a_class_is_refused_and_the_class_is_as_before(tmp_path, attribute, value):
    content = sets_an_attribute("torch.distributed.checkpoint.metadata", "StorageMeta", attribute, value)
    before, known = dict(vars(metadata.StorageMeta)), metadata.StorageMeta
    pickle.loads(content)
    assert dict(vars(known)) != before, "the attack works with plain pickle"
    for name, old in before.items():
        if vars(known)[name] is not old:
            setattr(known, name, old)
    with pytest.raises(Unreadable, match="it changes StorageMeta"):
        read_metadata(index(tmp_path / ".metadata", content))
    assert dict(vars(known)) == before


@pytest.mark.parametrize("name", ["torch load", "torch.serialization load", "os system", "builtins eval", "torch hub"])
def test_other_names_than_those_of_the_format_are_refused(tmp_path, name):
    module, attribute = name.split()
    with pytest.raises(Unreadable, match=f"it names {module}.{attribute}, which is not allowed"):
        read_metadata(index(tmp_path / ".metadata", f"c{module}\n{attribute}\n.".encode()))


@pytest.mark.parametrize(
    "content",
    [
        [],
        metadata.Metadata({}, storage_data=None),
        metadata.Metadata({1: metadata.BytesStorageMetadata()}, storage_data={}),
        metadata.Metadata({"a": torch.Size([1])}, storage_data={}),
        metadata.Metadata({}, storage_data={metadata.MetadataIndex("a"): 3}),
    ],
    ids=["no index", "no places", "number as a name", "shape as an entry", "number as a place"],
)
def test_an_index_of_other_types_is_damaged(tmp_path, content):
    with pytest.raises(Unreadable, match=r"\.metadata is damaged: it"):
        read_metadata(index(tmp_path / ".metadata", pickle.dumps(content)))
