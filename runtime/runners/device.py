"""TensorRT engines on keys and values on a device, which they write in place; the CPU only says what comes next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mesart.graphs.bundle.manifest import Manifest, ProfileInfo
from mesart.graphs.bundle.names import ATTENDED, KINDS, LOGITS, PAST_POSITION_IDS, Phase, past_name, present_name
from mesart.graphs.errors import BundleError, InputError
from mesart.graphs.method.plan import Span
from mesart.runtime.cuda import Pinned, aligned
from mesart.runtime.device_buckets import DeviceBuckets
from mesart.runtime.engines import Engines
from mesart.runtime.kv.device import DeviceKv, DeviceStore
from mesart.runtime.run_inputs import Packing, RunInputs
from mesart.runtime.runners.replay import Replay
from mesart.runtime.runners.runner import Logits, Segment, require_numbers


class DeviceRunner:
    """Runs segments one after the other; see :class:`~mesart.runtime.runners.runner.Runner`.

    It waits for the device where logits are wanted, and only there. Keys that are no numbers show in the logits of
    those that see them: to look at them would take a copy of each to the host.
    """

    last_logits_only = True
    whole_slices = True

    def __init__(self, manifest: Manifest, store: DeviceStore, engines: Engines) -> None:
        self._manifest, self._store, self._engines, self._cuda = manifest, store, engines, engines.cuda
        self._buckets = DeviceBuckets(manifest, engines)
        self._layers = len(manifest.layers)
        self._logit_bytes = 4 * int(manifest.model["vocab_size"])
        runs = [x for engine in engines.set.engines for x in engine.profiles if x.phase != "rerotate"]
        slots = max(x.kv_length for x in runs)
        self._inputs = RunInputs(self._cuda, Packing(max(x.new for x in runs)).bytes)
        self._attended = self._cuda.allocate(aligned(8 * slots), "the numbers of slots")
        self._logits = self._cuda.allocate(self._logit_bytes, "the logits")
        decode_bytes = max(Packing(x.new).bytes for x in runs if x.phase == "decode")
        self._replay = Replay(engines, decode_bytes, self._logit_bytes)
        self._tail = min(x.new for x in runs if x.phase == "tail")
        self._count_slots(slots)

    def _count_slots(self, slots: int) -> None:
        counts = self._cuda.pinned(8 * slots)
        counts.bytes.view(np.int64)[:] = np.arange(slots)
        self._cuda.upload(self._attended, counts, 8 * slots)
        self._cuda.synchronize()
        self._cuda.free_pinned(counts)

    def slice_length(self, phase: Phase, past: int) -> int:
        del past
        if phase == "tail":
            return self._tail
        return 1 if phase == "decode" else self._engines.profile(phase).new

    def run(self, segments: Sequence[Segment]) -> list[Logits]:
        if any(segment.wanted > 1 for segment in segments):
            raise InputError("engines give the logits of the last token only")
        found = [self._enqueue(segment) for segment in segments]
        if any(found):
            self._cuda.synchronize()
        results = [self._copied(memory, segment.wanted) for memory, segment in zip(found, segments, strict=True)]
        for logits, segment in zip(results, segments, strict=True):
            require_numbers(logits, segment.phase, self._manifest)
        for segment in segments:
            segment.kv.append(segment.positions)
        return results

    def _copied(self, memory: Pinned | None, wanted: int) -> Logits:
        if memory is None:
            return np.zeros((0, self._logit_bytes // 4), np.float32)
        logits: Logits = memory.bytes.view(np.float32)[None, :][:wanted].copy()
        return logits

    def _enqueue(self, segment: Segment) -> Pinned | None:
        """Puts a segment's run on the stream; where its logits will be, if it gives any."""
        if segment.phase == "prefix":
            self._enqueue_prefix(segment)
            return None
        kv = _kv(segment)
        start, stop = kv.length, kv.length + len(segment)
        bucket = None if segment.phase == "chunk" else self._buckets.running(kv.room, stop)
        profile = self._engines.profile(segment.phase, bucket)
        _require_slots(profile, start, stop)
        kv.announce(segment.positions)
        if segment.phase == "decode":
            return self._enqueue_decode(segment, kv, profile)
        self._enqueue_run(segment, kv, profile)
        if not segment.wanted:
            return None
        logits = self._replay.of(kv.held).logits
        self._cuda.download(logits, self._logits, self._logit_bytes)
        return logits

    def _enqueue_prefix(self, segment: Segment) -> None:
        """Computes a head where chunks are computed, and brings it to its text."""
        text, span = _kv(segment), Span(segment.kv.length, segment.kv.length + len(segment))
        scratch = self._store.begin_chunk(text, 0, text, span)
        try:
            profile = self._engines.profile("prefix")
            _require_slots(profile, 0, len(segment))
            scratch.announce(segment.positions)
            self._enqueue_run(segment, scratch, profile)
            self._store.bring(scratch, 0, text, len(segment))
        finally:
            self._store.free(scratch)

    def _enqueue_run(self, segment: Segment, kv: DeviceKv, profile: ProfileInfo) -> None:
        packing, inputs = Packing(profile.new), self._inputs.next()
        packing.fill(inputs, segment.ids, segment.positions, segment.scales, kv.length)
        self._enqueue_engine(kv, profile, packing, inputs)

    def _enqueue_decode(self, segment: Segment, kv: DeviceKv, profile: ProfileInfo) -> Pinned:
        """One token, logits to the host included."""
        runs = self._replay.of(kv.held)
        packing = Packing(profile.new)
        packing.fill(runs.inputs, segment.ids, segment.positions, segment.scales, kv.length)

        def work() -> None:
            self._enqueue_engine(kv, profile, packing, runs.inputs)
            self._cuda.download(runs.logits, self._logits, self._logit_bytes)

        self._replay.decode(runs, profile.bucket or 0, work)
        return runs.logits

    def _enqueue_engine(self, kv: DeviceKv, profile: ProfileInfo, packing: Packing, inputs: Pinned) -> None:
        self._inputs.upload(inputs, packing.bytes)
        if kv.held.positions is not None:
            kv.held.positions.upload()
        self._engines.enqueue(profile.phase, profile.bucket, self._addresses(kv, packing))

    def _addresses(self, kv: DeviceKv, packing: Packing) -> dict[str, int]:
        """Where each input and output of an engine lies."""
        addresses = packing.addresses(self._inputs.address)
        addresses[ATTENDED], addresses[LOGITS] = self._attended, self._logits
        if kv.held.positions is not None:
            addresses[PAST_POSITION_IDS] = kv.held.positions.address
        for index, tensor in enumerate(kv.held.tensors):
            which, layer = divmod(index, self._layers)
            kind = KINDS[which]
            addresses[past_name(layer, kind)] = tensor.address
            addresses[present_name(layer, kind)] = tensor.address  # written in place
        return addresses

    def close(self) -> None:
        """Closes the engines, and frees all that is on the device."""
        self._replay.close()
        self._engines.close()


def _kv(segment: Segment) -> DeviceKv:
    assert isinstance(segment.kv, DeviceKv)
    return segment.kv


def _require_slots(profile: ProfileInfo, start: int, stop: int) -> None:
    """All tokens of a run, also those that fill it up, have a slot, and the real ones can be seen."""
    if start + profile.new > profile.slots or stop > profile.kv_length or stop - start > profile.new:
        raise BundleError(
            f"the {profile.phase} engine of {profile.bucket} chunks has {profile.slots} slots, {profile.kv_length} of "
            f"them seen, too few for tokens {start} to {start + profile.new - 1}; run `mesart build` again"
        )


__all__ = ["DeviceRunner"]
