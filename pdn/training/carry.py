"""Recurrent states that live across the steps of a run: those of this rank's rows of the batch.

Row l of the batch takes the windows of a segment one after the other (``pdn.data.phases.Order``),
and its state goes with it: through the windows of a step with the gradient, from step to step
without. It starts from zero with a segment and, where documents are isolated, with a document.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pdn.checkpoint.find import VerifiedCheckpoint
from pdn.checkpoint.manager import Checkpointer
from pdn.distributed.fsdp import compute_in, last_micro_batch
from pdn.distributed.world import World
from pdn.errors import ConfigError
from pdn.models.language_model import LanguageModel
from pdn.models.state import (
    State,
    bytes_of_row,
    clear_rows,
    ended,
    leaves_of,
    map_state,
    named_tensors,
)
from pdn.store.local import format_bytes
from pdn.training.config import RunConfig
from pdn.training.hook import TrainerView
from pdn.training.phases import windows_carried
from pdn.training.windows import backpropagate
from pdn.wording import counted

PREFIX = "carried."  # of the states' names in a checkpoint


class CarriedState:
    """Holds the states of this rank's rows, and takes steps with them.

    Args:
        model: as ``parallelise`` returned it.
        config: of the run.
        world: this process among its peers.
        eos_id: what ends a document.
        bf16: whether forward passes compute in bfloat16.
        before_change: called before the states of the last step are overwritten.

    Attributes:
        rows: of this rank; those of all ranks, in their order, are the rows of the batch.
        horizon: windows of a row in one step.
        state: after the last step, tensors [rows, ...] without gradients.
    """

    def __init__(
        self, model: nn.Module, config: RunConfig, world: World, *, eos_id: int, bf16: bool,
        before_change: Callable[[], None],
    ):  # fmt: skip
        self._before_change = before_change
        self.model, self.world, self.bf16 = model, world, bf16
        self.horizon = horizon_of(config)
        self.rows = rows_of_batch(config) // world.batch_ranks
        isolated = getattr(config.data, "document_isolation", False)
        self._eos_id = eos_id if isolated else None
        self._z_loss = config.trainer.z_loss
        self._keep_gathered = not config.parallel.reshard_after_forward
        self._mesh = None
        if world.size > 1:
            self._mesh = init_device_mesh(world.device.type, (world.size,))
        with compute_in(world.device, bf16):
            self.state = cast("LanguageModel", model).init_state(self.rows)

    def accumulate_gradients(self, inputs: dict[str, Tensor], window: int) -> Tensor:
        """Add up the gradients of this rank's share of the mean loss, and keep the states after.

        Collective.

        Args:
            inputs: ``tokens``, ``labels`` [h n, B, T] and ``cu_seqlens`` [h n, L], if documents are
                isolated, on the device: the rows in n groups of B, h times, for each window.
            window: of the segment, with which the step begins; 0 starts from zero.

        Returns:
            This rank's shares, as of ``pdn.training.step.accumulate_gradients``.
        """
        if window == 0:
            self.state = map_state(torch.zeros_like, self.state)
        counted = self.world.sum((inputs["labels"] >= 0).sum())
        groups = len(inputs["tokens"]) // self.horizon
        shares = torch.zeros(2 if self._z_loss else 1, device=self.world.device)
        after = [self._group(inputs, counted, group, groups, shares) for group in range(groups)]
        self._before_change()
        for held, *parts in zip(leaves_of(self.state), *map(leaves_of, after), strict=True):
            held.copy_(torch.cat(parts))
        return shares

    def _group(
        self, inputs: dict[str, Tensor], counted: Tensor, group: int, groups: int, shares: Tensor
    ) -> State:
        """Add the gradients of one group of rows, and its ``shares``; return its states."""
        size = inputs["tokens"].shape[1]
        before = map_state(lambda x: x[group * size : (group + 1) * size], self.state)

        def run(number: int, state: State) -> tuple[Tensor, State]:
            micro = {key: value[number * groups + group] for key, value in inputs.items()}
            tokens = micro["tokens"]
            last = torch.is_grad_enabled() and number == 0 and group == groups - 1
            last_micro_batch(self.model, last, keep_gathered=self._keep_gathered)
            with compute_in(self.world.device, self.bf16):
                found = self.model(
                    tokens, labels=micro["labels"], cu_seqlens=micro.get("cu_seqlens"),
                    state=state, z_loss=self._z_loss,
                )  # fmt: skip
            share, after = found.loss_sum / counted, found.state
            if torch.is_grad_enabled() and self._z_loss:
                shares.add_(torch.stack([found.losses.sum(), found.z_losses.sum()]) / counted)
            elif torch.is_grad_enabled():
                shares.add_(share.detach())
            if self._eos_id is not None:
                after = ended(after, tokens, self._eos_id)
            return share, after

        _, after = backpropagate(run, before, self.horizon)
        # A state that is not finite would spoil all windows up to its segment's end. Such a step's
        # loss is not finite either, by which it is reported and skipped.
        finite = [x.flatten(1).isfinite().all(1) for x in leaves_of(after)]
        return clear_rows(after, ~torch.stack(finite).all(0))

    def tensors(self, window: int) -> dict[str, Tensor]:
        """Return the states by their names in a checkpoint, live, and of all ranks' rows.

        Args:
            window: of the segment, with which the next step begins; at its first no state is needed
                and there are none.
        """
        if window == 0:
            return {}
        found = {f"{PREFIX}{name}": x for name, x in named_tensors(self.state).items()}
        if self._mesh is None:
            return found
        mesh, rows = self._mesh, [Shard(0)]
        return {name: DTensor.from_local(x, mesh, rows) for name, x in found.items()}

    def load(self, checkpointer: Checkpointer, found: VerifiedCheckpoint, window: int) -> None:
        """Take the states from a checkpoint, each rank those of its rows. Collective.

        Raises:
            ConfigError: it has none, or those of another model or number of rows.
        """
        wanted = self.tensors(window)
        for name, tensor in wanted.items():
            saved = found.manifest.tensors.get(name)
            expected = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            if saved is None or list(saved) != expected:
                raise ConfigError(
                    "CKPT-CARRIED",
                    f"{found.path}: {name}: found {saved}, expected {expected}, since window "
                    f"{window} of a segment follows. Continue with the model, batch and precision "
                    "it was saved with",
                )
        if wanted:
            checkpointer.read(found, wanted)


def carried_for(trainer: TrainerView, start: VerifiedCheckpoint | None) -> CarriedState | None:
    """Return the states of a run that carries them, as they were at ``start``. Collective.

    Args:
        trainer: with its model built and its counters those of ``start``.
        start: the checkpoint that the launch continues from, if any.
    """
    config, data = trainer.config, trainer.data
    if windows_carried(config.data) == 1:
        return None
    carried = CarriedState(
        trainer.model, config, trainer.world, eos_id=data.eos_id, bf16=trainer.bf16,
        before_change=trainer.checkpointer.before_change,
    )  # fmt: skip
    if start is not None:
        stage = trainer.course.stage(trainer.step)
        ahead = data.ahead([(stage.first, trainer.next_sample, stage.law)])
        carried.load(trainer.checkpointer, start, ahead.window(trainer.next_sample))
    return carried


def horizon_of(config: RunConfig) -> int:
    """Return the windows that a row takes in one step."""
    return getattr(config.data, "carry_horizon", None) or 1


def rows_of_batch(config: RunConfig) -> int:
    """Return the rows of the batch, over all ranks."""
    return config.trainer.global_batch_size // horizon_of(config)


def state_bytes(config: RunConfig, bf16: bool) -> int:
    """Return the bytes of the states of all rows; 0 where none is carried."""
    if windows_carried(config.data) == 1:
        return 0
    dtype = torch.bfloat16 if bf16 else torch.float32
    return rows_of_batch(config) * bytes_of_row(config.model, dtype)


def describe_carried(config: RunConfig, world: World, bf16: bool) -> str | None:
    """Say in a line what is carried and what it costs; None where nothing is."""
    size = state_bytes(config, bf16)
    if not size:
        return None
    rows, horizon = rows_of_batch(config), horizon_of(config)
    kept = (horizon - 1) * config.trainer.micro_batch_size * size // rows
    through = f", gradient through {horizon} windows" if horizon > 1 else ""
    return (
        f"{counted(rows, 'row')} of {counted(windows_carried(config.data), 'window')}{through}; "
        f"{format_bytes(size // rows)} a row, {format_bytes(size // world.batch_ranks + kept)} a "
        f"rank, {format_bytes(size)} more in a checkpoint within segments"
    )
