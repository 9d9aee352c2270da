"""A network in memory, on trio's clock: streams between hosts, with latency, cuts and deaths.

Like TCP it delivers bytes in order or not at all: what a cut link holds up is sent again, after
twice as long each time, and so arrives some time after the link is mended, unless a side has given
the stream up by then. It passes tests/net/test_transport.py.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from weakref import WeakValueDictionary

import trio
import trio.abc

from sheepfs.core.errors import UsageError
from sheepfs.core.wire import Buffer
from sheepfs.net.transport import Serve

WINDOW = 4 << 20
"""Bytes on their way in one direction of a stream before its writer must wait."""
FIRST_PORT = 7000
ACCEPT_S = 0.0001
FIRST_REPEAT_S = 0.2
LAST_REPEAT_S = 120.0
"""Linux repeats what is not acknowledged after times that double from the one to the other."""


class SimNetwork:
    """All hosts and the streams between them.

    Args:
        rng: latencies are drawn from it.
        latency_s: mean time from one host to another.
        far: for each way from one host to another one of these is drawn: so many times as long.
    """

    def __init__(
        self, rng: random.Random, latency_s: float = 0.0002, far: Sequence[float] = (1.0,)
    ) -> None:
        self.latency_s = latency_s
        self._far = far
        self._factors: dict[tuple[str, str], float] = {}
        self.hosts: dict[str, SimHost] = {}
        self._rng = rng
        self.slow_s: dict[tuple[str, str], float] = {}
        """(from, to) -> mean time that something takes in addition."""
        self._cut: set[tuple[str, str]] = set()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._sooner = trio.Event()
        self._streams: dict[_Direction, None] = {}

    def host(self, name: str) -> SimHost:
        """Give the host of a name, made on first use."""
        return self.hosts.setdefault(name, SimHost(self, name))

    async def run(self) -> None:
        """Deliver until cancelled, where the clock is no SimClock."""
        while True:
            self._sooner = trio.Event()
            with trio.move_on_at(self.next_due):
                await self._sooner.wait()
            self.deliver_due()

    @property
    def next_due(self) -> float:
        """When something arrives next."""
        return self._due[0][0] if self._due else math.inf

    def deliver_due(self) -> None:
        """Deliver what has arrived by now."""
        now = trio.current_time()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()

    def at(self, time: float, what: Callable[[], None]) -> None:
        """Call `what` at a time."""
        if not self._due or time < self._due[0][0]:
            self._sooner.set()
        heapq.heappush(self._due, (time, next(self._numbers), what))

    def latency(self, source: str = "", target: str = "") -> float:
        """Draw how long something takes from one host to another."""
        way = source, target
        if way not in self._factors:
            self._factors[way] = self._rng.choice(self._far)
        mean_s = self.latency_s * self._factors[way] + self.slow_s.get(way, 0.0)
        return self._rng.expovariate(1 / mean_s)

    # -- faults -----------------------------------------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Let nothing pass from one host to another."""
        self._cut.add((source, target))

    def mend(self) -> None:
        """End all cuts."""
        self._cut.clear()
        self.retry()

    def is_cut(self, source: SimHost, target: SimHost) -> bool:
        """Tell whether what is sent from one host to another is lost."""
        return (source.name, target.name) in self._cut

    def is_open(self, source: SimHost, target: SimHost) -> bool:
        """Tell whether bytes pass now."""
        return (
            not self.is_cut(source, target)
            and not source.paused
            and not target.paused
            and target.alive
        )

    @property
    def farthest_s(self) -> float:
        """Mean time that something takes on the slowest way there may be, when all is well."""
        return self.latency_s * max(self._far)

    @property
    def is_well(self) -> bool:
        """Whether nothing is cut and nothing is slow."""
        return not self._cut and not self.slow_s

    def retry(self) -> None:
        """Deliver what was held up and can go on."""
        for direction in list(self._streams):
            direction.deliver_soon()

    def opened(self, direction: _Direction) -> None:
        self._streams[direction] = None

    def ended(self, direction: _Direction) -> None:
        self._streams.pop(direction, None)


class StandstillError(BaseException):
    """Nothing will ever happen again."""


class SimClock(trio.abc.Clock):
    """A clock that jumps to whatever comes first, the next deadline or what the network delivers.

    With trio's MockClock a task would have to wait for the latter, with a deadline and two turns of
    the loop for each message: a fifth of all that the simulator did.
    """

    def __init__(self, network: SimNetwork) -> None:
        self._network = network
        self._now = 0.0

    def start_clock(self) -> None:
        """See trio.abc.Clock."""

    def current_time(self) -> float:
        """See trio.abc.Clock."""
        return self._now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """See trio.abc.Clock. Trio asks when no task can run: the moment to jump, not to sleep."""
        due = self._network.next_due
        first = min(deadline, due)
        if first == math.inf:
            raise StandstillError(
                "every task waits, none with a deadline, and nothing is under way"
            )
        self._now = max(self._now, first)
        if due <= deadline:
            self._network.deliver_due()
        return 0.0


