"""Fencing: every storage node refuses a VDI's older tokens before a take-over completes (I6)."""

from __future__ import annotations

import logging

import trio

from sheepfs.core.clustermap import NodeState
from sheepfs.core.errors import RetryableError, SheepError, UnreachableError
from sheepfs.core.wire import Op
from sheepfs.net.link import Link
from sheepfs.net.router import Router

log = logging.getLogger(__name__)

FENCE_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 2.0
RETRY_S = 0.05


async def fence_everywhere(router: Router, vdi: int, token: int) -> None:
    """Make every node that may serve `vdi`, now or later, refuse its tokens below `token`.

    A node that was voted out serves nobody, and learns the tokens from a sync member before it
    serves again. One that is silent is waited for until it answers or is voted out. The last
    members of a group are never voted out, though they are down: they may be alive, cut off from
    the leader but not from the former holder, and nobody could teach them when they come back.
    They are waited for, until one of them is back and the others have to learn from it.

    The router's map is the newest one then, whatever the old holder did before.

    Durability: the fences are on disk at every node asked.

    Raises:
        UnreachableError: a node neither answered nor was voted out in time.
        FencedError: a newer holder than `token` is there already.
    """
    done: set[tuple[int, int]] = set()
    refused: list[SheepError] = []
    with trio.move_on_after(FENCE_TIMEOUT_S):
        while True:
            missing = _missing(router, done)
            if not missing and await _is_newest(router):
                return
            async with trio.open_nursery() as nursery:
                for node, _ in missing:
                    if link := router.link(node):
                        nursery.start_soon(_fence_one, link, vdi, token, done, refused)
            if refused:
                raise refused[0]
            if _missing(router, done) or not missing:
                with trio.move_on_after(RETRY_S):
                    await router.wait_map()
    silent = ", ".join(str(node) for node, _ in _missing(router, done))
    if not silent:
        raise UnreachableError(f"VDI {vdi} cannot be taken: etcd does not tell the cluster map")
    raise UnreachableError(
        f"VDI {vdi} cannot be taken: node {silent} does not answer, and has not been voted out or "
        "is among the last that hold a group: bring it back (sheepctl cluster status)"
    )


async def _is_newest(router: Router) -> bool:
    """Tell whether the map is the newest one, and take that, now that all nodes refuse.

    The old holder may have been told that a change is done by the members of a later epoch. A node
    that was out of it, and does not know that yet, would give what it had before.
    """
    epoch = router.map.epoch
    try:
        await router.refresh()
    except RetryableError as error:
        log.info("fencing: the cluster map cannot be read: %s", error)
        return False
    return router.map.epoch == epoch


def _missing(router: Router, done: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Nodes that may serve the VDI and have not refused the old holder yet."""
    last = {n for groups in router.map.pools.values() for group in groups for n in group.sync}
    return [
        (node.id, node.incarnation)
        for node in router.map.nodes.values()
        if (node.state is not NodeState.DOWN or node.id in last)
        and (node.id, node.incarnation) not in done
    ]


async def _fence_one(
    link: Link, vdi: int, token: int, done: set[tuple[int, int]], refused: list[SheepError]
) -> None:
    try:
        await link.call(Op.FENCE, vdi=vdi, token=token, timeout_s=CALL_TIMEOUT_S)
    except RetryableError as error:
        log.info("fencing VDI %d: %s", vdi, error)
    except SheepError as error:
        refused.append(error)
    else:
        done.add((link.node, link.incarnation))
