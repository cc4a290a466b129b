"""Tasks at intervals of a training run, on the model as it is then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from pdn.distributed.collectives import gather_or_raise
from pdn.distributed.world import World
from pdn.errors import ConfigError, StorageError
from pdn.evals.config import EvalConfig
from pdn.evals.evaluation import Outcome, prepare, run, whole_model
from pdn.evals.probes.base import About, Subject
from pdn.evals.scoring import Scorer
from pdn.evals.suites import plan
from pdn.models.config import ModelConfig

SAMPLES = 4  # documents of each of lm-eval's tasks that loggers show
log = logging.getLogger(__name__)


class TaskEvaluation:
    """Evaluates the tasks that ``eval.suite`` and ``eval.tasks`` name; nothing if they name none.

    Construction finds out whether all names, packages and data are there, so that a run does not
    fail on them later.

    Args:
        tokenizer: path of the tokenizer.json, or None for data that are not text.
        seed: of the run.
        validation: see ``About.validation``.
        resuming: whether there is progress to continue; then tasks whose data are not to be had
            are no reason to stop, unless ``eval.on_error`` says so.

    Raises:
        ConfigError, StorageError: on every rank alike.
    """

    def __init__(
        self,
        config: EvalConfig,
        model_config: ModelConfig,
        world: World,
        *,
        tokenizer: Path | None,
        eos_id: int,
        seq_len: int,
        bf16: bool,
        validation: Callable[[dict, int, int | None], Iterator[dict[str, Tensor]]],
        seed: int,
        resuming: bool = False,
    ):
        self.config, self.world, self.bf16 = config, world, bf16
        self.about = About(
            config=model_config,
            tokenizer=tokenizer,
            eos_id=eos_id,
            seq_len=seq_len,
            validation=validation,
            seed=seed,
        )
        self.plan = None
        if config.suite is not None or config.tasks:
            self.plan = gather_or_raise(
                lambda: plan(suite=config.suite, tasks=config.tasks, data_dir=config.data_dir)
            )[world.world_rank]
            try:
                prepare(self.plan, self.about, print if world.is_main else None)
            except StorageError as error:
                if not resuming or config.on_error == "stop":
                    raise
                if world.is_main:
                    log.warning("%s\nThe run goes on without them (eval.on_error=continue)", error)

    def run(
        self, model: nn.Module, alive: Callable[[], None], check: Callable[[], None]
    ) -> Outcome:
        """Evaluate; collective.

        A sharded model is gathered into a copy on each rank first (4 bytes a parameter).

        Args:
            model: of the trainer.
            alive, check: see ``Scorer``.
        """
        assert self.plan is not None  # or nobody asks for it
        was_training = model.training
        try:
            whole = whole_model(model, self.about.config, self.world.device)
            whole.eval()
            scorer = Scorer(
                whole, self.world, max_length=self.about.seq_len, batch_size=self.config.batch_size,
                bf16=self.bf16,
                alive=alive, check=check,
            )  # fmt: skip
            return run(
                self.plan,
                Subject(scorer=scorer, **vars(self.about)),
                limit=self.config.limit,
                samples=SAMPLES,
            )
        finally:
            model.train(was_training)


def validation_batches(
    open_data: Callable, config, seed: int, world: World
) -> Callable[[dict, int, int | None], Iterator[dict[str, Tensor]]]:
    """Return ``About.validation`` of a data configuration.

    What it gives raises ConfigError, when it is called, for changes that the configuration cannot
    take.

    Args:
        open_data: ``pdn.data.open_data``.
        config: of the data, a pydantic model.
        seed: of the run.
        world: the ranks.
    """

    def batches(
        changes: dict, batch_size: int, max_samples: int | None
    ) -> Iterator[dict[str, Tensor]]:
        try:
            changed = type(config).model_validate(config.model_dump() | changes)
        except ValidationError as error:
            asked = ", ".join(f"{key} = {value}" for key, value in changes.items())
            reasons = "; ".join(
                found["msg"].removeprefix("Value error, ") for found in error.errors()
            )
            raise ConfigError(
                "EVAL-LENGTH",
                f"{asked}: {reasons}; expected other lengths, or another data configuration",
            ) from None
        return read(changed, batch_size, max_samples)

    def read(changed, batch_size: int, max_samples: int | None) -> Iterator[dict[str, Tensor]]:
        data = open_data(
            changed, global_batch_size=world.batch_ranks, seed=seed,
            rank=world.batch_rank, world_size=world.batch_ranks,
        )  # fmt: skip
        try:
            yield from data.validation(batch_size=batch_size, max_samples=max_samples)
        finally:
            data.close()

    return batches
