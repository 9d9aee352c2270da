"""Reading the etcd part of a cluster whole, putting it into an etcd that has none, accepting it.

Always holds:
- A cluster is there when its `config` is: that comes last, with the end of `importing`. Until then
  no daemon makes a cluster of that name, and none serves.
- Accepting what an etcd holds is one transaction: all numbers go on as after an import, or none.
- An import that ended half-way goes on only with the same file, and only on what it put itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sheepfs.core.errors import ProtocolError, SheepError, UsageError
from sheepfs.core.keys import Keys
from sheepfs.core.kv import Delete, KeyValue, Put, Transaction, Unchanged
from sheepfs.core.metadata import ClusterConfig, ImportRecord
from sheepfs.core.metadata_export import Export, imported
from sheepfs.net.store import Store

log = logging.getLogger(__name__)

MAX_BATCH = 100
"""Keys in a transaction, of which etcd takes 128 operations ..."""
MAX_BATCH_BYTES = 512 << 10
"""... and 1.5 MiB."""
_EVERYTHING = "/sheepfs/"


@dataclass(frozen=True, slots=True)
class Imported:
    """Outcome of an import."""

    keys: int
    resumed: bool
    """An earlier attempt had put some of them."""


async def export_metadata(store: Store, keys: Keys, created: float) -> Export:
    """Read all keys of a cluster that hang on no lease, at one revision.

    Args:
        created: seconds since 1970, for people.

    Raises:
        UsageError: there is no such cluster.
        ProtocolError: what all depends on cannot be read.
        UnreachableError: etcd does not answer.
    """
    return (await _read(store, keys, created))[0]


async def _read(store: Store, keys: Keys, created: float) -> tuple[Export, dict[str, KeyValue]]:
    """Give the export, and all keys as they are."""
    found, revision = await store.list(keys.root)
    name = keys.root.split("/")[2]
    values = {kv.key: kv.value for kv in found if not kv.lease}
    if keys.importing in values:
        raise UsageError(_half_done(name))
    if keys.config not in values:
        raise UsageError(f"there is no cluster called {name!r} in this etcd")
    cluster = ClusterConfig.decode(values[keys.config]).cluster
    plain = {key.removeprefix(keys.root): value for key, value in values.items()}
    export = Export(cluster, name, created, revision, plain)
    export.check()
    return export, {kv.key: kv for kv in found}


async def import_metadata(
    store: Store, keys: Keys, export: Export, started: float, moved: Callable[[int], None]
) -> Imported:
    """Make the exported cluster that of an etcd that has none of this name.

    Args:
        started: seconds since 1970, for people.
        moved: told the bytes of keys put since the last call.

    Cancellation: what was put stays under `importing`; the same call goes on with it.

    Raises:
        UsageError: there is a cluster already, or it is still served; nothing was changed.
        UnreachableError: etcd does not answer: to be called again.
        SheepError: somebody else changes these keys.
    """
    wanted = {keys.root + key: value for key, value in imported(export).items()}
    marker, present = await _begin(store, keys, export, wanted, started)
    config = wanted.pop(keys.config)
    for batch in _batches({k: v for k, v in wanted.items() if k not in present}):
        conditions = [Unchanged(keys.importing, marker), *(Unchanged(k, 0) for k in batch)]
        changes = [Put(key, value) for key, value in batch.items()]
        if await store.commit(Transaction(conditions, changes)) is None:
            raise SheepError(_meddled(keys))
        moved(sum(map(len, batch.values())))
    conditions = [Unchanged(keys.importing, marker), Unchanged(keys.config, 0)]
    last: list[Put | Delete] = [Delete(keys.importing), Put(keys.config, config)]
    if await store.commit(Transaction(conditions, last)) is None:
        raise SheepError(_meddled(keys))
    return Imported(len(wanted) + 1, bool(present))


async def _begin(
    store: Store, keys: Keys, export: Export, wanted: Mapping[str, bytes], started: float
) -> tuple[int, set[str]]:
    """Put the marker, or find that of an earlier attempt; give its revision and what is there."""
    found, _ = await store.list(_EVERYTHING)
    _refuse_twin(found, keys, export.cluster)
    there = {kv.key: kv for kv in found if kv.key.startswith(keys.root)}
    marker = there.pop(keys.importing, None)
    if marker is None:
        if there:
            raise UsageError(_occupied(there, keys))
        record = ImportRecord(export.checksum, started)
        conditions = [Unchanged(keys.importing, 0), Unchanged(keys.config, 0)]
        put = Put(keys.importing, record.encode())
        revision = await store.commit(Transaction(conditions, [put]))
        if revision is None:
            raise SheepError(_meddled(keys))
        return revision, set()
    if ImportRecord.decode(marker.value).checksum != export.checksum:
        raise UsageError(
            "another file was being imported here, and not to its end: complete that one, or give"
            f" it up with: etcdctl del --prefix {keys.root}"
        )
    if any(kv.lease or wanted.get(key) != kv.value for key, kv in there.items()):
        raise UsageError(_occupied(there, keys))
    log.info("%d keys of an earlier attempt are there", len(there))
    return marker.mod_revision, set(there)


def _batches(pending: Mapping[str, bytes]) -> Iterator[dict[str, bytes]]:
    batch: dict[str, bytes] = {}
    size = 0
    for key, value in sorted(pending.items()):
        if batch and (len(batch) == MAX_BATCH or size + len(value) > MAX_BATCH_BYTES):
            yield batch
            batch, size = {}, 0
        batch[key] = value
        size += len(value)
    if batch:
        yield batch


def _refuse_twin(found: list[KeyValue], keys: Keys, cluster: str) -> None:
    """Two clusters with one id would share data directories, and each trust its own map."""
    for kv in found:
        name, _, rest = kv.key.removeprefix(_EVERYTHING).partition("/")
        if rest == "config" and kv.key != keys.config:
            try:
                other = ClusterConfig.decode(kv.value).cluster
            except ProtocolError:
                continue
            if other == cluster:
                raise UsageError(f"this etcd has that cluster already, called {name!r}")


def _occupied(there: Mapping[str, KeyValue], keys: Keys) -> str:
    name = keys.root.split("/")[2]
    if running := _running(there, keys):
        return f"{running}: stop all of them, then import, then start them"
    vdis = sum(key.startswith(keys.vdis) for key in there)
    return (
        f"cluster {name!r} is not empty in this etcd: {len(there)} keys, {vdis} VDIs. Import under"
        " another name (--cluster NAME); or, if none of it is needed any more, stop its daemons"
        f" and mounts and remove it: etcdctl del --prefix {keys.root}"
    )


def _running(there: Mapping[str, KeyValue], keys: Keys) -> str:
    """Say which daemons run; empty if none does."""
    running = sorted(key.removeprefix(keys.alive) for key in there if key.startswith(keys.alive))
    name = keys.root.split("/")[2]
    nodes = ", ".join(running)
    return f"storage daemons of cluster {name!r} run (node {nodes})" if running else ""


def _half_done(name: str) -> str:
    return (
        f"an import into cluster {name!r} has not come to its end: complete it with"
        " sheepctl metadata import and the same file"
    )


def _meddled(keys: Keys) -> str:
    return (
        f"somebody else changes keys below {keys.root}: stop all daemons and mounts of that"
        " cluster, then try again with the same file"
    )


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What an operator is asked to accept.

    Attributes:
        export: what etcd holds.
        change: lets all numbers go on beyond it, if it is as it was read and nobody leads.
    """

    export: Export
    change: Transaction


