"""State tracking: words in a group, whose product must be known after every letter.

It shows what a recurrence can express. Parity (Z2) needs a negative eigenvalue, the permutation
groups S3 and S5 products of several reflections (arXiv 2411.12537, 2502.10297). This is a test of
the architecture: a small fresh model with the run's mixers learns the task at one length and is
evaluated at longer ones.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pdn.distributed.collectives import gather_or_raise
from pdn.errors import ConfigError
from pdn.evals.probes.base import About, Probe, Subject
from pdn.evals.results import Estimate, mean_of
from pdn.inference.sampling import stream_seed
from pdn.models.config import ModelConfig
from pdn.models.language_model import LanguageModel

PERMUTED = {"parity": 2, "s3": 3, "s5": 5}


class StateTrackingProbe(Probe):
    kind: Literal["state_tracking"]
    group: Literal["parity", "s3", "s5"]
    # layers of the fresh model, at least one round of the run's pattern
    num_layers: int = Field(ge=1)
    d_model: int = Field(ge=1)
    train_length: int = Field(ge=2)
    lengths: list[int] = Field(min_length=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    examples: int = Field(ge=1)  # at each length
    seed: int  # of the words to be tested on; of the model and its training, plus the run's

    def check(self, about: About) -> None:
        self.small(about.config, len(group_table(PERMUTED[self.group])))

    def run(self, subject: Subject) -> dict[str, Estimate]:
        """Return ``accuracy@L``: the share of right answers at the positions up to L.

        At each position the product of all letters so far is asked for.
        """
        world = subject.scorer.world
        results = gather_or_raise(lambda: self._train_and_test(subject) if world.is_main else None)
        assert results[0] is not None  # of the main rank
        return results[0]

    def _train_and_test(self, subject: Subject) -> dict[str, Estimate]:
        device = subject.scorer.device
        table = group_table(PERMUTED[self.group]).to(device)
        seed = self.seed + subject.seed
        generator = torch.Generator(device).manual_seed(seed)
        model = LanguageModel(self.small(subject.config, len(table))).to(device)
        model.init_weights(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps)
        for _ in range(self.steps):
            subject.scorer.alive()
            subject.scorer.check()
            letters, products = words(table, self.batch_size, self.train_length, generator)
            loss = model(letters, labels=products).loss_sum / products.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {
            f"accuracy@{n}": self._accuracy(model, table, n)
            for n in subject.lengths or tuple(self.lengths)
        }

    def small(self, config: ModelConfig, symbols: int) -> ModelConfig:
        """Return the run's configuration, shrunk; its mixers keep their heads."""
        if self.num_layers < len(config.pattern):
            raise ConfigError(
                "EVAL-SUBJECT",
                f"state_tracking: num_layers = {self.num_layers} is less than one round of "
                f"{config.pattern}; expected at least {len(config.pattern)} in "
                f"configs/eval/tasks/{self.group}.yaml",
            )
        mlp = 4 * self.d_model if config.intermediate_size else 0
        changes = {
            "vocab_size": symbols,
            "num_layers": self.num_layers,
            "d_model": self.d_model,
            "intermediate_size": mlp,
        }
        return config.model_copy(update=changes)

    @torch.inference_mode()
    def _accuracy(self, model: LanguageModel, table: Tensor, length: int) -> Estimate:
        """Estimate the accuracy over words.

        A length's words do not depend on which other lengths are asked for.
        """
        seed = stream_seed(self.seed, self.group, "test", length)
        generator = torch.Generator(table.device).manual_seed(seed)
        letters, products = words(table, self.examples, length, generator)
        shares: list[float] = []
        for asked, wanted in zip(
            letters.split(self.batch_size), products.split(self.batch_size), strict=True
        ):
            right = model(asked).logits.argmax(-1) == wanted
            shares += right.double().mean(1).tolist()
        return mean_of(shares)


def group_table(n: int) -> Tensor:
    """Return the multiplication of the n! permutations of n things, int64 [n!, n!].

    ``table[a, b]`` applies b after a.
    """
    elements = list(itertools.permutations(range(n)))
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(b[x] for x in a)] for b in elements] for a in elements])


def words(
    table: Tensor, batch: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw random letters; return them and the products of all letters so far.

    Args:
        table: multiplication of the group, int64 [order, order].
        batch, length: words, and letters of each.
        generator: of the letters.

    Returns:
        letters and products, int64 [batch, length] each.
    """
    letters = torch.randint(len(table), (batch, length), generator=generator, device=table.device)
    products = [letters[:, 0]]
    for t in range(1, length):
        products.append(table[products[-1], letters[:, t]])
    return letters, torch.stack(products, 1)
