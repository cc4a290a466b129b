"""The rank that holds the others up and the step that took too long, named while the run goes on.

Ranks wait for each other in every step, so that all of them look equally slow from outside. Each
therefore measures what no other rank can delay, and what it measured travels in the exchange by
which the ranks agree on a signal to stop before every step. Nothing waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

PHASES = ("data", "launch", "between", "computing")
WINDOW = 16  # steps whose medians are compared
SLOW_RANK = 0.1  # of a step, for which the others wait; of the head, by which it is slower
REMEMBERED = 32  # steps that a step is compared with, at least a quarter of them
SLOW_STEP, SLOW_SECONDS = 2.0, 0.1  # times the median, and beyond it
STANDS_OUT = 1.2  # times what the others take, or the rank itself at other steps


class Pace:
    """Measures one rank's phases, and compares those of all ranks on the main one.

    A rank's phases are ``data``, fetching a batch; ``launch``, the host's part of the step, which
    on a CPU is all of it, waits included; ``between``, saving, evaluating and logging; and
    ``computing``, the head and its loss: the same work on every rank, in which it talks to none.

    Args:
        rank: of this process, among so many ``ranks``.
        device: that the head is computed on; its time there is known once the step's numbers are.
        clock: seconds, ascending.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.rank, self.ranks, self._clock = rank, ranks, clock
        self._on_gpu = device.type == "cuda"
        self._phase, self._since = None, clock()
        self._own: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._head: list[float] = []  # when it began
        self._events: deque[tuple[int, list[torch.cuda.Event]]] = deque()  # by step
        self._step = 0  # that is being launched
        self._rounds: list[np.ndarray] = []  # [phases, ranks] each, since the last comparison
        self._durations: list[float] = []
        self._heard_at: float | None = None
        self._by_step: dict[int, dict[str, np.ndarray]] = {}  # phase -> [ranks]
        self._usual: deque[dict[str, np.ndarray]] = deque(maxlen=REMEMBERED)
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._unjudged: deque[tuple[int, float]] = deque()
        self._excused = -1  # the step that is launched beside the copies of a checkpoint
        self._quiet_until, self._unsaid = 0, 0  # of slow steps: by step, and how many since
        self._standing: tuple[int, str] | None = None  # what the last comparison found
        self._named: tuple[int, str] | None = None  # what was said, and holds still
        self._values: dict[str, float | str] = {}

    # ------------------------------------------------------------ on every rank

    def enter(self, phase: str | None, step: int | None = None) -> None:
        """End the present phase and begin another; None: what is not to be counted.

        Args:
            phase: of ``PHASES``.
            step: that is launched, if that begins.
        """
        now = self._clock()
        if self._phase is not None:
            self._own[self._phase] += now - self._since
        self._phase, self._since = phase, now
        self._step = self._step if step is None else step

    def watch_head(self, model: nn.Module) -> None:
        """Measure the head of ``model``, a ``LanguageModel``, while steps are launched."""
        if self.ranks > 1:
            norm = model.norm  # after it come the head and the loss
            assert isinstance(norm, nn.Module)
            norm.register_forward_hook(lambda *_: self._mark(True))
            model.register_forward_hook(lambda *_: self._mark(False))

    def _mark(self, begins: bool) -> None:
        if self._phase != "launch":
            return
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            if begins:
                self._events.append((self._step, [event]))
            elif self._events:
                self._events[-1][1].append(event)
        elif begins:
            self._head = [self._clock()]
        elif self._head:
            self._own["computing"] += self._clock() - self._head.pop()

    def settled(self, step: int, seconds: float) -> None:
        """Tell that the numbers of a step were read, and how long it took."""
        while self._events and self._events[0][0] <= step:
            _, marks = self._events.popleft()
            if len(marks) == 2:  # both are past: the step's numbers came after them
                self._own["computing"] += marks[0].elapsed_time(marks[1]) / 1e3
        if step != self._excused:
            self._unjudged.append((step, seconds))

    def excuse(self) -> None:
        """Tell that a checkpoint was begun, whose copying the next step is not to be blamed for."""
        self._excused = self._step + 1

    def report(self) -> list[float]:
        """Return what this rank has to say, for an exchange that takes the largest of each."""
        self.enter(None)
        said = np.zeros((len(PHASES), self.ranks))
        said[:, self.rank] = list(self._own.values())
        self._own = dict.fromkeys(PHASES, 0.0)
        return said.ravel().tolist()

    # ------------------------------------------------------------ on the main rank

    def hear(self, step: int, heard: Sequence[float]) -> list[str]:
        """Take what all ranks reported; return what there is to say about them.

        Args:
            step: that comes next, whose batch they fetched.
            heard: of the exchange.
        """
        if self.rank != 0:
            return []
        times = np.array(heard).reshape(len(PHASES), self.ranks)
        now = self._clock()
        if self._heard_at is not None:
            self._durations.append(now - self._heard_at)
            self._rounds.append(times)
        self._heard_at = now
        self._by_step.setdefault(step, {})["data"] = times[0]
        self._by_step.setdefault(step - 1, {}).update(launch=times[1], between=times[2])
        said = [text for text in (self._slow_rank(), *self._slow_steps(step - 1)) if text]
        if said:
            self._values["pace/alarm"] = "; ".join(said)
        return said

    def take(self) -> dict[str, float | str]:
        """Return what is to be logged with a step.

        ``pace/slowest``, the rank for which the others wait longest, and ``pace/lost``, the share
        of a step that it costs, or by which it computes slower, over the last ``WINDOW`` steps; and
        ``pace/alarm``, what ``hear`` said since the last call.
        """
        values, self._values = dict(self._values), dict(self._values)
        self._values.pop("pace/alarm", None)
        return values

    def _slow_rank(self) -> str | None:
        if self.ranks == 1 or len(self._rounds) < WINDOW:
            return None
        rounds = np.stack(self._rounds)  # [rounds, phases, ranks]
        own, step = np.median(rounds, 0), statistics.median(self._durations)
        self._rounds.clear()
        self._durations.clear()
        usual = np.sort(own, 1)[:, (self.ranks - 1) // 2, None]
        lost = (own - usual) / step
        head = PHASES.index("computing")
        lost[head] = self._slower(rounds[:, head])
        phase, rank = (int(i) for i in np.unravel_index(np.argmax(lost), lost.shape))
        self._values |= {"pace/slowest": rank, "pace/lost": round(float(lost[phase, rank]), 4)}
        found = (rank, PHASES[phase]) if lost[phase, rank] >= SLOW_RANK else None
        before, self._standing = self._standing, found
        if found == self._named:
            return None
        self._named = None
        if found is None or (phase == head and found != before):
            return None
        self._named = found
        times = f"{own[phase, rank]:.3g} s"
        if phase == head:
            return (
                f"rank {rank} computes at least {lost[head, rank]:.0%} slower than the others in "
                f"three quarters of the steps: its head and loss take {times}, usually "
                f"{usual[head, 0]:.3g} s"
            )
        more = own[phase, rank] / max(usual[phase, 0], 1e-9)
        return (
            f"rank {rank} holds the others up by {lost[phase, rank]:.0%} of a step: its "
            f"{PHASES[phase]} takes {times}, {more:.3g} times that of the others"
        )

    def _slower(self, heads: np.ndarray) -> np.ndarray:
        """Return by which share each rank computes slower than is usual in the same step, [ranks].

        The head stands for all of a rank's computation, but is so short that on a busy host its
        times scatter: what counts is the share that three quarters of the steps exceed. Of ranks
        that are alike, with times that scatter by 30 %, two comparisons in a row then name the same
        one in less than one of 4,000 pairs; by their medians, half of all comparisons named one.

        Args:
            heads: seconds [steps, ranks].
        """
        usual = np.sort(heads, 1)[:, (self.ranks - 1) // 2, None]
        more = np.divide(heads, usual, out=np.ones_like(heads), where=usual > 0) - 1
        return np.quantile(more, 0.25, axis=0)

    def _slow_steps(self, upto: int) -> list[str]:
        """Judge the steps all of whose phases have been heard.

        On a busy host they come in rows: those of the next ``REMEMBERED`` steps are counted only.
        """
        found = []
        while self._unjudged and self._unjudged[0][0] <= upto:
            step, seconds = self._unjudged.popleft()
            phases = self._by_step.pop(step, {})
            usual = statistics.median(self._seconds) if self._seconds else seconds
            if (
                len(self._seconds) >= REMEMBERED // 4
                and seconds > SLOW_STEP * usual
                and seconds > usual + SLOW_SECONDS
            ):
                if step < self._quiet_until:
                    self._unsaid += 1
                else:
                    more = f"; {self._unsaid} more since the last alarm"
                    found.append(
                        f"step {step} took {seconds:.3g} s, usually {usual:.3g} s: "
                        + self._reason(phases, seconds - usual) + more * (self._unsaid > 0)
                    )  # fmt: skip
                    self._quiet_until, self._unsaid = step + REMEMBERED, 0
            else:
                self._usual.append(phases)
            self._seconds.append(seconds)
        for old in [step for step in self._by_step if step < upto - REMEMBERED]:
            del self._by_step[old]
        return found

    def _reason(self, phases: dict[str, np.ndarray], excess: float) -> str:
        """Name the phase that took at least half of the excess, and its rank."""
        for phase, times in phases.items():
            before = [known[phase] for known in self._usual if phase in known]
            rank = int(np.argmax(times))
            usual = float(np.median([own[rank] for own in before])) if before else 0.0
            if times[rank] - usual < excess / 2:
                continue
            others = np.delete(times, rank)
            alone = self.ranks > 1 and times[rank] > STANDS_OUT * others.max()
            where = f"rank {rank}" if alone or self.ranks == 1 else "all ranks"
            return f"{where}, {phase} {times[rank]:.3g} s, usually {usual:.3g} s"
        return "no host took longer: on the devices, or between them"
