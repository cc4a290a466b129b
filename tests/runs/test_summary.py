"""What a run says of itself when it ends."""

import json

import pytest

from pdn.runs.summary import covered, summarise


def test_the_time_of_training_is_that_of_all_steps_not_of_those_logged(tmp_path):
    lines = [
        {"step": step, "loss": 2.0, "tokens": step, "tokens_per_second": 1.0, "step_seconds": 0.5}
        for step in (5, 10, 15, 18)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summarise(tmp_path)[0] == "steps    18 steps, 18 tokens, 9 s of training"


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        ([], []),
        ([3], [3]),
        ([1, 2, 3], [1, 1, 1]),
        ([5, 10, 12], [5, 5, 2]),
        ([450, 455], [5, 5]),  # a branch
        ([10, 20, 15, 20], [10, 10, 1, 5]),  # rewound
    ],
)
def test_a_logged_step_stands_for_those_since_the_one_before(steps, counts):
    assert covered(steps) == counts
