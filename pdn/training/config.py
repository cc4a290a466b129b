"""The whole configuration of a run: typed, strict, and checked across fields before the start.

Hydra composes YAML into a plain dict; ``RunConfig.model_validate`` parses it. Every key is visible
in ``configs/`` with its unit; each package owns the part that it reads. A field has a default only
if it is younger than runs that were recorded without it: the default does what those runs did, so
that they keep their names and may be continued.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from pdn.checkpoint.config import CheckpointConfig
from pdn.config import Every, Positive, Steps, Strict, leaves
from pdn.data.config import DataConfig
from pdn.distributed.config import ParallelConfig
from pdn.evals.config import EvalConfig
from pdn.logging.config import LoggerConfig
from pdn.models.config import DESCRIPTION, ModelConfig
from pdn.optim.config import OptimConfig, ScheduleConfig
from pdn.store.s3 import problem_of_url
from pdn.training.control import control_problem
from pdn.training.limits import excesses, misplaced, no_place

PROFILED_STEPS = 100  # at most
ATTENTION = "attention"  # the kind of mixers whose state grows with the tokens


class OpsConfig(Strict):
    backend: Literal["auto", "reference", "chunkwise", "triton", "fla"]


class ProfileConfig(Strict):
    """Tells which steps of a run are profiled."""

    steps: Annotated[list[Annotated[int, Field(ge=3)]], Field(min_length=2, max_length=2)]

    @field_validator("steps")
    @classmethod
    def _a_few_in_order(cls, steps: list[int]) -> list[int]:
        first, last = steps
        if not first <= last < first + PROFILED_STEPS:
            raise ValueError(
                f"found {steps}; expected the first step and the last, at most {PROFILED_STEPS} in "
                "all: every operator of theirs is recorded"
            )
        return steps


class TrainerConfig(Strict):
    steps: Steps  # the schedule's horizon
    stop_at: Steps | None  # end this launch early, after this many steps in total
    global_batch_size: int = Field(ge=1)  # sequences per optimiser step, over all devices
    micro_batch_size: int = Field(ge=1)  # sequences per device and forward pass
    grad_clip: Positive  # of the global gradient norm
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "bf16"]  # of compute; parameters and reductions are float32
    deterministic: bool
    log_every: Every
    # seconds without a finished step before the run gives up and names the slow rank
    stall_timeout: Positive
    divergence_check_every: Every | None  # compare the parameters of replicas; null: never
    # nats above the recent median loss: rewind and skip that data; null: never
    spike_threshold: Positive | None
    dry_run: bool
    telemetry_every: Every | None = None  # describe recurrences and updates; null: never
    profile: ProfileConfig | None = None  # which steps are profiled; null: none
    # of a sequence, in memory at a time; longer ones are taken in pieces of it; null: the whole
    piece_tokens: Annotated[int, Field(ge=1)] | None = None
    z_loss: float = Field(ge=0, default=0.0)  # times the squared logsumexp of the logits; 0: none


class PhaseConfig(Strict):
    """Tells what holds until a step; null: what the run says outside of ``phases``."""

    until: Every | None = None  # the step that it ends with, or {tokens: n}; null: the run's last
    # of data.sources; those not named rest
    weights: dict[str, Annotated[Positive, Field(le=1e12)]] | None = None
    seq_len: Annotated[int, Field(ge=2)] | None = None  # tokens of a sample
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    lr_scale: Positive | None = None  # of the learning rates that the schedule gives

    @field_validator("until")
    @classmethod
    def _at_a_step(cls, until: Every | None) -> Every | None:
        if until is not None and until.seconds is not None:
            raise ValueError("found seconds; expected steps or {tokens: n}, counted from step 0")
        return until


class RunConfig(Strict):
    name: str | None  # of the run's directory; null: model, data and a hash of what defines the run
    seed: int = Field(ge=0, lt=2**31)  # of the initialisation; of the order without data.seed
    output_dir: str = Field(min_length=1)
    # s3://bucket/prefix, below which the run has a copy of its own; null: none
    replica: Annotated[str, Field(min_length=1)] | None = None
    resume: Annotated[str, Field(pattern=r"^(auto|never|restart|step:\d+)$")]
    # a checkpoint or an exported folder to take the weights from
    init_from: Annotated[str, Field(min_length=1)] | None
    # same: those weights must have been trained with the data's tokenizer
    init_tokenizer: Literal["same", "any"] = "same"
    # a checkpoint of another run to go on from, with its optimiser and its place in the data
    branch_from: Annotated[str, Field(pattern=r"^.+@\d{1,12}$")] | None = None
    phases: list[PhaseConfig] | None = None  # what holds for a part of the run only, in order
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    eval: EvalConfig
    logger: LoggerConfig
    ops: OpsConfig

    @field_validator("name")
    @classmethod
    def _stays_below_output_dir(cls, name: str | None) -> str | None:
        if name is not None and (
            name != name.strip() or not name.isprintable() or {"", ".", ".."} & set(name.split("/"))
        ):
            raise ValueError(
                f"found {name!r}; expected the name of a directory below output_dir, without .., "
                "line breaks, spaces at its ends"
            )
        if name is not None and (name.startswith("~") or no_place(name) is not None):
            raise ValueError(
                f"found {name!r}, a place of its own; expected the name of a directory below "
                "output_dir: give the place as output_dir"
            )
        return name

    @field_validator("replica")
    @classmethod
    def _is_a_place_in_a_bucket(cls, replica: str | None) -> str | None:
        problem = None if replica is None else problem_of_url(replica)
        if problem is not None:
            raise ValueError(f"found {replica!r}: {problem}")
        return replica

    @model_validator(mode="after")
    def _within_limits(self):
        dump = self.model_dump(mode="json")
        problems = [*excesses(dump), *misplaced(dump)]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _fits_together(self):
        t = self.trainer
        if self.schedule.warmup_steps + self.schedule.decay_steps > t.steps:
            raise ValueError(
                "schedule.warmup_steps + schedule.decay_steps = "
                f"{self.schedule.warmup_steps + self.schedule.decay_steps} exceed trainer.steps = "
                f"{t.steps}; expected at most that: shorten the phases, or keep trainer.steps and "
                "end early with trainer.stop_at"
            )
        if t.stop_at is not None and t.stop_at > t.steps:
            raise ValueError(
                f"trainer.stop_at = {t.stop_at} exceeds trainer.steps = {t.steps}; expected at "
                "most that"
            )
        if t.global_batch_size % t.micro_batch_size:
            raise ValueError(
                _not_divisible(t.global_batch_size, t.micro_batch_size, "trainer.micro_batch_size")
            )
        if self.data.seq_len % self.parallel.context:
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} is not divisible by parallel.context = "
                f"{self.parallel.context}; expected pieces of one length: another of the two"
            )
        return self

    @model_validator(mode="after")
    def _rates_have_a_rule_for_the_width(self):
        for key in ("base_width", "base_depth"):
            base = getattr(self.model, key)
            if base is not None and self.optim.kind == "muon":
                raise ValueError(
                    f"model.{key} = {base} with optim = muon; expected optim = adamw, whose rates "
                    f"have rules for other sizes, or model.{key} = null"
                )
        return self

    @model_validator(mode="after")
    def _another_implementation_can_run_it(self):
        problem = control_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _states_can_be_carried(self):
        problem = carry_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _sequences_can_be_cut(self):
        problem = piece_problem(self) or tap_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _phases_fit(self):
        if self.branch_from is not None and self.init_from is not None:
            raise ValueError(
                "branch_from and init_from are both given; expected one: a branch has the weights "
                "of its parent"
            )
        for number, phase in enumerate(self.phases or []):
            problem = phase_problem(self, phase, number == len(self.phases or []) - 1)
            if problem is not None:
                raise ValueError(f"phases[{number}]: {problem}")
        ends = [p.until.steps for p in self.phases or [] if p.until and p.until.steps is not None]
        if any(later <= end for end, later in itertools.pairwise(ends)):
            raise ValueError(
                f"phases: they are until steps {', '.join(map(str, ends))}; expected later ones "
                "from phase to phase"
            )
        return self

    @property
    def data_seed(self) -> int:
        """Return the seed of the samples' order.

        It is ``data.seed`` where given: runs of several ``seed`` share it.
        """
        return self.seed if self.data.seed is None else self.data.seed

    def check_world_size(self, world_size: int) -> None:
        """Raise ValueError unless the global batch divides into whole micro-batches of ranks.

        That of every phase.
        """
        if self.model.implementation != "own" and world_size > 1:
            raise ValueError(
                f"model.implementation = {self.model.implementation} with {world_size} processes: "
                "its class is not sharded here; expected one process"
            )
        for phase in self.phases or []:
            if phase.global_batch_size or phase.micro_batch_size:
                self.in_phase(phase).check_world_size(world_size)
        t, p = self.trainer, self.parallel
        ranks = max(1, world_size // p.context)  # with samples of their own
        horizon = getattr(self.data, "carry_horizon", None) or 1
        if t.global_batch_size % (t.micro_batch_size * ranks * horizon):
            processes = "processes" if p.context == 1 else f"groups of {p.context} processes"
            unit = f"trainer.micro_batch_size x {ranks} {processes}"
            unit += f" x data.carry_horizon = {horizon}" if horizon > 1 else ""
            ranks *= horizon
            message = _not_divisible(t.global_batch_size, t.micro_batch_size * ranks, unit)
            if t.global_batch_size % ranks == 0:
                share = t.global_batch_size // ranks
                largest = next(
                    size
                    for size in range(min(t.micro_batch_size, share), 0, -1)
                    if share % size == 0
                )
                message += f", or trainer.micro_batch_size={largest}"
            raise ValueError(message)
        p.dims(world_size)

    def in_phase(self, phase: PhaseConfig) -> RunConfig:
        """Return the configuration of a run that is like a phase from its start to its end."""
        t = self.trainer
        trainer = t.model_copy(
            update={
                "global_batch_size": phase.global_batch_size or t.global_batch_size,
                "micro_batch_size": phase.micro_batch_size or t.micro_batch_size,
            }
        )
        data = self.data.model_copy(update={"seq_len": phase.seq_len or self.data.seq_len})
        return self.model_copy(update={"trainer": trainer, "data": data, "phases": None})

    def every_phase(self) -> list[RunConfig]:
        """Return the configurations of ``in_phase`` of all phases, and this one."""
        return [*(self.in_phase(phase) for phase in self.phases or []), self]

    def identity(self) -> dict:
        """Return what defines the run's result.

        The default name hashes it, and a resume is refused where it differs; but for ``phases``,
        of which those that have begun are compared.

        Not in it: where the run ends this time, intervals, logging, evaluation, parallelism,
            directories.
        """
        phases = self.model_dump(mode="json", include={"phases"}, exclude_none=True)
        found = phases | self._defining(
            self.model.computation(), self.optim.model_dump(mode="json", exclude_defaults=True)
        )
        if not self.trainer.z_loss:  # runs of before recorded none
            del found["trainer"]["z_loss"]
        return found

    def _defining(self, model: dict, optim: dict) -> dict:
        dump = self.model_dump(mode="json")
        kept = ("global_batch_size", "grad_clip", "precision", "z_loss")
        if self.schedule.ends_by_steps:
            kept = ("steps", *kept)
        trainer = {key: dump["trainer"][key] for key in kept}
        whole = {key: dump[key] for key in ("seed", "init_from", "schedule")}
        if self.branch_from is not None:  # runs of before recorded none
            whole["branch_from"] = self.branch_from
        return whole | {
            "optim": optim,
            "model": model,
            "data": self.data.identity(),
            "trainer": trainer,
        }

    def may_change(self) -> set[str]:
        """Return the dotted keys that a later launch of the same run may set otherwise.

        They are all that ``identity`` leaves out, but keys of model and optimiser at their
        defaults. Of a section or group that it leaves out, the name of that, for keys of other
        versions too.
        """
        dump = self.model_dump(mode="json")
        model = {key: value for key, value in dump["model"].items() if key not in DESCRIPTION}
        defining = self._defining(model, dump["optim"])
        groups = {
            f"{section}.{key}"
            for section, values in defining.items()
            if isinstance(values, dict)
            for key in dump[section].keys() - values
        }
        free = {key for key, _ in leaves(dump)} - {key for key, _ in leaves(defining)}
        operational = {f"data.{key}" for key in self.data.operational}
        return free | groups | (dump.keys() - defining) | operational

    @staticmethod
    def completed(recorded: dict) -> dict:
        """Add to a recorded configuration the defining keys that it is older than.

        They are of the model, the optimiser and ``trainer``, and get the values that it ran with; a
        configuration of another kind stays as it is.
        """
        try:
            model = ModelConfig.model_validate(recorded["model"])
            optim = TypeAdapter(OptimConfig).validate_python(recorded["optim"])
            trainer = {"z_loss": 0.0} | recorded["trainer"]
        except (KeyError, TypeError, ValueError):
            return recorded
        return recorded | {
            "model": model.model_dump(mode="json"),
            "optim": optim.model_dump(mode="json"),
            "trainer": trainer,
        }


def phase_problem(config: RunConfig, phase: PhaseConfig, last: bool) -> str | None:
    """Return what is wrong with one of the phases of a run; None if nothing is."""
    if phase.until is None and not last:
        return "until is null; expected a step: only the last phase lasts to the end"
    t = config.in_phase(phase).trainer
    if t.global_batch_size % t.micro_batch_size:
        return _not_divisible(t.global_batch_size, t.micro_batch_size, "its micro_batch_size")
    if phase.weights is not None:
        sources = getattr(config.data, "sources", None)
        if sources is None:
            return f"weights are of a mixture, found data.kind = {config.data.kind}; leave them out"
        unknown = sorted(phase.weights.keys() - sources)
        if unknown or not phase.weights:
            return f"weights of {unknown}; expected names of data.sources: {', '.join(sources)}"
    if (phase.seq_len or 0) % config.parallel.context:
        return (
            f"seq_len = {phase.seq_len} is not divisible by parallel.context = "
            f"{config.parallel.context}; expected pieces of one length"
        )
    if phase.seq_len not in (None, config.data.seq_len) and config.data.kind == "mqar":
        return "seq_len: the examples of mqar have the length of data.seq_len; leave it out"
    return None


def carry_problem(config: RunConfig) -> str | None:
    """Return why a run cannot carry states as it asks for; None if it can, or does not ask."""
    windows = getattr(config.data, "carry_windows", None)
    if windows is None:
        return None
    t, what = config.trainer, f"data.carry_windows = {windows}"
    if name := attention_mixer(config):
        return (
            f"{what} with model.mixers.{name}: an attention layer has no state of constant size, "
            "but the keys and values of all tokens before; expected a model of recurrences only, "
            "or no data.carry_windows"
        )
    if config.parallel.context > 1:
        return (
            f"{what} with parallel.context = {config.parallel.context}: a piece's state comes from "
            "the rank before, not from the step before; expected one of the two"
        )
    horizon = getattr(config.data, "carry_horizon", None) or 1
    if t.global_batch_size % (horizon * t.micro_batch_size):
        unit = "data.carry_horizon x trainer.micro_batch_size"
        return _not_divisible(t.global_batch_size, horizon * t.micro_batch_size, unit)
    kept = {"seq_len", "global_batch_size", "micro_batch_size", "weights"}
    for number, phase in enumerate(config.phases or []):
        changed = sorted(key for key in kept if getattr(phase, key) is not None)
        if changed:
            return (
                f"phases[{number}]: {', '.join(changed)} with {what}: the rows' segments would end "
                "in between; expected phases of lr_scale only, or a branch (branch_from), which "
                "begins with new segments"
            )
    return None


def piece_problem(config: RunConfig) -> str | None:
    """Return why sequences cannot be cut into pieces as asked for; None if they can."""
    size = config.trainer.piece_tokens
    if size is None:
        return None
    what = f"trainer.piece_tokens = {size}"
    if config.parallel.context > 1 or getattr(config.data, "carry_windows", None) is not None:
        other = "parallel.context" if config.parallel.context > 1 else "data.carry_windows"
        return f"{what} with {other}: both cut sequences; expected one of the two"
    for part in config.every_phase():
        length = part.data.seq_len
        if length > size and length % size:
            return (
                f"{what} does not divide the length of {length} tokens; expected pieces of one "
                "length: a divisor of every longer data.seq_len and phase"
            )
    if getattr(config.data, "document_isolation", False) and (name := attention_mixer(config)):
        return (
            f"{what} with model.mixers.{name} and data.document_isolation: an attention layer "
            "reaches all pieces before, and does not tell their documents apart; expected one of "
            "the two, or a model of recurrences only"
        )
    return None


def tap_problem(config: RunConfig) -> str | None:
    """Return which convolution reaches over a rank's whole piece; None if none does."""
    count = config.parallel.context
    shortest = min(part.data.seq_len for part in config.every_phase()) // count
    for name in config.model.layers if count > 1 else ():
        width = getattr(config.model.mixers[name], "conv_size", 1)
        if width - 1 > shortest:
            return (
                f"model.mixers.{name}.conv_size = {width} with parallel.context = {count}: a tap "
                f"reaches over a piece of {shortest} tokens; expected at least {width - 1}: a "
                "longer data.seq_len and phase, or a smaller parallel.context"
            )
    return None


def attention_mixer(config: RunConfig) -> str | None:
    """Return the name of a mixer that is attention; None if the model is of recurrences only."""
    found = {n for n in config.model.layers if config.model.mixers[n].kind == ATTENTION}
    return min(found, default=None)


def _not_divisible(batch: int, unit: int, what: str) -> str:
    lower, upper = batch // unit * unit, (batch // unit + 1) * unit
    nearest = f"{lower} or {upper}" if lower else str(upper)
    return (
        f"trainer.global_batch_size = {batch} is not divisible by {what} = {unit}; nearest valid: "
        f"{nearest}"
    )
