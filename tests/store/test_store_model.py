"""Random operations, stops, kills and power cuts of ObjectStore against plain bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_helpers import flush, get, level, open_store, trust

from fakes.faulty_disk import FaultyDisk
from sheepfs.core.errors import CorruptError, NoSpaceError, ObjectNotFoundError
from sheepfs.core.geometry import (
    OBJECT_SIZE,
    data_object,
    layer_of,
    make_layer,
    map_object,
)
from storaged.store.entry import sibling

_SIZE = 40_960
"""Only the object's first bytes are written to; the rest stays zeros."""
_LAYERS = [make_layer(serial, 5, 3) for serial in (1, 2, 3, 4)]
_FAMILY = [data_object(layer, 0) for layer in _LAYERS]
_OIDS = [*_FAMILY, data_object(_LAYERS[0], 1), map_object(_LAYERS[1], 0)]
_oids = st.sampled_from(_OIDS)
_family = st.sampled_from(_FAMILY)
_offsets = st.one_of(
    st.sampled_from([0, 1, 511, 4095, 4096, 4097, 8192, 12_288, _SIZE - 1]),
    st.integers(0, _SIZE - 1),
)
_lengths = st.one_of(st.sampled_from([1, 512, 4096, 8192, _SIZE]), st.integers(1, 20_000))