class SimHost:
    """One host, as a program on it sees the network (`sheepfs.net.transport.Network`)."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self.network = network
        self.name = name
        self.alive = True
        self.paused = False
        self.clock_s = 0.0
        """How far its clock is ahead."""
        self.listeners: dict[int, SimListener] = {}
        self._shields: WeakValueDictionary[int, trio.CancelScope] = WeakValueDictionary()
        self._transports: dict[SimTransport, None] = {}
        self._ports = count(FIRST_PORT)
        self._pauses = 0
        self._resumed = trio.Event()

    # -- Network ----------------------------------------------------------------------------

    async def connect(self, address: str) -> SimTransport:
        """See Network."""
        name, _, port = address.rpartition(":")
        network = self.network
        target = network.hosts.get(name)
        if target is None:
            raise OSError(f"no host {name}")
        await trio.sleep(network.latency())
        while not (network.is_open(self, target) and network.is_open(target, self)):
            if not self.alive:
                raise ConnectionResetError("this host is dead")
            await trio.sleep(0.05)  # A SYN is repeated.
        listener = target.listeners.get(int(port))
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        ours = SimTransport(self, address)
        theirs = SimTransport(target, f"{self.name}:{next(self._ports)}")
        there, back = _Direction(ours, theirs), _Direction(theirs, ours)
        ours.out, theirs.out = there, back
        self._transports[ours] = target._transports[theirs] = None
        listener.accept(theirs)
        return ours

    async def listen(self, address: str) -> SimListener:
        """See Network."""
        wanted = int(address.rpartition(":")[2]) or next(self._ports)
        await trio.lowlevel.checkpoint()
        if wanted in self.listeners:
            raise UsageError(f"cannot listen at {address}: in use")
        return SimListener(self, wanted)

    # -- faults -----------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold up everything from and to this host."""
        self._pauses += 1
        self.paused = True

    def resume(self) -> None:
        """Let it go on, if nobody else has paused it."""
        self._pauses -= 1
        if not self._pauses:
            self._go_on()

    def _go_on(self) -> None:
        self.paused = False
        self._resumed.set()
        self._resumed = trio.Event()
        self.network.retry()

    def shields(self, scope: trio.CancelScope) -> None:
        """Shield a scope from cancellation only as long as this host lives."""
        if self.alive:
            self._shields[next(self._ports)] = scope
        else:
            scope.shield = False

    async def running(self) -> None:
        """Wait while this host is paused."""
        while self.paused:
            await self._resumed.wait()

    def die(self, *, silent: bool) -> None:
        """End the program on this host; `silent`: nobody is told (power is gone)."""
        self.alive = False
        for scope in self._shields.values():
            scope.shield = False
        self.listeners.clear()
        self._go_on()
        for transport in list(self._transports):
            if silent:
                transport.vanish()
            else:
                transport.reset()

    def live(self) -> None:
        """Let a new program run here."""
        self.alive = True
        self.network.retry()

    def forget(self, transport: SimTransport) -> None:
        self._transports.pop(transport, None)


class SimListener:
    """See sheepfs.net.transport.Listener."""

    def __init__(self, host: SimHost, port: int) -> None:
        self.port = port
        self._host = host
        self._waiting: deque[SimTransport] = deque()
        self._came = trio.Event()
        host.listeners[port] = self

    def accept(self, transport: SimTransport) -> None:
        self._waiting.append(transport)
        self._came.set()

    async def serve(self, serve: Serve) -> None:
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._came.wait()
                    self._came = trio.Event()
                    while self._waiting:
                        nursery.start_soon(serve, self._waiting.popleft())
        finally:
            if self._host.listeners.get(self.port) is self:
                del self._host.listeners[self.port]


