"""The training data as the trainer sees it: batches of tensors, a counter, a fingerprint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdn.data import order
from pdn.data.batches import Batches
from pdn.data.config import UNLIMITED
from pdn.data.history import Cut, Law, order_of, require_division
from pdn.data.pack import IGNORE, digests, document_boundaries, pack
from pdn.data.phases import (
    Order,
    begin,
    content_of,
    cut_of,
    require_new_tokens,
    require_one_name,
    rows_of,
    schedule_of,
    shares_of,
    stand,
)
from pdn.data.shards import TOKENIZER
from pdn.data.sources import ValidationSet, WindowSource
from pdn.wording import counted


class TrainingData(Batches):
    """Gives windows of text from one source or a mixture, and the validation set.

    Args:
        sources: by mixture order; one for everything but a mixture.
        schedule: interleaves them.
        validation: the validation set, or None.
        named: more validation sets.
        config: a data config of any kind but mqar.
        seed: of the order.
        global_batch_size, rank, world_size, checks: see `Batches`.
    """

    def __init__(
        self,
        sources: list[WindowSource],
        schedule: order.Schedule,
        validation: ValidationSet | None,
        named: dict[str, ValidationSet],
        config,
        *,
        global_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        checks=None,
    ):
        super().__init__(
            config,
            global_batch_size=global_batch_size,
            rank=rank,
            world_size=world_size,
            checks=checks,
        )
        self._sources, self._schedule, self._validation, self._named = (
            sources,
            schedule,
            validation,
            named,
        )
        self._ahead = False
        self._orders = (self._from_the_start(),)
        first = sources[0].manifest
        self.vocab_size: int = first.vocab_size
        self.eos_id: int = first.eos_id
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

    # ------------------------------------------------------------ phases

    def _from_the_start(self) -> Order:
        """Return the order of a run without a history."""
        windows = self._config.carry_windows or 1
        unit = self._config.unit_tokens or self.seq_len * windows
        cut = Cut(self.seq_len, unit, self._config.pool_units or 1, windows)
        begins = [0] * len(self._sources)
        rows = self._global // self._horizon if windows > 1 else 1
        return Order(0, cut, self._sources, self._schedule, begins, rows)

    def record(self, law: Law) -> dict:
        sources, schedule = self._drawn(law)
        shares = zip(sources, schedule.quota.tolist(), strict=True)
        return {
            "order_version": order.VERSION,
            "seed": self.fingerprint["seed"],
            "seq_len": law.seq_len,
            "unit_tokens": law.unit_tokens,
            "pool_units": law.pool_units,
            "sources": {
                source.name: {
                    "share": f"{quota}/{schedule.period}",
                    "content": content_of(source.fingerprint()),
                    "tokens": source.fingerprint().get("tokens"),
                }
                for source, quota in shares
            },
            "global_batch_size": law.global_batch_size,
            "lr_scale": law.lr_scale,
            **(
                {"carry_windows": law.carry_windows, "carry_rows": law.rows}
                if law.carry_windows > 1  # runs of before recorded none
                else {}
            ),
        }

    def _drawn(self, law: Law) -> tuple[list[WindowSource], order.Schedule]:
        if law.weights is None:
            return self._sources, self._schedule
        sources = [source for source in self._sources if source.name in law.weights]
        return sources, order.Schedule({s.name: law.weights[s.name] for s in sources})

    def recall(self, history: Sequence[dict]) -> None:
        super().recall(history)
        self._orders = self._orders_in(history)

    def _orders_in(self, history: Sequence[dict]) -> tuple[Order, ...]:
        """Return the orders of a history; those of sources that are not open are left out."""
        open_now = {source.name: source for source in self._sources}
        found: dict[int, Order] = {}
        for entry in history:
            law = entry["law"]
            if law["sources"].keys() <= open_now.keys():
                sources = [open_now[name] for name in law["sources"]]
                begins = [entry["begins"][source.name] for source in sources]
                first, schedule = entry["order_first"], schedule_of(shares_of(law))
                rows = rows_of(law)
                found[first] = Order(first, cut_of(law), sources, schedule, begins, rows)
        return tuple(found.values()) or (self._from_the_start(),)

    def enter(self, first_step: int, first_sample: int, law: Law) -> None:
        super().enter(first_step, first_sample, law)
        self._orders = self._orders_in(self.history)

    def _order_of(self, before: dict | None, first_sample: int, law: Law, recorded: dict) -> dict:
        sources = [source for source in self._sources if source.name in recorded["sources"]]
        if before is None:
            require_division(law)
            begins = {source.name: 0 for source in sources}
            return {"order_first": first_sample, "begins": begins, "opened": {}, "skipped": {}}
        if order_of(before["law"]) == order_of(recorded):
            return {key: before[key] for key in ("order_first", "begins", "opened", "skipped")}
        require_new_tokens(law, before["law"], repeat=self._config.repeat == "allow")
        known = stand(before, first_sample)
        begins, skipped = {}, {}
        for source in sources:
            stood = known.get(recorded["sources"][source.name]["content"])
            require_one_name(source.name, stood)
            begins[source.name] = self._begin(source, law, stood)
            if stood is not None:
                left = begins[source.name] * law.unit_tokens - stood["tokens"]
                skipped |= {source.name: left} if left > 0 else {}
        return {
            "order_first": first_sample,
            "begins": begins,
            "opened": known,
            "skipped": skipped,
        }

    def _begin(self, source: WindowSource, law: Law, stood: dict | None) -> int:
        if self._ahead and source.count(law.unit_tokens) is None:
            return stood["opened"] if stood else 0  # a stream's blocks are not known yet
        return begin(source, law, stood)

    def ahead(self, plan: Sequence[tuple[int, int, Law]]) -> TrainingData:
        """Return these data as they will be in the last phase of a plan: to check it, not to read.

        Args:
            plan: first step, first sample and law of the phases to come.

        Raises:
            ConfigError: a phase of the plan would be refused.
        """
        found = copy.copy(self)
        found._ahead = True
        for phase in plan:
            found.enter(*phase)
        return found

    def places(self, first: int, end: int) -> dict[str, list[int]]:
        found = self._order_at(first)
        length = found.cut.seq_len
        spans = zip(found.sources, found.reached(first), found.reached(end), strict=True)
        return {source.name: [a * length, b * length] for source, a, b in spans if b > a}

    def window(self, sample: int) -> int:
        return self._order_at(sample).window(sample)

    def segment_end(self, sample: int) -> int:
        return self._order_at(sample).segment_end(sample)

    def _order_at(self, sample: int) -> Order:
        return next(o for o in reversed(self._orders) if o.first <= sample or o is self._orders[0])

    @property
    def tokens_available(self) -> int | None:
        """Count the tokens of all sources that are known now.

        None while a source is still being read.
        """
        counts = [s.count(self.seq_len) for s in self._sources]
        return None if None in counts else sum(s.manifest.tokens for s in self._sources)

    def epochs(self, samples: int) -> dict[str, float | None]:
        """Return the epochs of each source that the first `samples` samples make.

        None stands for a source whose end is not known.
        """
        found: dict[str, float | None] = {source.name: 0.0 for source in self._sources}
        for orders in self._orders:
            stop = min([samples, *(o.first for o in self._orders if o.first > orders.first)])
            reached = orders.reached(max(stop, orders.first))
            for source, windows in zip(orders.sources, reached, strict=True):
                units = source.count(orders.cut.unit_tokens)
                total = None if units is None else units * orders.cut.per_unit
                found[source.name] = None if total is None else windows / max(1, total)
        return found

    def _planned(self, samples: int) -> dict[str, int]:
        """Return the tokens of each source among the first `samples` samples."""
        found = dict.fromkeys((source.name for source in self._sources), 0)
        for orders in self._orders:
            stop = min([samples, *(o.first for o in self._orders if o.first > orders.first)])
            spans = zip(orders.reached(orders.first), orders.reached(max(stop, orders.first)))
            for source, (first, end) in zip(orders.sources, spans, strict=True):
                found[source.name] += (end - first) * orders.cut.seq_len
        return found

    def describe(self, planned_samples: int | None = None) -> str:
        """Describe source, documents and tokens in a line for the log.

        Given the samples that the run will take, it compares planned with available tokens.
        """
        lines = []
        planned = None if planned_samples is None else self._planned(planned_samples)
        epochs = self.epochs(planned_samples or 0)
        for source in self._sources:
            known = epochs[source.name] is not None
            line = (
                f"{source.name}: {source.manifest.source.get('name')}, "
                f"{counted(source.manifest.documents, 'document')}, "
                f"{source.manifest.tokens:,} tokens{'' if known else ' so far'}, vocabulary "
                f"{self.vocab_size:,}"
            )
            line += f" ({source.note})" if source.note else ""
            if planned is not None:
                line += f"; planned {planned[source.name]:,} tokens"
                line += f" = {epochs[source.name]:.2f} epochs" if known else ""
                allowed = self._config.epochs_allowed
                line += f" (at most {allowed:g})" if known and allowed < UNLIMITED else ""
            lines.append(line)
        if self._validation is not None:
            lines[-1] += f"; validation {self._validation.describe()}"
        else:
            lines[-1] += "; no validation set of its own"
        lines += [f"validation set {name}: {held.describe()}" for name, held in self._named.items()]
        return "\n".join(lines)

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """Return the tokens, uint32 [N, T+1], of the global samples `samples` [N] of one order."""
        found = self._order_at(int(samples.min()))
        source, place = found.locate(samples)
        out = np.empty((len(samples), found.cut.seq_len + 1), dtype=np.uint32)
        for j in np.unique(source).tolist():
            mine = source == j
            out[mine] = found.sources[j].windows(place[mine], found.cut)
        return out

    def targets(self, samples: np.ndarray) -> list[tuple[str, int, int, int]]:
        """Return source, epoch and the half-open range of targets of each global sample [N].

        Targets are token offsets in the source; the samples are of one order.
        """
        found = self._order_at(int(samples.min()))
        source, place = found.locate(samples)
        epochs, firsts = np.empty_like(place), np.empty_like(place)
        for j in np.unique(source).tolist():
            mine = source == j
            epochs[mine], firsts[mine] = found.sources[j].starts(place[mine], found.cut)
        rows = zip(source.tolist(), epochs.tolist(), (firsts + 1).tolist(), strict=True)
        length = found.cut.seq_len
        return [(found.sources[j].name, epoch, first, first + length) for j, epoch, first in rows]

    def origin(self, sample: int) -> tuple[str, int, int | None]:
        """Return source, sample number within it, and epoch of a global sample.

        The epoch is None if the end of the source is not known.
        """
        found = self._order_at(sample)
        [j], [place] = (part.tolist() for part in found.locate(np.array([sample])))
        units = found.sources[j].count(found.cut.unit_tokens)
        return (
            found.sources[j].name,
            place,
            None if units is None else place // (units * found.cut.per_unit),
        )

    def samples(self, numbers: np.ndarray, shape: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return the arrays of global samples, as `Batches.samples` does.

        `tokens`, `labels` [A, M, T], `sample_digests` [A, M], isolated: `cu_seqlens` [A, L].
        """
        windows = self.windows(numbers)
        return {**self._arrays(windows, shape), "sample_digests": digests(windows).reshape(shape)}

    def _arrays(self, windows: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
        isolate = self._config.document_isolation
        tokens, labels = pack(windows, self.eos_id, isolate=isolate)
        arrays = {
            "tokens": tokens.reshape(*shape, -1),
            "labels": labels.reshape(*shape, -1),
        }
        if isolate:
            rows = tokens.reshape(-1, shape[-1], tokens.shape[-1])
            bounds = [
                document_boundaries(micro, self.eos_id, self._config.isolation_min_tokens)
                for micro in rows
            ]
            arrays["cu_seqlens"] = np.stack(bounds).reshape(*shape[:-1], -1)
        return arrays

    def last_progress(self) -> float:
        return max(s.last_progress for s in self._sources)

    @property
    def validation_fingerprint(self) -> dict[str, str]:
        sets = {"validation": self._validation} if self._validation else {}
        sets |= {f"validation_sets.{name}": held for name, held in self._named.items()}
        return {key: " ".join(m.content for m in held.manifests) for key, held in sets.items()}

    @property
    def validation_sets(self) -> tuple[str, ...]:
        return tuple(self._named)

    def validation(
        self,
        *,
        batch_size: int,
        max_samples: int | None,
        name: str | None = None,
        spread: bool = False,
        carried: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's validation batches, always the same ones.

        Every rank gets as many; they are filled up with label −100.

        Args:
            batch_size: samples of a batch on this rank (B).
            max_samples: of all ranks together; None takes all.
            name: one of `validation_sets`; None is the data's own validation set.
            spread: take `max_samples` evenly from the whole set, and not its first ones.
            carried: batches of rows that take the windows of segments one after the other, as
                training does: `windows_carried` batches, then other rows.

        Yields:
            `tokens`, `labels` [B, T] int64, and with document isolation `cu_seqlens` [L] int32 over
                the flattened B·T axis. Nothing if there is no validation set.
        """
        held_out = self._validation if name is None else self._named[name]
        if held_out is None:
            return
        count = self.windows_carried if carried else 1
        most = None if max_samples is None else max(1, max_samples // count)
        places = held_out.places(count * self.seq_len, most, spread=spread)
        for first in range(
            self._rank * batch_size, self._rank * batch_size + len(places), self._world * batch_size
        ):
            mine = places[first : first + batch_size]
            yield from self._validation_batches(held_out, mine, batch_size, count)

    def _validation_batches(
        self, held_out: ValidationSet, places: np.ndarray, batch_size: int, count: int
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the windows of segments `places`, which have `count` each, one after the other."""
        length = self.seq_len
        segments, real = held_out.windows(
            np.pad(places, (0, batch_size - len(places)), constant_values=-1), count * length
        )
        for first in range(0, count * length, length):
            windows = segments[:, first : first + length + 1]
            batch = self._tensors(self._arrays(windows, (batch_size,)))
            left = torch.from_numpy(real - first)[:, None]
            missing = torch.arange(length)[None] >= left - 1
            batch["labels"].masked_fill_(missing, IGNORE)
            yield batch

    def _opened(self) -> list[WindowSource | ValidationSet]:
        held_out = [self._validation] if self._validation else []
        return [*self._sources, *held_out, *self._named.values()]

    def check_unchanged(self) -> None:
        super().check_unchanged()
        for source in self._opened():
            source.check_unchanged()

    def close(self) -> None:
        """Stop background work and close the files."""
        for source in self._opened():
            source.close()
        if self._checks is not None:
            self._checks.close()