@dataclass
class _Model:
    """What an object holds, and what it may hold after the power went.

    `durable` is the content of the last flush, None if the object was not there then; `history`
    all that the object held since, and what it was a copy of.
    """

    content: bytearray | None = None
    version: int = 0
    durable: tuple[bytes, int] | None = None
    changed: bool = False
    deleted: bool = False
    made: bool = False
    """Made anew since the last flush: what a power cut leaves is nobody's business."""
    overlay: bool = False
    history: list[bytes] = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    """The store and the model, side by side."""

    @initialize(max_open=st.sampled_from([2, 64]))
    def start(self, max_open: int) -> None:
        self.disk = FaultyDisk()
        self.max_open = max_open
        self.store = open_store(self.disk, max_open=max_open, reserve_bytes=0)
        self.models = {oid: _Model() for oid in _OIDS}
        self.version = 0

    def _data(self, length: int, seed: int) -> bytes:
        return bytes(length) if seed == 0 else random.Random(seed).randbytes(length)

    def _mark(self, oid: int) -> None:
        if not self.store.is_marked(oid):
            self.store.mark([oid])
        self.version += 1

    def _wrote(self, oid: int, content: bytearray) -> None:
        model = self.models[oid]
        model.content = content
        model.version = self.version
        model.changed = True
        model.history.append(bytes(content))

    @rule(oid=_oids, offset=_offsets, length=_lengths, seed=st.integers(0, 3))
    def write(self, oid: int, offset: int, length: int, seed: int) -> None:
        content = self.models[oid].content
        data = self._data(min(length, _SIZE - offset), seed)
        self._mark(oid)
        if content is None:
            try:
                self.store.write(oid, offset, data, self.version)
            except ObjectNotFoundError:
                return
            raise AssertionError("a write to an absent object was taken")
        self.store.write(oid, offset, data, self.version)
        content[offset : offset + len(data)] = data
        self._wrote(oid, content)

    @rule(oid=_oids, offset=_offsets, length=_lengths, seed=st.integers(0, 3))
    def create(self, oid: int, offset: int, length: int, seed: int) -> None:
        data = self._data(min(length, _SIZE - offset), seed)
        self._mark(oid)
        self.store.write(oid, offset, data, self.version, create=True, pool=3, pg=0)
        self._made(oid, bytearray(_SIZE))
        content = bytearray(_SIZE)
        content[offset : offset + len(data)] = data
        self._wrote(oid, content)

    def _made(self, oid: int, content: bytearray, overlay: bool = False) -> None:
        model = self.models[oid]
        model.made, model.overlay, model.history = True, overlay, [bytes(content)]

    @rule(oid=_oids, offset=_offsets, length=_lengths)
    def punch(self, oid: int, offset: int, length: int) -> None:
        content = self.models[oid].content
        if content is None:
            return
        length = min(length, _SIZE - offset)
        self._mark(oid)
        self.store.punch(oid, offset, length, self.version)
        content[offset : offset + length] = bytes(length)
        self._wrote(oid, content)

    @rule(oid=_oids)
    def delete(self, oid: int) -> None:
        model = self.models[oid]
        self.store.delete(oid)
        model.deleted = model.deleted or model.content is not None
        model.content = None

    @rule(base=_family, oid=_family, offset=_offsets, length=_lengths, seed=st.integers(0, 3))
    def copy(self, base: int, oid: int, offset: int, length: int, seed: int) -> None:
        data = self._data(min(length, _SIZE - offset), seed) if seed < 3 else b""
        self._copy(
            base,
            oid,
            lambda version: self.store.write(
                oid, offset, data, version, create=True, pool=3, pg=0, base=base
            ),
            offset,
            data,
        )

    @rule(base=_family, oid=_family, offset=_offsets, length=_lengths)
    def copy_and_punch(self, base: int, oid: int, offset: int, length: int) -> None:
        length = min(length, _SIZE - offset)
        self._copy(
            base,
            oid,
            lambda version: self.store.punch(oid, offset, length, version, pool=3, pg=0, base=base),
            offset,
            bytes(length),
        )

    def _copy(
        self, base: int, oid: int, change: Callable[[int], None], offset: int, data: bytes
    ) -> None:
        if base == oid:
            return
        content = self.models[base].content
        self._mark(oid)
        if content is None:
            try:
                change(self.version)
            except ObjectNotFoundError:
                return
            raise AssertionError("a copy of an absent object was made")
        change(self.version)
        self._made(oid, content, overlay=True)
        content = bytearray(content)
        content[offset : offset + len(data)] = data
        self._wrote(oid, content)

    @rule(source=_oids, destination=_oids)
    def make_level(self, source: int, destination: int) -> None:
        content = self.models[source].content
        if content is None or source == destination:
            return
        if self.models[destination].content is None:
            self._made(destination, bytearray(_SIZE))
        self.version += 1
        version = self.models[source].version
        level(self.store, source, destination, version)
        self._wrote(destination, bytearray(content))
        self.models[destination].version = version

    @rule(base=_family)
    def unshare(self, base: int) -> None:
        for oid in self.store.dependents(base):
            self.store.mark([oid])
            self.store.unshare(oid, base)
        assert not self.store.dependents(base)

    @rule(oid=_oids)
    def quarantine(self, oid: int) -> None:
        model = self.models[oid]
        self.store.quarantine(oid)
        model.deleted = model.deleted or model.content is not None
        model.content = None

    @rule(oid=_oids, seed=st.integers(1, 3))
    def run_out_of_space(self, oid: int, seed: int) -> None:
        self._mark(oid)
        self.disk.capacity = 0
        try:
            self.store.write(
                oid, 0, self._data(_SIZE, seed), self.version, create=True, pool=3, pg=0
            )
        except NoSpaceError:
            pass
        else:
            raise AssertionError("a full disk took a write")
        finally:
            self.disk.capacity = 1 << 40

    @rule(layer=st.sampled_from([None, *_LAYERS]))
    def flush(self, layer: int | None) -> None:
        flush(self.store, layer)
        # What the layer's objects inherit from is flushed too.
        unclean = self.store._tracker.unclean()
        for oid, model in self.models.items():
            is_base = model.content is not None and oid not in unclean
            if layer is None or layer_of(oid) == layer or is_base:
                self._durable(model)

    def _durable(self, model: _Model) -> None:
        model.durable = None
        if model.content is not None:
            model.durable = bytes(model.content), model.version
            model.history = [model.durable[0]]
        model.changed = model.deleted = model.made = False

    @rule(oid=_oids, seed=st.integers(1, 3))
    def write_while_a_flush_runs(self, oid: int, seed: int) -> None:
        job = self.store.begin_flush(None)
        for model in self.models.values():
            self._durable(model)
        content = self.models[oid].content
        if content is not None:
            self._mark(oid)
            data = self._data(5000, seed)
            self.store.write(oid, 100, data, self.version)
            content[100:5100] = data
            self._wrote(oid, content)
        while job is not None:
            job.run()
            job = self.store.end_flush(job)

    @rule()
    def trim(self) -> None:
        self.store.trim_marks()

    @rule()
    def stop_and_start(self) -> None:
        self.store.close()
        for model in self.models.values():
            self._durable(model)
        self._reopen()
        assert self.store.was_clean
        assert self.store.suspects() == []

    @rule()
    def kill_and_start(self) -> None:
        self.disk.kill()
        self._reopen()
        assert not self.store.was_clean
        suspects = set(self.store.suspects())
        for oid, model in self.models.items():
            if model.content is not None and model.changed:
                assert oid in suspects, "an object changed since its last flush is a suspect"
            if oid in suspects:
                # The process died, the page cache did not: the data is all there.
                self.store.launder(oid, 1)
                entry = self.store.get(oid)
                assert entry is not None
                model.version = entry.version
                if model.overlay and model.content is not None:
                    # What was written and not flushed, its header may not know of.
                    content = get(self.store, oid, 0, _SIZE)
                    for at in range(0, _SIZE, 4096):
                        allowed = {old[at : at + 4096] for old in model.history}
                        assert content[at : at + 4096] in allowed
                    model.content = bytearray(content)
                self._durable(model)

    @rule(seed=st.integers(0, 1 << 32))
    def cut_power_and_start(self, seed: int) -> None:
        self.disk.power_cut(random.Random(seed))
        self._reopen()
        suspects = set(self.store.suspects())
        for oid, model in self.models.items():
            entry = self.store.get(oid)
            if entry is None:
                assert model.durable is None or model.deleted, "a flushed object is gone"
                self.models[oid] = _Model()
                continue
            if oid not in suspects:
                assert model.durable is not None, "an object that was never durable is trusted"
                expected, version = model.durable
                assert entry.version == version
                assert get(self.store, oid, 0, _SIZE) == expected
                overlay = bool(self.store.layout(oid).layers)
                self.models[oid] = _Model(
                    bytearray(expected),
                    version,
                    model.durable,
                    overlay=overlay,
                    history=[expected],
                )
                continue
            if not model.changed and not model.deleted and model.durable is not None:
                trust(self.store, oid)  # Marked, but flushed: all of it must be there.
                assert get(self.store, oid, 0, _SIZE) == model.durable[0]
            lenient = model.made or model.deleted or model.durable is None
            try:
                self.store.launder(oid, 1)
                content = get(self.store, oid, 0, _SIZE)
            except CorruptError:
                assert lenient, "what was flushed is lost"
                self.store.delete(oid)
                self.models[oid] = _Model(deleted=True)
                continue
            if not lenient:
                for at in range(0, _SIZE, 512):
                    allowed = {old[at : at + 512] for old in model.history}
                    assert content[at : at + 512] in allowed, "what was flushed has changed"
            overlay = bool(self.store.layout(oid).layers)
            self.models[oid] = _Model(
                bytearray(content),
                entry.version,
                (content, entry.version),
                overlay=overlay,
                history=[content],
            )

    def _reopen(self) -> None:
        self.store = open_store(self.disk, max_open=self.max_open, reserve_bytes=0, create=False)

    @invariant()
    def content_is_as_written(self) -> None:
        if not hasattr(self, "store"):
            return
        for oid, model in self.models.items():
            entry = self.store.get(oid)
            if model.content is None:
                assert entry is None
                continue
            assert entry is not None
            assert entry.version == model.version
            assert get(self.store, oid, 0, _SIZE) == model.content

    @precondition(lambda self: hasattr(self, "store"))
    @rule()
    def look_closely(self) -> None:
        used = 0
        for oid, model in self.models.items():
            if model.content is None:
                continue
            assert get(self.store, oid, _SIZE, OBJECT_SIZE - _SIZE) == bytes(OBJECT_SIZE - _SIZE)
            assert self.store.verify(oid) == []
            blocks = int.from_bytes(self.store.extents(oid), "little")
            for i in range(_SIZE // 4096):
                empty = not any(model.content[i * 4096 : (i + 1) * 4096])
                assert bool(blocks >> i & 1) != empty
            layout = self.store.layout(oid)
            used += 4096 * (blocks.bit_count() - sum(map(bool, layout.sources)))
            for number, layer in enumerate(layout.layers, 1):
                if number in layout.sources:
                    assert oid in self.store.dependents(sibling(oid, layer))
        assert self.store.usage().used_by_objects == used


StoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStoreModel = StoreMachine.TestCase
