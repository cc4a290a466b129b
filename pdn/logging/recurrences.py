"""What the mixers of a model do on a few sequences, by layer and head.

The mixers are not asked: the calls of ``pdn.ops`` and of torch's attention that a forward pass
makes are looked at, so that any mixer built on them is seen, a sharded one too. Letters: B batch,
T time, H key heads, HV value heads, K key size, V value size, N sequences, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pdn.ops import (
    DiagonalPreconditioner,
    RecurrentState,
    diagonal_preconditioner,
    materialise,
    observed,
)
from pdn.ops.preconditioning import write_key
from pdn.ops.reference import expand_heads, l2norm

SATURATED = 0.95  # of the logarithm of the preconditioner's bound
QUANTILES = {"half_life_p10": 0.1, "half_life_p50": 0.5, "half_life_p90": 0.9}  # evenly spaced
LONGEST = 1e9  # tokens; a half-life beyond it is no decay
MAX_SAMPLES = 1 << 16  # of a head, that quantiles and medians are taken of
QUERIES = 64  # of attention, over which the entropy is averaged

Maps = dict[str, list[list[float] | None]]  # quantity -> layer -> head


@dataclass(frozen=True)
class Call:
    """Records one call of an op of ``pdn.ops``, with the state after its last token."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    final: RecurrentState


@dataclass(frozen=True)
class Attention:
    """Records a call of ``scaled_dot_product_attention``: q [B, HQ, T, K], k [B, H, T, K]."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    causal: bool


@torch.no_grad()
def measure(
    model: nn.Module, forward: Callable[[], object], *, describing: bool = True
) -> tuple[Maps, dict[int, str]]:
    """Run ``forward`` and describe what each mixer of ``model`` did in it.

    Compiled blocks run as they are written, so that nothing is compiled for this. A sharded model
    is described in the moment when a layer's weights are there; ``forward`` is then collective.

    Args:
        model: with ``blocks``, each with a ``mixer``.
        forward: calls the model, on few sequences.
        describing: False on a rank that takes part in the forward pass and needs no answer.

    Returns:
        By quantity, the values of each layer's heads, None for a layer that has it not, and by
        layer the failures: one of a mixer that computes something unknown ends nothing. With HV
        heads, of the values:

        - ``half_life_p10``, ``_p50``, ``_p90``: quantiles over tokens, and channels of a diagonal
          decay, of the tokens after which half of what was stored is left; 1e9 for no decay;
        - ``beta``: mean gain;
        - ``key_write``: mean of k . w, of the key and the write key, 1 without preconditioner;
          ``write``: mean of beta k . w, the share of the old value that a write erases, so that
          the transition has the eigenvalue decay (1 - write); ``write_max``: its largest, 2 at
          most where the recurrence is stable;
        - ``B``, ``B_spread``: of the preconditioner, mean, and standard deviation over a head's
          channels; ``saturated``: share of B within 5 % of the logarithm of its bounds; ``log_A``:
          median of the curvature's logarithm; ``log_A_minus_mu``: of its distance from the centre;
        - ``S_norm``: Frobenius norm of the state after the last token, the largest of the
          sequences; ``S_rank``: its effective rank, ``(sum s^2)^2 / sum s^4`` of its singular
          values s, mean over the sequences;
        - ``attention_entropy``: mean entropy in nats of what a query attends to, by query head.
    """
    watch = _Watch(describing)
    handles = []
    mixers = [cast(Any, block).mixer for block in cast(nn.ModuleList, model.blocks)]
    for layer, mixer in enumerate(mixers):
        handles += watch.attach(layer, mixer)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            observed(watch.see),
            _attention_shown(watch.see_attention),
        ):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return watch.maps(len(mixers)), watch.failures


class _Watch:
    """Keeps the last call that a mixer makes, and describes it when the mixer is done."""

    def __init__(self, describing: bool):
        self.describing = describing
        self.failures: dict[int, str] = {}
        self._call: Call | Attention | None = None
        self._found: dict[int, dict[str, Tensor]] = {}

    def attach(self, layer: int, mixer: nn.Module) -> list:
        """Watch a mixer; returns what ends it."""
        before = mixer.register_forward_pre_hook(lambda *_: self._forget())
        after = mixer.register_forward_hook(lambda *_: self._describe(layer))
        return [before, after]

    def see(self, *call: Any) -> None:
        """Take a call of ``pdn.ops``. Of several the last counts, which gives the output."""
        self._call = Call(*call)

    def see_attention(self, call: Attention) -> None:
        self._call = call

    def _forget(self) -> None:
        self._call = None

    def _describe(self, layer: int) -> None:
        call, self._call = self._call, None
        if call is None or not self.describing:
            return
        try:
            with torch.autocast(call.q.device.type, enabled=False), unwatched():
                found = describe(call) if isinstance(call, Call) else entropy(call)
        except Exception as error:  # of a mixer that nobody here has seen
            self.failures[layer] = f"{type(error).__name__}: {error}"
            return
        self._found[layer] = found

    def maps(self, layers: int) -> Maps:
        """Return what was found, on the host, in one transfer."""
        keys = [(name, layer) for layer, found in self._found.items() for name in found]
        maps: Maps = {name: [None] * layers for name, _ in keys}
        if keys:
            rows = [self._found[layer][name].float() for name, layer in keys]
            values = torch.cat(rows).cpu().split([len(row) for row in rows])
            for (name, layer), heads in zip(keys, values, strict=True):
                maps[name][layer] = heads.tolist()
        return maps


@contextlib.contextmanager
def _attention_shown(see: Callable[[Attention], None]) -> Iterator[None]:
    """Show calls of ``torch.nn.functional.scaled_dot_product_attention`` in this block.

    The function is replaced, as a mode of torch would make every other call of it, and every look
    at a tensor's shape, about twice as slow.
    """
    attend = F.scaled_dot_product_attention

    def shown(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        see(Attention(query, key, attn_mask, is_causal))
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)

    F.scaled_dot_product_attention = shown
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Leave the calls of this block unseen."""
    with observed(lambda *_: None):
        yield


