"""What the recurrences and the optimiser do while a run trains."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from pdn.distributed.fsdp import compute_in, local_part
from pdn.logging.alarms import Alarms
from pdn.logging.recurrences import Maps, measure, rounded
from pdn.training.hook import Hook, TrainerView


class Telemetry(Hook):
    """Describes recurrences, gradients and updates every ``trainer.telemetry_every``.

    One sequence of the main rank's batch goes through the model once more, without gradients; the
    recurrences are described by layer and head in ``telemetry.jsonl`` of the run. Loggers get the
    least, the median and the largest of each quantity, and its map where they can show one.

    It reads, and changes nothing: the run is bitwise the one without it. At such a step a second
    copy of this rank's parameters is held from the end of the backward pass to that of the update.
    """

    def __init__(self, trainer: TrainerView):
        super().__init__(trainer)
        self.measures = self.trigger(trainer.config.trainer.telemetry_every)
        self.alarms: Alarms | None = None  # knows the run's earlier measurements
        self._sample: dict[str, Tensor] = {}
        self._updates: Updates | None = None

    def before_update(self, step: int, inputs: dict[str, Tensor]) -> None:
        if not self.measures.due(step):
            return
        self._sample = {key: value[0].clone() for key, value in inputs.items()}
        groups: dict[str, list[Tensor]] = {}
        for group in self.trainer.optimizer.groups:
            groups.setdefault(group["name"], []).extend(group["params"])
        self._updates = Updates(groups)

    def after_update(self, step: int) -> None:
        if self._updates is not None:
            self._updates.finish()

    def due(self, step: int, last: bool) -> bool:
        # A trainer whose steps show no batch has nothing to describe.
        return self.measures.due(step) and bool(self._sample)

    def run(self, step: int) -> None:
        trainer = self.trainer
        trainer.watchdog.beat(step, "telemetry")
        numbers = {} if self._updates is None else self._updates.read()
        maps, failures = self._measured()
        self._sample, self._updates = {}, None
        if not trainer.world.is_main:
            return
        for layer, reason in failures.items():
            trainer.progress.say(f"step {step}  layer {layer} is not in the telemetry: {reason}")
        self._raise_alarms(step, maps)
        written = rounded(maps)
        trainer.directory.log_telemetry({"step": step, "maps": written})
        trainer.logger.log(step, numbers | summary(written))
        for name, rows in written.items():
            trainer.logger.log_map(step, f"telemetry/{name}", rows)

    def _measured(self) -> tuple[Maps, dict[int, str]]:
        """Run the batch's first sequence, or its first piece, through the model; collective."""
        trainer, model = self.trainer, self.trainer.model
        size = trainer.config.trainer.piece_tokens
        sample = {key: self._sample[key][:1, :size] for key in ("tokens", "labels")}
        bounds = self._sample.get("cu_seqlens")
        if bounds is not None:
            # of the first row; where ranks share a sequence, of the piece that the first one has
            length = sample["tokens"].shape[1]
            bounds = torch.cat([bounds[bounds < length], bounds.new_tensor([length])])

        def forward() -> None:
            with compute_in(trainer.world.device, trainer.bf16):
                # With labels: logits of a whole sequence are never held at once.
                model(sample["tokens"], labels=sample["labels"], cu_seqlens=bounds)

        was_training = model.training
        devices = [trainer.world.device] if trainer.world.device.type == "cuda" else []
        model.eval()
        try:
            # A mixer that draws must not move the random numbers of the run.
            with torch.random.fork_rng(devices):
                return measure(model, forward, describing=trainer.world.is_main)
        finally:
            model.train(was_training)

    def _raise_alarms(self, step: int, maps: Maps) -> None:
        if self.alarms is None:
            self.alarms = Alarms()
            for record in self.trainer.directory.telemetry():
                self.alarms.check(record.get("maps", {}))
        by_kind: dict[str, list[str]] = {}
        for alarm in self.alarms.check(maps):
            self.trainer.progress.say(f"step {step}  alarm: {alarm}")
            by_kind.setdefault(f"alarm/{alarm.kind}", []).append(str(alarm))
        if by_kind:
            self.trainer.logger.log(
                step, {kind: "; ".join(texts) for kind, texts in by_kind.items()}
            )


class Updates:
    """Measures gradients, updates and weights of named groups of parameters; nothing waits.

    Args:
        groups: parameters by group, with their gradients; this rank's part where they are sharded.
    """

    def __init__(self, groups: dict[str, list[Tensor]]):
        self._groups = groups
        every = [parameter for own in groups.values() for parameter in own]
        self._first = every[0]
        self._now = [local_part(parameter.detach()).view(-1) for parameter in every]
        self._sizes = [sum(local_part(p.detach()).numel() for p in own) for own in groups.values()]
        self._before = torch.cat(self._now)
        gradients = [
            torch.zeros((), device=now.device) if p.grad is None else local_part(p.grad)
            for p, now in zip(every, self._now, strict=True)
        ]
        self._squares = [self._by_group(gradients)]

    @torch.no_grad()
    def finish(self) -> None:
        """Compare the parameters with those before the update. Collective of a sharded model."""
        parts = self._before.split([len(now) for now in self._now])
        torch._foreach_sub_(parts, self._now)  # pyright: ignore[reportPrivateImportUsage]
        moved = [
            torch.linalg.vector_norm(own).float().square()
            for own in self._before.split(self._sizes)
        ]
        self._squares += [torch.stack(moved), self._by_group(self._now)]
        self._now, self._before = [], self._before.new_empty(0)
        squares = torch.stack(self._squares)
        if isinstance(self._first, DTensor):
            mesh = self._first.device_mesh
            squares = squares.to(mesh.device_type)  # from the host, where parameters may be
            dist.all_reduce(squares, group=mesh.get_group("shard"))
        self._found = squares

    def _by_group(self, tensors: list[Tensor]) -> Tensor:
        """Return the sum of squares of each group's tensors, one of each parameter, [groups]."""
        norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack([norm.float() for norm in norms]).square()
        counts = [len(own) for own in self._groups.values()]
        return torch.stack([own.sum() for own in squares.split(counts)])

    def read(self) -> dict[str, float]:
        """Return ``gradient/<group>``, the norm of its gradients before clipping, and
        ``update/<group>``, the norm of its update over that of its weights.
        """
        found = {}
        for name, gradient, moved, weight in zip(
            self._groups, *self._found.sqrt().tolist(), strict=True
        ):
            found[f"gradient/{name}"] = gradient
            found[f"update/{name}"] = moved / weight if weight else 0.0
        return found


def summary(maps: dict[str, list]) -> dict[str, float]:
    """Return the least, the median and the largest of each quantity over layers and heads."""
    found: dict[str, float] = {}
    for name, rows in maps.items():
        values = sorted(x for row in rows for x in row or () if x is not None)
        if values:
            found |= {
                f"telemetry/{name}/min": values[0],
                f"telemetry/{name}/median": values[len(values) // 2],
                f"telemetry/{name}/max": values[-1],
            }
    return found
