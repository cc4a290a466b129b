"""A preconditioned delta rule as a layer of one's own network: `python examples/drop_in_layer.py`.

Learns to repeat a random sequence of 8 tokens after a pause, first with pdn's op alone, then with a
whole mixer of the zoo.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pdn
from pdn.ops import DiagonalPreconditioner, SigmoidGain, SoftplusDecay

VOCABULARY, LENGTH, D, HEADS = 16, 8, 64, 4


class Memory(nn.Module):
    """Projects around ``pdn.ops.delta_rule``: y [B, T, D] of x [B, T, D]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gates = nn.Linear(D, 4 * HEADS)
        self.A_log, self.dt_bias = (nn.Parameter(torch.zeros(2, HEADS) - 2) for _ in range(2))
        self.mu = nn.Parameter(torch.zeros(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.silu(p(x)).unflatten(-1, (HEADS, -1)) for p in (self.q, self.k, self.v))
        decay, gain, decay_P, gain_P = self.gates(x).chunk(4, -1)
        o, _ = pdn.ops.delta_rule(
            q,
            k,
            v,
            beta=SigmoidGain(gain),
            log_decay=SoftplusDecay(decay, self.A_log[0], self.dt_bias[0]),
            write_k=DiagonalPreconditioner(
                SoftplusDecay(decay_P, self.A_log[1], self.dt_bias[1]),
                SigmoidGain(gain_P),
                self.mu,
            ),
            qk_l2norm=True,
        )
        return self.out(o.flatten(-2))


class Network(nn.Module):
    """Embeds, mixes tokens once, and projects; ``mixer(x)`` gives y, or y and a state."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, D), nn.Embedding(2 * LENGTH, D)
        self.mixer, self.head = mixer, nn.Linear(D, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight
        y = self.mixer(F.layer_norm(x, (D,)))
        return self.head(x + (y[0] if isinstance(y, tuple) else y))


def learn(mixer: nn.Module, steps: int, seed: int = 0) -> tuple[float, float]:
    """The losses of the first and the last step, in nats."""
    torch.manual_seed(seed)
    network = Network(mixer)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        word = torch.randint(1, VOCABULARY, (32, LENGTH))
        tokens = torch.cat([word, torch.zeros_like(word)], 1)
        loss = F.cross_entropy(network(tokens)[:, LENGTH:].flatten(0, 1), word.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main(steps: int = 300) -> list[tuple[float, float]]:
    torch.manual_seed(0)
    results = []
    for name in "pdn.ops.delta_rule", "pgdn", "pkda":
        mixer = (
            Memory()
            if "." in name
            else pdn.build_mixer(name, d_model=D, num_heads=HEADS, head_dim=16)
        )
        first, last = learn(mixer, steps)
        print(f"{name}: {first:.2f} -> {last:.2f} nats a token")
        results.append((first, last))
    return results


if __name__ == "__main__":
    main()