def describe(call: Call) -> dict[str, Tensor]:
    """Describe a call of ``delta_rule`` or ``linear_attention``; see ``measure``.

    Returns:
        By quantity a tensor [HV].
    """
    options, heads = call.options, call.v.shape[2]
    k = call.k.float()
    if options["qk_l2norm"]:
        k = l2norm(k)
    gain = materialise(options["beta"])
    gain = torch.ones(call.v.shape[:3], device=k.device) if gain is None else gain.float()
    decay = materialise(options["log_decay"])
    found = {"beta": gain.mean((0, 1))}
    if decay is not None:
        found |= half_lives(decay.float())
    online = call.name == "delta_rule"
    write: Any = options["write_k"] if online else options["preconditioner"]
    if isinstance(write, DiagonalPreconditioner):
        B, A = diagonal_preconditioner(k, write, cu_seqlens=options["cu_seqlens"])
        found |= rescaling(B, write, heads)
        if online:
            write, _ = write_key(
                k, write, lambda *_: (B, A), normalise=False, heads=heads, beta=gain,
                log_decay=decay,
            )  # fmt: skip
    if online:
        k = expand_heads(k, heads)
        w = k if write is None else expand_heads(cast(Tensor, write).float(), heads)
        product = (k * w).sum(-1)
        erased = gain * product
        found |= {
            "key_write": product.mean((0, 1)),
            "write": erased.mean((0, 1)),
            "write_max": erased.amax((0, 1)),
        }
    return found | sizes(call.final.S.float())


