"""Random operations, stops, kills and power cuts of ObjectStore against plain bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_faulty_disk import FaultyDisk
from store_helpers import flush, get, open_store

from sheepfs.core.errors import NoSpaceError, ObjectNotFoundError
from sheepfs.core.geometry import OBJECT_SIZE, data_object, layer_of, map_object

_SIZE = 40_960
"""Only the object's first bytes are written to; the rest stays zeros."""
_OIDS = [data_object(7, 0), data_object(7, 1), data_object(8, 0), map_object(8, 0)]
_oids = st.sampled_from(_OIDS)
_offsets = st.one_of(
    st.sampled_from([0, 1, 511, 4095, 4096, 4097, 8192, 12_288, _SIZE - 1]),
    st.integers(0, _SIZE - 1),
)
_lengths = st.one_of(st.sampled_from([1, 512, 4096, 8192, _SIZE]), st.integers(1, 20_000))


@dataclass
class _Model:
    """What an object holds, and what it may hold after the power went.

    `durable` is the content of the last flush, None if the object was not there then.
    """

    content: bytearray | None = None
    version: int = 0
    durable: tuple[bytes, int] | None = None
    changed: bool = False
    deleted: bool = False


class StoreMachine(RuleBasedStateMachine):
    """The store and the model, side by side."""

    @initialize()
    def start(self) -> None:
        self.disk = FaultyDisk()
        self.store = open_store(self.disk, max_open=2, reserve_bytes=0)
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
        self.store.write(oid, offset, data, self.version, create=True, pool=2, pg=oid % 2)
        content = bytearray(_SIZE)
        content[offset : offset + len(data)] = data
        self._wrote(oid, content)

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

    @rule(source=_oids, destination=_oids)
    def copy(self, source: int, destination: int) -> None:
        content = self.models[source].content
        if content is None or source == destination:
            return
        _, bitmap, pieces = self.store.export(source)
        self.version += 1
        data = b"".join(pieces)
        self.store.install(destination, self.version, 0, bitmap, data, pool=2, pg=destination % 2)
        self.models[destination] = _Model(
            bytearray(content), self.version, (bytes(content), self.version)
        )

    @rule(oid=_oids, seed=st.integers(1, 3))
    def run_out_of_space(self, oid: int, seed: int) -> None:
        self._mark(oid)
        self.disk.capacity = 0
        try:
            self.store.write(
                oid, 0, self._data(_SIZE, seed), self.version, create=True, pool=2, pg=oid % 2
            )
        except NoSpaceError:
            pass
        else:
            raise AssertionError("a full disk took a write")
        finally:
            self.disk.capacity = 1 << 40

    @rule(layer=st.sampled_from([None, 7, 8]))
    def flush(self, layer: int | None) -> None:
        flush(self.store, layer)
        for oid, model in self.models.items():
            if layer is None or layer_of(oid) == layer:
                self._durable(model)

    def _durable(self, model: _Model) -> None:
        model.durable = None
        if model.content is not None:
            model.durable = bytes(model.content), model.version
        model.changed = model.deleted = False

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
        if job is not None:
            job.run()
            self.store.end_flush(job)

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
                self.models[oid] = _Model(bytearray(expected), version, model.durable)
                continue
            if not model.changed and not model.deleted and model.durable is not None:
                self.store.clear_suspect(oid)  # Marked, but flushed: all of it must be there.
                assert get(self.store, oid, 0, _SIZE) == model.durable[0]
            self.store.launder(oid, 1)
            content = get(self.store, oid, 0, _SIZE)
            self.models[oid] = _Model(bytearray(content), entry.version, (content, entry.version))

    def _reopen(self) -> None:
        self.store = open_store(self.disk, max_open=2, reserve_bytes=0, create=False)

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
            used += 4096 * blocks.bit_count()
        assert self.store.usage().used_by_objects == used


StoreMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStoreModel = StoreMachine.TestCase
