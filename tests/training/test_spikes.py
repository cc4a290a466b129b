"""The detector of loss spikes alone; what the trainer does about them is in tests/faults."""

import math

from pdn.training.spikes import WINDOW, SpikeDetector


def judge(detector: SpikeDetector, losses) -> list[int]:
    return [i for i, loss in enumerate(losses) if detector.is_spike(loss)]


def falling(steps: int) -> list[float]:
    return [4.0 - 0.01 * step + 0.2 * math.sin(step) for step in range(steps)]


def test_only_losses_far_above_the_recent_median_are_spikes():
    losses = falling(200)
    losses[80] += 2.0
    losses[120] += 0.5
    assert judge(SpikeDetector(1.0), losses) == [80]


def test_without_a_threshold_nothing_is_a_spike():
    assert judge(SpikeDetector(None), [1.0] * 50 + [1e9]) == []


def test_a_spike_does_not_raise_the_median_and_the_next_one_is_found_too():
    assert judge(SpikeDetector(1.0), [2.0] * 20 + [9.0] * 40) == list(range(20, 60))


def test_the_first_steps_and_non_finite_losses_are_not_judged():
    assert judge(SpikeDetector(1.0), [9.0, 2.0, 9.0, 2.0]) == []
    detector = SpikeDetector(1.0)
    assert judge(detector, [2.0] * 20 + [math.nan, math.inf, 2.0]) == [21]
    assert all(math.isfinite(loss) for loss in detector.state())


def test_a_restored_detector_judges_as_the_first():
    losses = falling(300)
    losses[150] += 2.0
    whole, part = SpikeDetector(1.0), SpikeDetector(1.0)
    judge(part, losses[:140])
    resumed = SpikeDetector(1.0)
    resumed.load(part.state())
    assert len(part.state()) == WINDOW
    assert [140 + i for i in judge(resumed, losses[140:])] == judge(whole, losses) == [150]
