"""What a run was trained on so far, as a list of laws, each from a step on.

A law says which tokens the steps of a phase take. An entry of a history is a JSON object: the
phase's first step and sample (both counted from 0), its law, and where each source stood when the
phase's order began. Entries are chained by their fingerprints, so that a history that agrees in its
last one agrees in all before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pdn.errors import ConfigError

BEFORE_ANY = "0" * 32
"""The fingerprint before the first phase."""
_NOT_OF_THE_ORDER = ("global_batch_size", "lr_scale")


@dataclass(frozen=True)
class Law:
    """Says which tokens the steps of a phase take, as configured.

    Attributes:
        seq_len: tokens of a sample.
        global_batch_size: samples of a step.
        unit_tokens: U, tokens of the pieces that are permuted; a multiple of `seq_len`.
        pool_units: P, units of a pool, whose windows are permuted together.
        weights: of the sources that are drawn from, by name; None: those of the configuration.
        lr_scale: factor of all learning rates. The data do not depend on it.
        carry_windows: R, consecutive windows of a segment, which a row of the batch takes one after
            the other; 1: every window is by itself.
        carry_horizon: windows that a row takes in one step; divides R and the batch.
    """

    seq_len: int
    global_batch_size: int
    unit_tokens: int
    pool_units: int = 1
    weights: Mapping[str, float] | None = None
    lr_scale: float = 1.0
    carry_windows: int = 1
    carry_horizon: int = 1

    @property
    def rows(self) -> int:
        """Return the rows of a batch, each of which takes `carry_horizon` samples of a step."""
        return self.global_batch_size // self.carry_horizon


@dataclass(frozen=True)
class Cut:
    """Says how a source is cut: into units, these into segments and windows; see `Law`.

    Samples of a source are numbered by segments, in random order, and within these by windows.
    """

    seq_len: int
    unit_tokens: int
    pool_units: int = 1
    segment_windows: int = 1

    @classmethod
    def plain(cls, seq_len: int) -> Cut:
        """Return the cut whose units are the windows."""
        return cls(seq_len, seq_len)

    @property
    def per_unit(self) -> int:
        """Return the windows of a unit."""
        return self.unit_tokens // self.seq_len

    @property
    def of_segments(self) -> Cut:
        """Return the cut whose windows are the segments of this one."""
        return replace(self, seq_len=self.seq_len * self.segment_windows, segment_windows=1)

    def split(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the segments [N] of samples [N], and the tokens before each in its segment."""
        segments, windows = np.divmod(samples, self.segment_windows)
        return segments, windows * self.seq_len


def require_division(law: Law) -> None:
    """Raise `ConfigError` unless units hold whole windows, and whole segments of them."""
    segment = law.seq_len * law.carry_windows
    if law.unit_tokens % law.seq_len == 0 and law.unit_tokens % segment:
        raise ConfigError(
            "DATA-UNIT",
            f"data.carry_windows = {law.carry_windows} windows of data.seq_len = {law.seq_len} do "
            f"not divide the unit of this run's order, data.unit_tokens = {law.unit_tokens}, which "
            "is settled at its first step; expected segments that do: begin a run with "
            f"data.unit_tokens={segment}, or choose fewer windows",
        )
    if law.unit_tokens % law.seq_len:
        unit, length = law.unit_tokens, law.seq_len
        divisors = [d for d in range(2, unit + 1) if unit % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - length))[:3])
        raise ConfigError(
            "DATA-UNIT",
            f"data.seq_len = {length} does not divide the unit of this run's order, "
            f"data.unit_tokens = {unit}, which is settled at its first step; expected one of "
            f"{', '.join(map(str, near)) or unit}, since other windows would hold tokens that this "
            "epoch has used. Choose such a length; or begin a run with data.unit_tokens="
            f"{math.lcm(unit, length)}; or start the next epoch with data.repeat=allow",
        )


def order_of(law: dict) -> dict:
    """Return the part of a recorded law on which the order of the samples depends."""
    return {key: value for key, value in law.items() if key not in _NOT_OF_THE_ORDER}


def chained(previous: str, first_step: int, law: dict) -> str:
    """Return the fingerprint of a history that goes on with a law.

    Args:
        previous: fingerprint of the history before, `BEFORE_ANY` at the start.
        first_step: steps before the law holds.
        law: as recorded.

    Returns:
        128-bit BLAKE2b as 32 hex digits.
    """
    content = json.dumps([previous, first_step, law], sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def law_at(history: Sequence[dict], step: int) -> dict:
    """Return the recorded law of the step after `step` steps."""
    found = history[0]
    for entry in history:
        if entry["first_step"] <= step:
            found = entry
    return found["law"]


def begun(history: Sequence[dict], step: int) -> list[dict]:
    """Return the entries of which a step was taken among the first `step` ones."""
    return [entry for entry in history if entry["first_step"] < step]


def tokens_of(history: Sequence[dict], steps: int) -> int:
    """Return the tokens that the first `steps` steps of a history have trained on."""
    entries = begun(history, steps)
    ends = [entry["first_step"] for entry in entries[1:]] + [steps]
    return sum(
        (end - entry["first_step"]) * entry["law"]["global_batch_size"] * entry["law"]["seq_len"]
        for entry, end in zip(entries, ends)
    )
