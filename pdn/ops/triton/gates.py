"""Gates from their raw projections, and the gradients back to them."""

from __future__ import annotations

import triton
import triton.language as tl

from pdn.ops.triton.common import MIN_LOG_DECAY, exp, inverse, log


@triton.jit
def softplus(x):
    """log(1 + e^x), precise where e^x is far below one."""
    e = exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + log_one_plus(e)


@triton.jit
def log_one_plus(e):
    """log(1 + e) for 0 <= e <= 1, with a small relative error also of a small e."""
    if e.dtype == tl.float64:  # to the last digit
        u = 1.0 + e
        return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        return tl.where(e < 0.02, e * (1.0 - e * (0.5 - e * (1.0 / 3.0 - e * 0.25))), log(1.0 + e))


@triton.jit
def sigmoid(x):
    return inverse(1.0 + exp(-x))


@triton.jit
def decay_of(x, rate, bias, RAW: tl.constexpr):
    """Log-decay, not below MIN_LOG_DECAY, of a gate, or of its raw projection: -rate softplus(x +
    bias).
    """
    if RAW:
        x = -rate * softplus(x + bias)
    return tl.maximum(x, MIN_LOG_DECAY)


@triton.jit
def decay_slope(g, rate, SERIES: tl.constexpr):
    """Of the log-decay g = -rate softplus(x): its derivative by x, in float32 to 2.4e-7 of the
    rate; SERIES: also a small one to 6e-5 of itself.
    """
    x = g * inverse(tl.maximum(rate, 1e-30))
    slope = exp(x) - 1.0
    if SERIES:
        slope = tl.where(x > -0.004, x + 0.5 * x * x, slope)
    return rate * slope


@triton.jit
def decay_gradient(d, x, rate, bias, RAW: tl.constexpr):
    """Of the gate's input x, and of log(rate) before summing, from the log-decay's gradient d."""
    if RAW:  # softplus and its slope, the sigmoid, share their exponential
        x += bias
        e = exp(-tl.abs(x))
        d *= -rate
        return d * tl.where(x >= 0, 1.0, e) * inverse(1.0 + e), d * (
            tl.maximum(x, 0.0) + log_one_plus(e)
        )
    else:
        return d, d


@triton.jit
def load_rate(A_log, h, RAW: tl.constexpr, ACC: tl.constexpr):
    if RAW:
        return exp(tl.load(A_log + h).to(ACC))
    else:
        return 1.0


@triton.jit
def load_gain(x, at, live, RANGE: tl.constexpr, ACC: tl.constexpr):
    """A gain, or RANGE sigmoid(x); zero where not live."""
    b = gain_of(tl.load(x + at, mask=live, other=0.0).to(ACC), RANGE)
    if RANGE > 0:
        b = tl.where(live, b, 0.0)
    return b


@triton.jit
def gain_of(x, RANGE: tl.constexpr):
    """x, or RANGE sigmoid(x)."""
    if RANGE > 0:
        x = RANGE * sigmoid(x)
    return x


@triton.jit
def gain_gradient(d, b, RANGE: tl.constexpr):
    """Of the gain's input, from the gain b and its gradient d."""
    if RANGE > 0:
        d = d * b * (1.0 - b / RANGE)
    return d
