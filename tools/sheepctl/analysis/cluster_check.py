"""Do maps and objects agree? Every object that a map names is there; every object that is there
is named.

Always holds:
- Only reads; `repair` asks others for what they do by themselves (reclaim, repair of a replica).
- A cluster in use changes while it is looked at: only what two looks in a row find is reported.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from sheepfs.cluster import Cluster
from sheepfs.core.errors import (
    CorruptError,
    HeldElsewhereError,
    ObjectNotFoundError,
    VdiNotFoundError,
)
from sheepfs.core.geometry import data_object, layer_of, map_object, pg_of, pool_of
from sheepfs.core.wire import Op
from sheepfs.holding.abandoned import abandoned, is_in_use, level
from sheepfs.layers.inventory import stored_entries, take_inventory
from sheepfs.net.catalog import Roots
from sheepfs.replication.objects import ObjectReader

log = logging.getLogger(__name__)

PAUSE_S = 1.0
CALL_TIMEOUT_S = 30.0


@dataclass
class Findings:
    """What is wrong. Object ids; each with the nodes or the maps it is about."""

    objects: int = 0
    replicas: int = 0
    own_bytes: int = 0
    """Bytes in object files, all replicas counted."""
    dangling: dict[int, list[str]] = field(default_factory=dict)
    """Named by these maps, and no node has it."""
    missing: dict[int, list[int]] = field(default_factory=dict)
    """These sync members lack it."""
    orphans: dict[int, list[int]] = field(default_factory=dict)
    """No map names it, and these nodes have it."""
    misplaced: dict[int, list[int]] = field(default_factory=dict)
    """These nodes have it and are no members of its group."""
    unanswered: dict[int, str] = field(default_factory=dict)
    """Nodes that could not be asked, and why."""

    @property
    def clean(self) -> bool:
        """Whether maps and objects were seen to agree."""
        return not (
            self.dangling or self.missing or self.orphans or self.misplaced or self.unanswered
        )

    def both(self, other: Findings) -> Findings:
        """Give what this look and an earlier one have found."""
        return Findings(
            self.objects,
            self.replicas,
            self.own_bytes,
            {oid: maps for oid, maps in self.dangling.items() if oid in other.dangling},
            {oid: nodes for oid, nodes in self.missing.items() if oid in other.missing},
            {oid: nodes for oid, nodes in self.orphans.items() if oid in other.orphans},
            {oid: nodes for oid, nodes in self.misplaced.items() if oid in other.misplaced},
            {node: why for node, why in self.unanswered.items() if node in other.unanswered},
        )


class ClusterCheck:
    """Compares all maps of a cluster with all objects of its nodes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._reader = ObjectReader(cluster.router, 0)

    async def run(self) -> Findings:
        """Look, and look again at what seems wrong.

        Raises:
            SheepError: etcd does not answer, or a map cannot be read from any node.
        """
        findings = await self._look()
        for _ in range(3):
            if findings.clean:
                break
            await trio.sleep(PAUSE_S)
            findings = (await self._look()).both(findings)
        return findings

    async def _look(self) -> Findings:
        findings = Findings()
        router = self._cluster.router
        found = await take_inventory(router)
        findings.unanswered = found.unanswered
        families = await self._cluster.catalog.all_roots()
        named = await self._named(families)
        excused = _excused(families)
        findings.objects = len(named)
        for oid in named.keys() | found.replicas.keys():
            replicas = found.replicas.get(oid, [])
            have = [replica.node for replica in replicas]
            pool = router.map.pools.get(pool_of(oid), ())
            group = pool[pg_of(oid, len(pool))] if pool else None
            findings.replicas += len(replicas)
            findings.own_bytes += sum(replica.own for replica in replicas)
            if oid not in named:
                if layer_of(oid) not in excused:
                    findings.orphans[oid] = have
                continue
            sync = [n for n in (group.sync if group else ()) if n not in found.unanswered]
            if not have:
                findings.dangling[oid] = named[oid]
            elif lacking := [node for node in sync if node not in have]:
                findings.missing[oid] = lacking
            members = group.members if group else ()
            if stray := [node for node in have if node not in members]:
                findings.misplaced[oid] = stray
        return findings

    async def _named(self, families: dict[int, Roots]) -> dict[int, list[str]]:
        """Give object id -> the maps that name it; map objects included."""
        named: dict[int, list[str]] = defaultdict(list)
        for roots in families.values():
            for root in roots.maps:
                for number in range(root.maps.bit_length()):
                    if root.maps >> number & 1:
                        named[map_object(root.map, number)].append(root.what)
                try:
                    async for index, layer in stored_entries(self._reader, root.map, root.maps):
                        named[data_object(layer, index)].append(root.what)
                except (ObjectNotFoundError, CorruptError) as error:
                    # The map object itself is found to dangle.
                    log.info("map of %s: %s", root.what, error)
        return dict(named)

    async def repair(self, findings: Findings) -> None:
        """Have replicas that lack objects pull them, and orphans removed; returns when done.

        A VDI whose holder died and that nobody opened since is opened, and holders are asked: only
        a holder can tell what of the open layer no map names.

        Raises:
            SheepError: etcd or a node does not answer.
        """
        await self._level_unclean()
        await self._sweep({layer_of(oid) for oid in findings.orphans})
        router = self._cluster.router
        for oid, nodes in findings.missing.items():
            pool = pool_of(oid)
            for node in nodes:
                if link := router.link(node):
                    await link.call(
                        Op.REPAIR,
                        oid=oid,
                        pool=pool,
                        pg=pg_of(oid, len(router.map.pools[pool])),
                        epoch=router.map.epoch,
                        timeout_s=CALL_TIMEOUT_S,
                    )
        catalog = self._cluster.catalog
        for family in await catalog.all_roots():
            await catalog.want_reclaim(family)
        async with catalog.watch_reclaim(PAUSE_S) as hints:
            async for _ in hints:
                if not await catalog.reclaim_wanted():
                    return

    async def _level_unclean(self) -> None:
        for vdi in await abandoned(self._cluster):
            if await is_in_use(self._cluster, vdi):
                continue
            with suppress(VdiNotFoundError, HeldElsewhereError):
                await level(self._cluster, vdi)

    async def _sweep(self, layers: set[int]) -> None:
        """Only the holder can tell what of an open layer is of no use."""
        for _, record, _ in await self._cluster.catalog.vdis():
            if layers.intersection((record.layer, record.map)):
                with suppress(VdiNotFoundError):
                    await self._cluster.sweep(record.id)


def _excused(families: dict[int, Roots]) -> set[int]:
    """Layers in which objects that no map names are normal: they are just being made."""
    excused: set[int] = set()
    for roots in families.values():
        excused |= roots.building | roots.held
    return excused