def half_lives(log_decay: Tensor) -> dict[str, Tensor]:
    """Return quantiles of the half-life, in tokens.

    Args:
        log_decay: [B, T, HV] or [B, T, HV, K]. Tokens without any decay are left out, as the inner
            steps of several to a token have none.
    """
    by_token = log_decay.flatten(0, 1)
    idle = (by_token == 0).flatten(1).all(1)
    lives = (-math.log(2) / by_token).abs().clamp(max=LONGEST)
    # Left out as what is not a number: to select them, the host would wait for the device.
    lives = lives.masked_fill(idle.view(-1, *[1] * (lives.ndim - 1)), math.nan)
    by_head = _sampled(lives.movedim(1, 0).flatten(1))
    low, *_, high = QUANTILES.values()
    at = torch.linspace(low, high, len(QUANTILES), device=lives.device)
    found = by_head.nanquantile(at, dim=1).nan_to_num(LONGEST)
    return dict(zip(QUANTILES, found, strict=True))


def _sampled(by_head: Tensor) -> Tensor:
    """Return at most about ``MAX_SAMPLES`` of each head's values [heads, T * K].

    The distance is odd, so that all of an even number of channels have a part in it.
    """
    return by_head[:, :: max(1, by_head.shape[1] // MAX_SAMPLES) | 1]


def rescaling(B: Tensor, rule: DiagonalPreconditioner, heads: int) -> dict[str, Tensor]:
    """Describe the preconditioner's B.

    Args:
        B: [B, T, H, K].
        rule: which computed it.
        heads: HV.
    """
    B = expand_heads(B.float(), heads)
    found = {"B": B.mean((0, 1, 3)), "B_spread": B.std(-1, correction=0).mean((0, 1))}
    by_head = B.movedim(2, 0).flatten(1)
    if rule.form == "inverse":
        return found | {"log_A": (-_sampled(by_head).log()).median(1).values}
    if rule.bound == 1:
        return found
    s = -by_head.log() / math.log(rule.bound)
    found["saturated"] = (s.abs() > SATURATED).float().mean(1)
    if rule.is_plain:
        # s = r / (1 + |r|), so that r comes back from B
        r = s / (1 - s.abs()).clamp(min=1e-6)
        middle = _sampled(r).median(1).values
        assert rule.mu is not None
        mu = rule.mu.detach().float().repeat_interleave(heads // len(rule.mu))
        found |= {"log_A": middle + mu, "log_A_minus_mu": middle}
    return found


def sizes(S: Tensor) -> dict[str, Tensor]:
    """Return norm and effective rank of states S [N, HV, K, V]; see ``measure``."""
    norm = torch.linalg.matrix_norm(S)
    unit = S / norm.clamp(min=1e-30)[..., None, None]
    gram = unit @ unit.mT if S.shape[-2] <= S.shape[-1] else unit.mT @ unit
    rank = 1 / gram.square().sum((-1, -2)).clamp(min=1e-30)
    filled = (norm > 0).float()  # empty documents, which pad a batch, have a state of zeros
    return {
        "S_norm": norm.amax(0),
        "S_rank": (rank * filled).sum(0) / filled.sum(0).clamp(min=1),
    }


def entropy(call: Attention) -> dict[str, Tensor]:
    """Return the mean entropy of evenly spaced queries' attention, in nats, by query head."""
    time = call.k.shape[2]
    queries = call.q.shape[2]
    at = torch.arange(0, queries, max(1, queries // QUERIES), device=call.q.device)
    q = call.q[:, :, at].float() * call.q.shape[-1] ** -0.5
    scores = q @ expand_heads(call.k.float(), q.shape[1], dim=1).mT
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask[..., at, :], -torch.inf)
    elif call.causal:
        reach = torch.arange(time, device=at.device) <= at[:, None]
        scores = scores.masked_fill(~reach, -torch.inf)
    logs = scores.log_softmax(-1)
    terms = torch.where(logs.isneginf(), 0.0, logs.exp() * logs)
    return {"attention_entropy": -terms.sum(-1).mean((0, 2))}


def rounded(maps: Maps) -> dict[str, list]:
    """Return ``maps`` with four significant digits, None for what is not finite."""
    return {name: [row and [_short(x) for x in row] for row in rows] for name, rows in maps.items()}


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
