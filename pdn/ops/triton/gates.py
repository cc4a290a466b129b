"""Gates from their raw projections, and the gradients back to them."""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import MIN_LOG_DECAY


@triton.jit
def softplus(x):
    """log(1 + e^x), precise where e^x is far below one."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def decay_of(x, rate, bias, RAW: tl.constexpr):
    """Log-decay, not below MIN_LOG_DECAY, of a gate, or of its raw projection: -rate softplus(x + bias)."""
    if RAW:
        x = -rate * softplus(x + bias)
    return tl.maximum(x, MIN_LOG_DECAY)


@triton.jit
def decay_gradient(d, x, rate, bias, RAW: tl.constexpr):
    """Of the gate's input x, and of log(rate) before summing, from the log-decay's gradient d."""
    if RAW:
        return -d * rate * sigmoid(x + bias), -d * rate * softplus(x + bias)
    else:
        return d, d


@triton.jit
def load_rate(A_log, h, RAW: tl.constexpr, ACC: tl.constexpr):
    if RAW:
        return tl.exp(tl.load(A_log + h).to(ACC))
    else:
        return 1.0


@triton.jit
def load_gain(x, at, live, RANGE: tl.constexpr, ACC: tl.constexpr):
    """A gain, or RANGE sigmoid(x); zero where not live."""
    b = tl.load(x + at, mask=live, other=0.0).to(ACC)
    if RANGE > 0:
        b = tl.where(live, RANGE * sigmoid(b), 0.0)
    return b


@triton.jit
def gain_gradient(d, b, RANGE: tl.constexpr):
    """Of the gain's input, from the gain b and its gradient d."""
    if RANGE > 0:
        d = d * b * (1.0 - b / RANGE)
    return d