class _Direction:
    """Bytes from one end of a stream to the other."""

    def __init__(self, source: SimTransport, target: SimTransport) -> None:
        self.source = source
        self.target = target
        self.network = source.host.network
        self.on_way: deque[tuple[float, bytes | None]] = deque()
        """(when it arrives, data; None is the end)."""
        self.size = 0
        self._last = 0.0
        self._broken = False
        self._lost: float | None = None
        """Since when nothing arrives, as the link is cut."""
        self._resumes = 0.0
        """When what was lost is sent again."""
        self.network.opened(self)

    def put(self, data: bytes | None) -> None:
        latency_s = self.network.latency(self.source.host.name, self.target.host.name)
        self._last = max(self._last, trio.current_time() + latency_s)
        self.on_way.append((self._last, data))
        self.size += len(data or b"")
        self.network.at(self._last, self.deliver)

    def deliver_soon(self) -> None:
        if self.on_way or self._broken:
            self.network.at(trio.current_time() + self.network.latency(), self.deliver)

    def deliver(self) -> None:
        now = trio.current_time()
        if self.network.is_cut(self.source.host, self.target.host):
            self._lost = now if self._lost is None else self._lost
        if not self.network.is_open(self.source.host, self.target.host):
            return
        if self._lost is not None:
            self._resumes = _next_repeat(self._lost, now)
            self._lost = None
            self.network.at(self._resumes, self.deliver)
        if now < self._resumes:
            return
        if self._broken:
            self.target.break_off()
            self._end()
            return
        while self.on_way and self.on_way[0][0] <= now:
            _, data = self.on_way.popleft()
            if data is None:
                self.target.at_end = True
                self._end()
            else:
                self.size -= len(data)
                if self.target.closed:
                    # As an RST: nobody reads there any more.
                    self.target.out.break_off()
                    self._end()
                    return
                self.target.take(data)
        self.target.readable.set()
        self.source.writable.set()

    def break_off(self) -> None:
        """Reset: what is on its way is lost."""
        self._broken = True
        self.on_way.clear()
        self.network.at(trio.current_time() + self.network.latency(), self.deliver)

    def drop(self) -> None:
        """Let everything vanish, the reset included."""
        self.on_way.clear()
        self._broken = False

    def _end(self) -> None:
        self.on_way.clear()
        self.network.ended(self)


def _next_repeat(lost: float, now: float) -> float:
    """Give when TCP sends again what was lost."""
    at, pause_s = lost, FIRST_REPEAT_S
    while at <= now:
        at += pause_s
        pause_s = min(2 * pause_s, LAST_REPEAT_S)
    return at


class SimTransport:
    """See sheepfs.net.transport.Transport."""

    out: _Direction

    def __init__(self, host: SimHost, peer: str) -> None:
        self.host = host
        self.peer = peer
        self.at_end = False
        self.closed = False
        self.readable = trio.Event()
        self.writable = trio.Event()
        self._broken = False
        self._in: deque[bytes] = deque()
        self._skip = 0

    def take(self, data: bytes) -> None:
        self._in.append(data)

    def break_off(self) -> None:
        self._broken = True
        self.readable.set()
        self.writable.set()

    def reset(self) -> None:
        """Close as the kernel does for a process that is killed."""
        if not self.closed:
            self.out.break_off()
            self._close()

    def vanish(self) -> None:
        """Close, and let the other side know nothing, not even later, unless it sends."""
        if not self.closed:
            self.out.drop()
            self._close()

    def _check(self) -> None:
        if self.closed:
            raise OSError("the stream is closed")
        if self._broken:
            raise ConnectionResetError("the stream was reset")

    def read(self, space: memoryview) -> int:
        """See Transport."""
        self._check()
        if self.host.paused:
            raise BlockingIOError
        done = 0
        while self._in and done < len(space):
            data = self._in[0]
            piece = data[self._skip : self._skip + len(space) - done]
            space[done : done + len(piece)] = piece
            done += len(piece)
            self._skip += len(piece)
            if self._skip == len(data):
                self._in.popleft()
                self._skip = 0
        if not done and not self.at_end:
            raise BlockingIOError
        return done

    def write(self, buffers: Sequence[Buffer]) -> int:
        """See Transport."""
        self._check()
        room = WINDOW - self.out.size
        if room <= 0:
            raise BlockingIOError
        data = b"".join(buffers)[:room]
        self.out.put(data)
        return len(data)

    async def wait_readable(self) -> None:
        """See Transport."""
        while True:
            await self.host.running()
            if self.closed:
                raise trio.ClosedResourceError("the stream is closed")
            if self._in or self.at_end or self._broken:
                await trio.lowlevel.checkpoint()
                return
            self.readable = trio.Event()
            await self.readable.wait()

    async def wait_writable(self) -> None:
        """See Transport."""
        while not (self.closed or self._broken) and self.out.size >= WINDOW:
            self.writable = trio.Event()
            await self.writable.wait()
        if self.closed:
            raise trio.ClosedResourceError("the stream is closed")
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """See Transport."""
        if not self.closed:
            self.out.put(None)
            self._close()

    def _close(self) -> None:
        self.closed = True
        self._in.clear()
        self.host.forget(self)
        self.readable.set()
        self.writable.set()
