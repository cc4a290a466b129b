"""The training data as the trainer sees it: batches of tensors, a counter, a fingerprint."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import ledger, order
from data.errors import DataError, DataStorageError
from data.pack import IGNORE, boundary_slots, digests, document_boundaries, pack
from data.shards import TOKENIZER
from data.sources import ValidationSet, WindowSource

ORDER_CHUNK = 1024
"""Samples whose places are computed at once, so that small batches do not pay numpy's overhead one by one."""


class TrainingData:
    """Samples in an order that depends on nothing but the fingerprint, and the validation set.

    Sample i is a pure function of (fingerprint, i). Global batch b holds samples [b·G, (b+1)·G); rank r of W takes the
    r-th of W contiguous slices. The state is the index of the next sample.

    Args:
        sources: by mixture order; one for everything but a mixture.
        schedule: interleaves them.
        validation: the validation set, or None.
        config: a data config of any kind but mqar.
        global_batch_size: samples of a step over all ranks (G).
        seed: of the order.
        rank, world_size: of this process among the data-parallel ones.
        checks: background verification with `.raise_if_failed()`, or None.
    """

    empty_ledger = ledger.EMPTY
    roll_ledger = staticmethod(ledger.roll)

    empty_ledger = ledger.EMPTY
    roll_ledger = staticmethod(ledger.roll)

    def __init__(
        self,
        sources: list[WindowSource],
        schedule: order.Schedule,
        validation: ValidationSet | None,
        config,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        checks=None,
    ):
        if global_batch_size % world_size:
            nearest = max(1, round(global_batch_size / world_size)) * world_size
            raise DataError(
                "BATCH-RANKS",
                f"global batch {global_batch_size} is not divisible by {world_size} data-parallel ranks;"
                f" nearest valid: {nearest}",
            )
        self._sources, self._schedule, self._validation, self._config = sources, schedule, validation, config
        self._global, self._rank, self._world, self._checks = global_batch_size, rank, world_size, checks
        self._pin = torch.cuda.is_available()
        first = sources[0].manifest
        self.vocab_size: int = first.vocab_size
        self.eos_id: int = first.eos_id
        self.seq_len: int = config.seq_len
        self.tokenizer_path: Path = sources[0].directory / TOKENIZER
        self.fingerprint: dict[str, str | int | float | bool] = self._fingerprint(seed)

    def _fingerprint(self, seed: int) -> dict[str, str | int | float | bool]:
        first = self._sources[0].manifest
        parts: dict = {
            "order_version": order.VERSION,
            "seed": seed,
            "seq_len": self.seq_len,
            "document_isolation": self._config.document_isolation,
            "isolation_min_tokens": self._config.isolation_min_tokens,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "tokenizer": first.tokenizer.sha256,
        }
        for source, quota in zip(self._sources, self._schedule.quota.tolist()):
            parts[f"{source.name}.share"] = f"{quota}/{self._schedule.period}"
            parts.update({f"{source.name}.{k}": v for k, v in source.fingerprint().items()})
        return parts

    @property
    def tokens_available(self) -> int | None:
        """Tokens of all sources that are known now; None while a source is still being read."""
        counts = [s.count(self.seq_len) for s in self._sources]
        return None if None in counts else sum(s.manifest.tokens for s in self._sources)

    def epochs(self, samples: int) -> dict[str, float | None]:
        """Epochs of each source that the first `samples` samples make; None where the source's end is not known."""
        used = self._schedule.counts(samples).tolist()
        found = {}
        for source, count in zip(self._sources, used):
            total = source.count(self.seq_len)
            found[source.name] = None if total is None else count / max(1, total)
        return found

    def describe(self, planned_samples: int | None = None) -> str:
        """Source, documents, tokens, and, given the samples that the run will take, planned against available tokens."""
        lines = []
        planned = self._schedule.counts(planned_samples).tolist() if planned_samples is not None else None
        epochs = self.epochs(planned_samples or 0)
        for j, source in enumerate(self._sources):
            known = epochs[source.name] is not None
            line = (
                f"{source.name}: {source.manifest.source.get('name')}, {source.manifest.documents:,} documents, "
                f"{source.manifest.tokens:,} tokens{'' if known else ' so far'}, vocabulary {self.vocab_size:,}"
            )
            if planned is not None:
                line += f"; planned {planned[j] * self.seq_len:,} tokens"
                line += f" = {epochs[source.name]:.2f} epochs (at most {self._config.max_epochs:g})" if known else ""
            lines.append(line)
        if self._validation is not None:
            held = self._validation.manifests
            lines[-1] += f"; validation {sum(m.documents for m in held):,} documents, {sum(m.tokens for m in held):,} tokens"
        return "\n".join(lines)

    def check_epochs(self, stop_sample: int) -> None:
        """Refuse a plan that repeats a source more than `max_epochs` times."""
        for name, epochs in self.epochs(stop_sample).items():
            if epochs is not None and epochs > self._config.max_epochs:
                total = next(s.count(self.seq_len) for s in self._sources if s.name == name)
                raise DataError(
                    "DATA-EPOCHS",
                    f"{name}: {stop_sample} samples of {self.seq_len} tokens read it {epochs:.2f} times"
                    f" ({total:,} samples an epoch),"
                    f" data.max_epochs allows {self._config.max_epochs:g}; train fewer steps, give more data,"
                    f" or raise data.max_epochs",
                )

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """Tokens uint32 [N, T+1] of the global samples `samples` [N]."""
        source, place = self._schedule.locate(samples)
        out = np.empty((len(samples), self.seq_len + 1), dtype=np.uint32)
        for j in np.unique(source).tolist():
            mine = source == j
            out[mine] = self._sources[j].windows(place[mine], self.seq_len)
        return out

    def origin(self, sample: int) -> tuple[str, int, int | None]:
        """Source, sample number within it, and epoch (None if the end of the source is not known) of a global sample."""
        source, place = self._schedule.locate(np.array([sample]))
        total = self._sources[source[0]].count(self.seq_len)
        return self._sources[source[0]].name, int(place[0]), None if total is None else int(place[0]) // total

    def steps(
        self, next_sample: int, *, micro_batch_size: int, stop_sample: int | None
    ) -> Iterator[tuple[dict[str, Tensor], int]]:
        """This rank's part of each optimiser step from global sample `next_sample` on.

        Args:
            next_sample: the state: 0, or what the last committed step gave.
            micro_batch_size: samples of a micro-batch on this rank (M).
            stop_sample: the first sample not to be used; None goes on until `max_epochs`.

        Yields:
            a dict and the next state. With A = G / (W·M) micro-batches: `tokens`, `labels` [A, M, T] int64 (label −100:
            no target), `sample_digests` [A, M] int64, and with document isolation `cu_seqlens` [A, L] int32 over the
            flattened M·T axis, L = M·(1 + (T−1) // isolation_min_tokens) + 1, padded by M·T.

        Raises:
            DataError: micro-batches do not divide the batch; the plan exceeds `max_epochs`; the data are damaged.
            DataStorageError: a step's data did not come within `timeout_seconds`.
        """
        per_rank = self._global // self._world
        if per_rank % micro_batch_size:
            raise DataError(
                "BATCH-MICRO",
                f"{per_rank} samples a rank ({self._global} over {self._world} ranks) are not divisible by a micro-batch of"
                f" {micro_batch_size}; nearest valid: {_nearest_divisor(per_rank, micro_batch_size)}",
            )
        if stop_sample is not None:
            self.check_epochs(stop_sample)
        starts = self._starts(next_sample, stop_sample)
        yield from self._prefetched(lambda start: self._step(start, micro_batch_size), starts)

    def _starts(self, next_sample: int, stop_sample: int | None) -> Iterator[int]:
        start = next_sample
        while stop_sample is None or start + self._global <= stop_sample:
            if stop_sample is None:
                self.check_epochs(start + self._global)
            yield start
            start += self._global

    def _step(self, start: int, micro_batch_size: int) -> tuple[dict[str, Tensor], int]:
        per_rank = self._global // self._world
        first = start + self._rank * per_rank
        windows = self.windows(np.arange(first, first + per_rank))
        self.check_epochs(start + self._global)  # a stream's end may have become known only now
        shape = (per_rank // micro_batch_size, micro_batch_size)
        return self._batch(windows, shape, digests(windows)), start + self._global

    def _batch(self, windows: np.ndarray, shape: tuple[int, ...], sample_digests: np.ndarray | None) -> dict[str, Tensor]:
        isolate = self._config.document_isolation
        tokens, labels = pack(windows, self.eos_id, isolate=isolate)
        batch = {"tokens": tokens.reshape(*shape, self.seq_len), "labels": labels.reshape(*shape, self.seq_len)}
        if sample_digests is not None:
            batch["sample_digests"] = sample_digests.reshape(shape)
        if isolate:
            rows = tokens.reshape(-1, shape[-1], self.seq_len)
            bounds = [document_boundaries(micro, self.eos_id, self._config.isolation_min_tokens) for micro in rows]
            batch["cu_seqlens"] = np.stack(bounds).reshape(*shape[:-1], -1)
        tensors = {k: torch.from_numpy(v) for k, v in batch.items()}
        return {k: v.pin_memory() for k, v in tensors.items()} if self._pin else tensors

    def _prefetched(self, make: Callable[[int], tuple], starts: Iterator[int]) -> Iterator[tuple]:
        """Items in order, made ahead by `workers` threads; their number changes when, never what."""
        if self._config.workers == 0:
            for start in starts:
                self._raise_if_damaged()
                yield make(start)
            return
        pool = ThreadPoolExecutor(self._config.workers, thread_name_prefix="data")
        waiting: deque = deque()
        try:
            for start in starts:
                waiting.append(pool.submit(make, start))
                if len(waiting) > self._config.prefetch_steps:
                    yield self._wait(waiting.popleft())
            while waiting:
                yield self._wait(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, future):
        """The result of `future`; a wait for a stream counts only while its tokeniser makes no progress."""
        self._raise_if_damaged()
        began = time.monotonic()
        while True:
            try:
                return future.result(timeout=min(1.0, self._config.timeout_seconds))
            except FutureTimeout:
                if future.done():
                    raise
            still = time.monotonic() - max(began, *(s.last_progress for s in self._sources))
            if still > self._config.timeout_seconds:
                raise DataStorageError(
                    "DATA-STALLED",
                    f"the next batch did not come within {still:.0f} s (data.timeout_seconds): the disk, file server or source"
                    " hangs; check it and start again: the run resumes from its last checkpoint",
                )

    def _raise_if_damaged(self) -> None:
        if self._checks is not None:
            self._checks.raise_if_failed()

    def validation(self, *, batch_size: int, max_samples: int | None) -> Iterator[dict[str, Tensor]]:
        """This rank's validation batches, always the same ones; every rank gets as many, filled up with label −100.

        Args:
            batch_size: samples of a batch on this rank (B).
            max_samples: of all ranks together; None takes all.

        Yields:
            `tokens`, `labels` [B, T] int64, and with document isolation `cu_seqlens` [L] int32 over the flattened B·T axis.
            Nothing if there is no validation set.
        """
        if self._validation is None:
            return
        total = sum(self._validation.counts(self.seq_len))
        total = total if max_samples is None else min(total, max_samples)
        for first in range(self._rank * batch_size, self._rank * batch_size + total, self._world * batch_size):
            yield self._validation_batch(first, batch_size, total)

    def _validation_batch(self, first: int, batch_size: int, total: int) -> dict[str, Tensor]:
        windows, real = self._validation.windows(first, first + batch_size, self.seq_len)
        batch = self._batch(windows, (batch_size,), None)
        real = np.where(np.arange(first, first + batch_size) < total, real, 0)
        missing = torch.arange(self.seq_len)[None] >= torch.from_numpy(real)[:, None] - 1
        batch["labels"].masked_fill_(missing, IGNORE)
        return batch

    def cu_seqlens_length(self, rows: int) -> int:
        """L for a batch of `rows` samples."""
        return boundary_slots(rows, self.seq_len, self._config.isolation_min_tokens)

    def release(self, sample: int) -> None:
        """Tell that no kept checkpoint needs a sample before `sample`: streams evict what lies before it first."""
        for source, count in zip(self._sources, self._schedule.counts(sample).tolist()):
            source.release(count, self.seq_len)

    def close(self) -> None:
        """Stop background work and close the files."""
        for source in [*self._sources, *([self._validation] if self._validation else [])]:
            source.close()
        if self._checks is not None:
            self._checks.close()


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
