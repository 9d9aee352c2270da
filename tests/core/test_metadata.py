from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs.core import metadata, names
from sheepfs.core.errors import ProtocolError, UsageError
from sheepfs.core.geometry import MAX_VDI_SIZE
from sheepfs.core.keys import Keys
from sheepfs.core.metadata import Record, VdiRecord
from sheepfs.core.names import (
    check_copies,
    check_vdi_name,
    check_vdi_size,
    full_name,
)

VALUES = {
    "int": st.integers(0, 2**63),
    "float": st.floats(0, 1e12),
    "str": st.text(max_size=40),
    "bool": st.booleans(),
    "dict[str, str]": st.dictionaries(st.text(max_size=9), st.text(max_size=9)),
}
BOUNDED: dict[type[Record], dict[str, st.SearchStrategy[Any]]] = {
    metadata.RecoveryRecord: {
        "parallel": st.integers(1, 64),
        "bandwidth": st.just(0) | st.integers(1 << 20, 2**63),
        "out_after_s": st.floats(1, 1e9),
    }
}
"""What a record refuses to be made of otherwise."""
KINDS = [
    kind
    for kind in vars(metadata).values()
    if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record
]


def records(kind: type[Record]) -> st.SearchStrategy[Record]:
    assert is_dataclass(kind)
    values = {f.name: VALUES[str(f.type)] for f in fields(kind)}
    return st.builds(kind, **{**values, **BOUNDED.get(kind, {})})


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_record_survives_encoding(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(records(kind))
    assert kind.decode(record.encode()) == record


@pytest.mark.parametrize("kind", KINDS)
@given(
    junk=st.one_of(
        st.binary(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        ).map(lambda content: json.dumps(content).encode()),
    )
)
def test_junk_is_refused(kind: type[Record], junk: bytes) -> None:
    with pytest.raises(ProtocolError):
        kind.decode(junk)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": 3},
        {"size": "10"},
        {"size": True},
        {"size": None},
        {"clean": 1},
        {"colour": 1},
        {"attributes": {"a": 1}},
        {"attributes": []},
    ],
)
def test_a_record_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    content = json.loads(VdiRecord(2, 10, 3, 1, 1, 1).encode()) | change
    with pytest.raises(ProtocolError):
        VdiRecord.decode(json.dumps(content).encode())


def test_a_record_with_a_missing_field_is_refused() -> None:
    content = json.loads(VdiRecord(2, 10, 3, 1, 1, 1).encode())
    del content["size"]
    with pytest.raises(ProtocolError):
        VdiRecord.decode(json.dumps(content).encode())


def test_a_vdi_takes_less_than_a_kilobyte() -> None:
    assert len(VdiRecord(2**40, 2**50, 3, 2**35, 2**35, 2**35).encode()) < 1024


def test_keys_are_pinned() -> None:
    """docs/etcd.md lists them; daemons of two versions share them."""
    keys = Keys("main")
    assert keys.map == "/sheepfs/main/map"
    assert keys.leader == "/sheepfs/main/leader"
    assert keys.config == "/sheepfs/main/config"
    assert keys.node(3) == "/sheepfs/main/nodes/3"
    assert keys.alive_node(3) == "/sheepfs/main/alive/3"
    assert keys.pool(3) == "/sheepfs/main/pools/3"
    assert keys.vdi("vm1.raw") == "/sheepfs/main/vdis/vm1.raw"
    assert keys.lock(9) == "/sheepfs/main/locks/9"
    assert keys.layer(9) == "/sheepfs/main/layers/9"
    assert keys.counter("node") == "/sheepfs/main/counters/node"


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 65, "ä", "a\n"])
def test_cluster_names_that_cannot_be_in_a_key_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Keys(name)


@pytest.mark.parametrize("name", ["vm1.raw", "a", "ü" * 64, "x" * 128, "two words", "-rf"])
def test_good_vdi_names_are_taken(name: str) -> None:
    check_vdi_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "x" * 129, "ü" * 65, ".hidden", "..", "a/b", "a@b", "a\0b", "a\nb", "\x7f", "a\udcff"],
)
def test_bad_vdi_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        check_vdi_name(name)


@given(st.text())
def test_a_vdi_name_that_is_taken_can_be_a_file_name(name: str) -> None:
    try:
        check_vdi_name(name)
    except UsageError:
        return
    encoded = name.encode()
    assert 0 < len(encoded) <= names.MAX_NAME_BYTES
    assert b"/" not in encoded
    assert b"\0" not in encoded


@pytest.mark.parametrize("size", [0, 1, MAX_VDI_SIZE])
def test_sizes_up_to_the_limit_are_taken(size: int) -> None:
    check_vdi_size(size)


@pytest.mark.parametrize("size", [-1, MAX_VDI_SIZE + 1])
def test_sizes_beyond_the_limit_are_refused(size: int) -> None:
    with pytest.raises(UsageError):
        check_vdi_size(size)


@pytest.mark.parametrize("copies", [0, 6, -1])
def test_numbers_of_copies_that_cannot_be_are_refused(copies: int) -> None:
    with pytest.raises(UsageError):
        check_copies(copies)


def test_the_suffix_may_be_left_out_on_the_command_line() -> None:
    assert full_name("vm1") == full_name("vm1.raw") == "vm1.raw"
