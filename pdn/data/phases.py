"""Where each source stands when a phase begins, and how samples are found in a phase's order."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pdn.data.history import BEFORE_ANY, Cut, Law, chained, require_division
from pdn.data.order import Schedule
from pdn.data.sources import WindowSource
from pdn.errors import ConfigError


@dataclass(frozen=True)
class Order:
    """Orders the samples of one phase, or of several that only the batch tells apart.

    Attributes:
        first: the global sample that it begins with.
        cut: of all sources.
        sources: that it draws from.
        schedule: interleaves them.
        begins: the unit that each source begins with, all epochs counted.
        rows: of a batch. Row l of micro-step t takes window t mod R of segment t // R * rows + l,
            with R = `cut.segment_windows`; with R = 1 their number does not matter.
    """

    first: int
    cut: Cut
    sources: Sequence[WindowSource]
    schedule: Schedule
    begins: Sequence[int]
    rows: int = 1

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the source [N] and of its window [N] of global samples [N]."""
        micro_steps, rows = np.divmod(samples - self.first, self.rows)
        blocks, windows = np.divmod(micro_steps, self.cut.segment_windows)
        source, segment = self.schedule.locate(blocks * self.rows + rows)
        place = segment * self.cut.segment_windows + windows
        return source, place + np.array(self.begins, dtype=np.int64)[source] * self.cut.per_unit

    def reached(self, sample: int) -> list[int]:
        """Return for each source the window that it stands at before a global sample."""
        used = taken(self.schedule, sample - self.first, self.rows, self.cut.segment_windows)
        return [begin * self.cut.per_unit + n for begin, n in zip(self.begins, used, strict=True)]

    def window(self, sample: int) -> int:
        """Return which window of its segment a global sample is."""
        return (sample - self.first) // self.rows % self.cut.segment_windows

    def segment_end(self, sample: int) -> int:
        """Return the first global sample from ``sample`` on that begins segments of all rows."""
        block = self.rows * self.cut.segment_windows
        return sample + (self.first - sample) % block


def taken(schedule: Schedule, samples: int, rows: int, windows: int) -> list[int]:
    """Return how many of an order's first ``samples`` samples are of each source.

    Args:
        schedule: of the segments.
        samples: from the order's first on.
        rows: of a batch.
        windows: of a segment.
    """
    block, rest = divmod(samples, rows * windows)
    window, row = divmod(rest, rows)
    before = schedule.counts(block * rows)
    of_block = schedule.counts((block + 1) * rows) - before
    of_row = schedule.counts(block * rows + row) - before
    return (before * windows + of_block * window + of_row).tolist()


@functools.cache
def schedule_of(shares: tuple[tuple[str, int], ...]) -> Schedule:
    """Return the schedule of whole shares by name."""
    return Schedule({name: float(share) for name, share in shares})