async def propose_acceptance(store: Store, keys: Keys, created: float) -> Acceptance:
    """Read what etcd holds of a cluster that does not run; nothing is changed.

    Args:
        created: seconds since 1970, for people.

    Raises:
        UsageError: there is no such cluster, it is still served, or numbers would run out.
        ProtocolError: what all depends on cannot be read.
        UnreachableError: etcd does not answer.
    """
    export, there = await _read(store, keys, created)
    if running := _running(there, keys):
        raise UsageError(
            f"{running}: stop all of them, then accept, then start them. One that was killed, or"
            " ran when etcd's data were saved, is gone from etcd after a few seconds"
        )
    wanted = {keys.root + key: value for key, value in imported(export).items()}
    changed = {
        key: value for key, value in wanted.items() if key not in there or there[key].value != value
    }
    # Who makes ids changes a counter; daemons that run soon have a leader.
    conditions = [
        Unchanged(key, there[key].mod_revision if key in there else 0)
        for key in (*changed, keys.config)
    ]
    conditions += [Unchanged(keys.importing, 0), Unchanged(keys.leader, 0)]
    return Acceptance(export, Transaction(conditions, [Put(*item) for item in changed.items()]))


async def accept(store: Store, acceptance: Acceptance) -> None:
    """Let the cluster go on with what etcd holds.

    Raises:
        SheepError: it was changed since it was read; nothing was done.
        UnreachableError: etcd does not answer: it may have happened. Again does no harm.
    """
    if await store.commit(acceptance.change) is None:
        raise SheepError("etcd was changed meanwhile, and nothing was accepted: look again")


async def refuse_half_done(store: Store, keys: Keys) -> None:
    """Raise UsageError if an import has not come to its end."""
    if await store.get(keys.importing) is not None:
        raise UsageError(_half_done(keys.root.split("/")[2]))
