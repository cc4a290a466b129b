"""Optimiser steps from a counter: which samples a rank takes when, made ahead in the background."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pdn.data import ledger
from pdn.data.history import BEFORE_ANY, Law, begun, chained
from pdn.errors import DataError, DataStorageError
from pdn.wording import counted


class Batches(ABC):
    """Orders samples by nothing but the fingerprint and the history, and gives a rank its share.

    Sample i is a pure function of (fingerprint, history, i). A global batch is G consecutive
    samples; rank r of W takes the r-th of W contiguous slices. The state is the index of the next
    sample. Where windows continue each other, a step is `carry_horizon` micro-steps of a batch's
    rows, and a rank takes its slice of the rows of each.

    Args:
        config: a data config.
        global_batch_size: samples of a step over all ranks (G).
        rank, world_size: of this process among the data-parallel ones.
        checks: a `Verification` in the background, or None.
    """

    empty_ledger = ledger.EMPTY
    roll_ledger = staticmethod(ledger.roll)

    @property
    def validation_sets(self) -> tuple[str, ...]:
        """Return names of the validation sets beside the data's own."""
        return ()

    @property
    def validation_fingerprint(self) -> dict[str, str]:
        """Return what each validation set holds.

        Ranks that differ in it would evaluate different numbers of batches.
        """
        return {}

    def __init__(self, config, *, global_batch_size: int, rank: int, world_size: int, checks=None):
        self._config, self._rank, self._world = config, rank, world_size
        self._global = self._divisible(global_batch_size)
        self._horizon: int = getattr(config, "carry_horizon", None) or 1
        self.history: tuple[dict, ...] = ()
        """The phases so far, see `pdn.data.history`; none: the configuration's law from the start.
        """
        self._checks = checks
        self._pin = torch.cuda.is_available()
        self.seq_len: int = config.seq_len
        # windows of a segment; 1: every window is by itself
        self.windows_carried: int = getattr(config, "carry_windows", None) or 1

    def _divisible(self, global_batch_size: int) -> int:
        if global_batch_size % self._world:
            nearest = max(1, round(global_batch_size / self._world)) * self._world
            raise DataError(
                "BATCH-RANKS",
                f"global batch {global_batch_size} is not divisible by {self._world} data-parallel "
                f"ranks; nearest valid: {nearest}",
            )
        return global_batch_size

    # ------------------------------------------------------------ phases

    @abstractmethod
    def record(self, law: Law) -> dict:
        """Return a law as a history keeps it: JSON, with what the sources hold."""

    def recall(self, history: Sequence[dict]) -> None:
        """Take over the history in a checkpoint, whose later phases are forgotten."""
        self.history = tuple(history)
        if history:
            law = history[-1]["law"]
            self._global = law["global_batch_size"]
            self._horizon = self._global // law.get("carry_rows", self._global)

    def enter(self, first_step: int, first_sample: int, law: Law) -> None:
        """Begin a phase, unless its law is in force already.

        Iterators of earlier phases must have ended.

        Args:
            first_step: steps before the phase.
            first_sample: the phase's first sample: the one after the last that was used.
            law: of the phase.

        Raises:
            ConfigError: a source would repeat tokens within its epoch.
        """
        recorded = self.record(law)
        if self.history and self.history[-1]["law"] == recorded:
            return
        before = self.history[-1] if self.history else None
        order = self._order_of(before, first_sample, law, recorded)
        previous = before["fingerprint"] if before else BEFORE_ANY
        entry = {
            "first_step": first_step,
            "first_sample": first_sample,
            "law": recorded,
            **order,
            "fingerprint": chained(previous, first_step, recorded),
        }
        self._global = self._divisible(law.global_batch_size)
        self._horizon = law.carry_horizon
        self.history = (*self.history, entry)

    def _order_of(self, before: dict | None, first_sample: int, law: Law, recorded: dict) -> dict:
        """Return where the order of a phase begins: `order_first`, and more for sources."""
        return {"order_first": 0}

    def ahead(self, plan: Sequence[tuple[int, int, Law]]) -> Self:
        """Return these data for a plan's last phase: to check the plan, not to read."""
        return self

    def places(self, first: int, end: int) -> dict[str, list[int]]:
        """Return the part of each source's order that samples [first, end) take.

        In tokens from the source's beginning, all epochs counted; empty where nothing is ordered.
        """
        return {}

    def notes(self, step: int, first: int, end: int) -> dict:
        """Return what a ledger says of a step beside its samples: its phase, and its places.

        Args:
            step: of the run, from 1.
            first, end: its samples, half-open.
        """
        phases = begun(self.history, step)
        notes: dict = {"phase": len(phases) - 1}
        if places := self.places(first, end):
            notes["places"] = places
        phase = phases[-1]
        if phase["first_step"] == step - 1:
            # where the order goes on, as under another batch, nothing begins
            begins = phase["order_first"] == phase["first_sample"]
            kept = ("law", "begins", "skipped") if begins else ("law",)
            notes |= {key: phase[key] for key in kept if key in phase}
        return notes

    def window(self, sample: int) -> int:
        """Return which window of its segment a sample is; 0: it continues none."""
        return 0

    def segment_end(self, sample: int) -> int:
        """Return the first sample, from one that ends a step on, that continues none."""
        return sample

    def in_order(self, digests: Tensor) -> Tensor:
        """Return `sample_digests` of all ranks, rank 0's first, in the order of samples [G]."""
        return digests.view(self._world, self._horizon, -1).transpose(0, 1).flatten()

    @abstractmethod
    def samples(self, numbers: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return global samples `numbers` [A·M] as arrays of micro-batches of shape (A, M)."""

    @abstractmethod
    def epochs(self, samples: int) -> dict[str, float | None]:
        """Return the epochs of each source that the first `samples` samples make.

        None stands for a source whose end is not known.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop background work and close the files."""

    def check_epochs(self, stop_sample: int) -> None:
        """Refuse a plan that repeats a source more than `max_epochs` times."""
        for name, epochs in self.epochs(stop_sample).items():
            if epochs is not None and epochs > self._config.epochs_allowed:
                raise DataError(
                    "DATA-EPOCHS",
                    f"{name}: {counted(stop_sample, 'sample')} of {self.seq_len} tokens read "
                    f"it {epochs:.2f} times, data.max_epochs allows "
                    f"{self._config.epochs_allowed:g}; train fewer steps, give more data "
                    "(data=slimpajama, data.path=<text>), or raise data.max_epochs",
                )

    def check_health(self) -> None:
        """Raise what the verification in the background found wrong."""
        if self._checks is not None:
            self._checks.raise_if_failed()

    def check_unchanged(self) -> None:
        """Raise if what was read until now may not be the data that the run was begun with.

        A checkpoint keeps what it was trained on for good: it is not written before this.
        """
        self.check_health()

    def last_progress(self) -> float:
        """Return when something that samples wait for last moved on, in `time.monotonic` seconds.

        0 if nothing is waited for.
        """
        return 0.0

    def steps(
        self, next_sample: int, *, micro_batch_size: int, stop_sample: int | None
    ) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Yield this rank's part of each optimiser step from global sample `next_sample` on.

        Args:
            next_sample: the state: 0, or what the last committed step gave.
            micro_batch_size: samples of a micro-batch on this rank (M).
            stop_sample: the first sample not to be used; None goes on until `max_epochs`.

        Yields:
            A dict and the next state. With A = G / (W·M) micro-batches: `tokens`, `labels`
            [A, M, T] int64 (label −100: no target), the rows' first windows before their second
            ones; `sample_digests` [A, M] int64; and with document isolation `cu_seqlens` [A, L]
            int32 over the flattened M·T axis, L = M·(1 + (T−1) // isolation_min_tokens) + 1,
            padded by M·T.

        Raises:
            DataError: micro-batches do not divide the batch; the plan exceeds `max_epochs`; the
                data are damaged.
            DataStorageError: a step's data did not come within `timeout_seconds`.
        """
        batch = self._global
        per_rank = batch // self._world
        if per_rank % (micro_batch_size * self._horizon):
            per_rank //= self._horizon
            raise DataError(
                "BATCH-MICRO",
                f"{per_rank} rows a rank ({batch} samples over {self._world} ranks) are not "
                f"divisible by a micro-batch of {micro_batch_size}; nearest valid: "
                f"{_nearest_divisor(per_rank, micro_batch_size)}",
            )
        if stop_sample is not None:
            self.check_epochs(stop_sample)
        starts = self._starts(next_sample, stop_sample, batch)
        yield from self._prefetched(
            lambda start: self._step(start, batch, micro_batch_size), starts
        )

    def _starts(self, next_sample: int, stop_sample: int | None, batch: int) -> Iterator[int]:
        start = next_sample
        while stop_sample is None or start + batch <= stop_sample:
            if stop_sample is None:
                self.check_epochs(start + batch)
            yield start
            start += batch

    def _step(self, start: int, batch: int, micro_batch_size: int) -> tuple[dict[str, Tensor], int]:
        per_rank = batch // self._world
        rows, mine = batch // self._horizon, per_rank // self._horizon
        firsts = start + self._rank * mine + rows * np.arange(self._horizon)
        numbers = (firsts[:, None] + np.arange(mine)).reshape(-1)
        arrays = self.samples(numbers, (per_rank // micro_batch_size, micro_batch_size))
        self.check_epochs(start + batch)  # a stream's end may have become known only now
        return self._tensors(arrays), start + batch

    def _tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        tensors = {k: torch.from_numpy(v) for k, v in arrays.items()}
        return {k: v.pin_memory() for k, v in tensors.items()} if self._pin else tensors

    def _prefetched(self, make: Callable[[int], tuple], starts: Iterator[int]) -> Iterator[tuple]:
        """Yield items in order, made ahead by `workers` threads.

        The number of workers changes when an item is made, never what it holds.
        """
        if self._config.workers == 0:
            for start in starts:
                self.check_health()
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
        """Return the result of `future`.

        Waiting for a stream counts towards the timeout only while its tokeniser makes no progress.
        """
        self.check_health()
        began = time.monotonic()
        while True:
            try:
                return future.result(timeout=min(1.0, self._config.timeout_seconds))
            except FutureTimeout:
                if future.done():
                    raise
            still = time.monotonic() - max(began, self.last_progress())
            if still > self._config.timeout_seconds:
                raise DataStorageError(
                    "DATA-STALLED",
                    f"the next batch did not come within {still:.0f} s (data.timeout_seconds): the "
                    "disk, file server or source hangs; check it and start again: the run resumes "
                    "from its last checkpoint",
                )


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