def content_of(fingerprint: dict) -> str:
    """Digest what a source holds, by its own part of the data's fingerprint."""
    content = json.dumps(fingerprint, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def part_of(fingerprint: dict, name: str) -> dict:
    """Return the parts of a fingerprint that are of one source, without its name before them.

    Names may hold dots; parts have none.
    """
    split = {key: key.rpartition(".") for key in fingerprint}
    return {part: fingerprint[key] for key, (source, _, part) in split.items() if source == name}


def history_of(fingerprint: dict, global_batch_size: int) -> list[dict]:
    """Return the history of a run whose checkpoints are older than histories.

    Args:
        fingerprint: of its data.
        global_batch_size: of all its steps.
    """
    names = [key.removesuffix(".share") for key in fingerprint if key.endswith(".share")]
    batch = {"global_batch_size": global_batch_size, "lr_scale": 1.0}
    if not names:  # generated examples
        law = {**fingerprint, **batch}
        entry = {"first_step": 0, "first_sample": 0, "law": law, "order_first": 0}
        return [entry | {"fingerprint": chained(BEFORE_ANY, 0, law)}]
    sources = {}
    for name in names:
        part = part_of(fingerprint, name)
        share = part.pop("share")
        sources[name] = {"share": share, "content": content_of(part), "tokens": part.get("tokens")}
    law = {
        **{key: fingerprint[key] for key in ("order_version", "seed", "seq_len")},
        "unit_tokens": fingerprint["seq_len"],
        "pool_units": 1,
        "sources": sources,
        **batch,
    }
    return [
        {
            "first_step": 0,
            "first_sample": 0,
            "law": law,
            "order_first": 0,
            "begins": dict.fromkeys(names, 0),
            "opened": {},
            "skipped": {},
            "fingerprint": chained(BEFORE_ANY, 0, law),
        }
    ]


def shares_of(law: dict) -> tuple[tuple[str, int], ...]:
    """Return the whole shares of the sources of a recorded law."""
    return tuple(
        (name, int(part["share"].partition("/")[0])) for name, part in law["sources"].items()
    )


def cut_of(law: dict) -> Cut:
    """Return how a recorded law cuts the sources."""
    windows = law.get("carry_windows", 1)
    return Cut(law["seq_len"], law["unit_tokens"], law["pool_units"], windows)


def rows_of(law: dict) -> int:
    """Return the rows of a batch of a recorded law, as an `Order` has them."""
    return law.get("carry_rows", 1)


def stand(entry: dict, sample: int) -> dict[str, dict]:
    """Return how far every source of a path has been opened when a phase ends.

    Args:
        entry: of the phase in the history; its sources need not be open.
        sample: the first that the phase does not use.

    Returns:
        By content: `name`, the `unit_tokens` and `pool_units` that it was cut by, `opened`: the
        units up to the last one that was touched, and `tokens`: how many of its order were read or
        skipped. Units and tokens are counted over all epochs.
    """
    law, found = entry["law"], dict(entry["opened"])
    cut, shares = cut_of(law), shares_of(law)
    rows, windows = rows_of(law), cut.segment_windows
    read = sample - entry["order_first"]
    begun = -(-read // (rows * windows)) * rows * windows  # up to the end of segments that are open
    used, opened = (taken(schedule_of(shares), n, rows, windows) for n in (read, begun))
    for (name, _), count, reach in zip(shares, used, opened, strict=True):
        first = entry["begins"][name] * cut.per_unit
        found[law["sources"][name]["content"]] = {
            "name": name,
            "unit_tokens": cut.unit_tokens,
            "pool_units": cut.pool_units,
            "opened": -(-(first + reach) // cut.per_unit),
            "tokens": (first + count) * cut.seq_len,
        }
    return found


def begin(source: WindowSource, law: Law, known: dict | None) -> int:
    """Return the unit that a source begins a phase with: the first of its first unopened pool.

    Args:
        source: of the phase.
        law: of the phase.
        known: how far it was opened before, as `stand` gives it; None: not at all. Cut otherwise
            than now, it begins its next epoch.
    """
    if known is None or known["opened"] == 0:
        return 0
    then = Cut(law.seq_len, known["unit_tokens"], known["pool_units"])
    end = source.pool_end(known["opened"] - 1, then)
    if (then.unit_tokens, then.pool_units) == (law.unit_tokens, law.pool_units):
        return end
    before, now = source.count(then.unit_tokens), source.count(law.unit_tokens)
    if before is None or now is None:
        raise ConfigError(
            "DATA-UNIT",
            f"{source.name}: a stream whose end is not known cannot start its next epoch, which "
            f"data.unit_tokens = {law.unit_tokens} after {then.unit_tokens} asks for; expected "
            "the units of before, or another source",
        )
    return -(-end // before) * now


def require_new_tokens(law: Law, before: dict, *, repeat: bool) -> None:
    """Raise `ConfigError` if a phase's windows would hold tokens that this epoch has used.

    Args:
        law: of the phase.
        before: the record of the law until then.
        repeat: `data.repeat=allow`: the sources start their next epoch.
    """
    if repeat:
        return
    require_division(law)
    for key in ("unit_tokens", "pool_units"):
        if before[key] != getattr(law, key):
            raise ConfigError(
                "DATA-UNIT",
                f"data.{key} = {getattr(law, key)}, and {before[key]} until now; expected what the "
                "run began with, since another order of this epoch would repeat tokens. Leave it "
                "out; or start the next epoch with data.repeat=allow",
            )


def require_one_name(name: str, known: dict | None) -> None:
    """Raise `ConfigError` if a source comes again under another name: its order would start anew.

    Args:
        name: of the source now.
        known: how far it was opened before, as `stand` gives it; None: not at all.
    """
    if known is not None and known["name"] != name:
        raise ConfigError(
            "DATA-NAME",
            f"data.sources.{name}: holds the text that this run was trained on as {known['name']}; "
            f"expected that name, by which its order is kept: call it {known['name']}",
        )
