"""Loss spikes: noticed against the recent median, which a bad stretch of data moves little."""

import statistics
from collections import deque

WINDOW = 64  # steps of the median
_LEAST = 16  # steps before any is judged


class SpikeDetector:
    """Judges each loss against the median of the last ``WINDOW`` ones that were no spikes.

    Args:
        threshold: nats above that median from which a loss is a spike; None never finds one.
    """

    def __init__(self, threshold: float | None):
        self.threshold = threshold
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Return whether ``loss`` [nats] is a spike; otherwise it joins the window.

        Non-finite losses are the trainer's business.
        """
        if self.threshold is None:
            return False
        if len(self._recent) >= _LEAST and loss > statistics.median(self._recent) + self.threshold:
            return True
        if loss == loss and abs(loss) != float("inf"):
            self._recent.append(loss)
        return False

    def state(self) -> list[float]:
        """Return the state for the checkpoint: a resumed run judges as the uninterrupted one."""
        return list(self._recent)

    def load(self, state: list[float]) -> None:
        """Continue from what ``state`` returned."""
        self._recent = deque(state, maxlen=WINDOW)
