"""What a run evaluates, and when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pdn.config import Every, Strict


class EvalConfig(Strict):
    every: Every | None  # null: never
    at_start: bool
    batch_size: int = Field(ge=1)  # sequences per device
    # sequences of each validation set, spread evenly over it; null: all
    max_samples: int | None = Field(ge=1)
    suite: str | None  # tasks of configs/eval/suites; null: none
    tasks: list[str]  # more tasks, by name
    tasks_every: Every | None  # of the tasks; null: after the last step only
    limit: int | None = Field(ge=1)  # documents of each of lm-eval's tasks; null: all
    data_dir: str | None  # folder with local files of lm-eval's tasks; null: the Hugging Face hub
    on_error: Literal["continue", "stop"]  # what a failing evaluation does to the training

    @model_validator(mode="after")
    def _tasks_to_repeat(self):
        if self.tasks_every is not None and self.suite is None and not self.tasks:
            raise ValueError(
                f"tasks_every = {self.tasks_every.model_dump()} without suite and tasks; expected "
                "one of them, or null"
            )
        return self
