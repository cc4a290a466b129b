"""The training data as the trainer sees it: batches of tensors, a counter, a fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdn.data import order
from pdn.data.batches import Batches
from pdn.data.config import UNLIMITED
from pdn.data.pack import IGNORE, boundary_slots, digests, document_boundaries, pack
from pdn.data.shards import TOKENIZER
from pdn.data.sources import ValidationSet, WindowSource, count_of


class TrainingData(Batches):
    """Windows of text from one source or a mixture, and the validation set.

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
        used = self._schedule.counts(samples).tolist()
        found = {}
        for source, count in zip(self._sources, used):
            total = source.count(self.seq_len)
            found[source.name] = None if total is None else count / max(1, total)
        return found

    def describe(self, planned_samples: int | None = None) -> str:
        """Describe source, documents and tokens in a line for the log.

        Given the samples that the run will take, it compares planned with available tokens.
        """
        lines = []
        planned = (
            self._schedule.counts(planned_samples).tolist() if planned_samples is not None else None
        )
        epochs = self.epochs(planned_samples or 0)
        for j, source in enumerate(self._sources):
            known = epochs[source.name] is not None
            line = (
                f"{source.name}: {source.manifest.source.get('name')}, "
                f"{count_of(source.manifest.documents)}, "
                f"{source.manifest.tokens:,} tokens{'' if known else ' so far'}, vocabulary "
                f"{self.vocab_size:,}"
            )
            line += f" ({source.note})" if source.note else ""
            if planned is not None:
                line += f"; planned {planned[j] * self.seq_len:,} tokens"
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
        """Return the tokens, uint32 [N, T+1], of the global samples `samples` [N]."""
        source, place = self._schedule.locate(samples)
        out = np.empty((len(samples), self.seq_len + 1), dtype=np.uint32)
        for j in np.unique(source).tolist():
            mine = source == j
            out[mine] = self._sources[j].windows(place[mine], self.seq_len)
        return out

    def origin(self, sample: int) -> tuple[str, int, int | None]:
        """Return source, sample number within it, and epoch of a global sample.

        The epoch is None if the end of the source is not known.
        """
        source, place = self._schedule.locate(np.array([sample]))
        total = self._sources[source[0]].count(self.seq_len)
        return (
            self._sources[source[0]].name,
            int(place[0]),
            None if total is None else int(place[0]) // total,
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
            "tokens": tokens.reshape(*shape, self.seq_len),
            "labels": labels.reshape(*shape, self.seq_len),
        }
        if isolate:
            rows = tokens.reshape(-1, shape[-1], self.seq_len)
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
    ) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's validation batches, always the same ones.

        Every rank gets as many; they are filled up with label −100.

        Args:
            batch_size: samples of a batch on this rank (B).
            max_samples: of all ranks together; None takes all.
            name: one of `validation_sets`; None is the data's own validation set.
            spread: take `max_samples` evenly from the whole set, and not its first ones.

        Yields:
            `tokens`, `labels` [B, T] int64, and with document isolation `cu_seqlens` [L] int32 over
                the flattened B·T axis. Nothing if there is no validation set.
        """
        held_out = self._validation if name is None else self._named[name]
        if held_out is None:
            return
        places = held_out.places(self.seq_len, max_samples, spread=spread)
        for first in range(
            self._rank * batch_size, self._rank * batch_size + len(places), self._world * batch_size
        ):
            yield self._validation_batch(held_out, places[first : first + batch_size], batch_size)

    def _validation_batch(
        self, held_out: ValidationSet, places: np.ndarray, batch_size: int
    ) -> dict[str, Tensor]:
        windows, real = held_out.windows(
            np.pad(places, (0, batch_size - len(places)), constant_values=-1), self.seq_len
        )
        batch = self._tensors(self._arrays(windows, (batch_size,)))
        missing = torch.arange(self.seq_len)[None] >= torch.from_numpy(real)[:, None] - 1
        batch["labels"].masked_fill_(missing, IGNORE)
        return batch

    def cu_seqlens_length(self, rows: int) -> int:
        """Return L, the length of `cu_seqlens`, for a batch of `rows` samples."""
        return boundary_slots(rows, self.seq_len, self._config.isolation_min_tokens)

    def close(self) -> None:
        """Stop background work and close the files."""
        for source in [
            *self._sources,
            *([self._validation] if self._validation else []),
            *self._named.values(),
        ]:
            source.close()
        if self._checks is not None:
            self._checks.close()
