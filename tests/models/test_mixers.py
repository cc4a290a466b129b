"""The mixers against their papers' recurrences, written out token by token."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pdn import ops
from pdn.models.language_model import init_weights
from pdn.models.mixers.axes import evaluate, narrow_projections, project
from tests import presets
from tests.presets import small_config


def built(name: str):
    config = small_config(name)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 7, config.d_model, generator=generator, dtype=torch.float64)
    return presets.built(config), x


def norm(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def heads(conv, projection, x, head_dim):
    return conv(projection(x))[0].unflatten(-1, (-1, head_dim))


def finish(mixer, o, x):
    o = mixer.o_norm(o)
    if mixer.output_gate is not None:
        gate = mixer.output_gate
        o = o * torch.sigmoid(gate.g_up(gate.g_down(x)).unflatten(-1, (-1, o.shape[-1])))
    return mixer.o_proj(o.flatten(-2))


def curvature(mixer, k, x):
    """Compute B of every token, by the plain formulas of arXiv 2604.21100."""
    p = mixer.preconditioner
    decay = torch.exp(
        -p.decay.rates.A_log.exp() * F.softplus(p.decay.a_proj(x) + p.decay.rates.dt_bias)
    )
    gain = torch.sigmoid(p.gain.b_proj(x))
    A, steps = torch.zeros_like(k[:, 0]), []
    for t in range(k.shape[1]):
        A = decay[:, t, :, None] * A + gain[:, t, :, None] * k[:, t] ** 2
        r = torch.log(A + 1e-6) - p.center.mu[:, None]
        steps.append(p.config.bound ** (-r / (1 + r.abs())))
    return torch.stack(steps, 1)


def scalar_decay(mixer, x):
    rates = mixer.decay.rates
    return torch.exp(-rates.A_log.exp() * F.softplus(mixer.decay.a_proj(x) + rates.dt_bias))


@pytest.mark.parametrize("name", ["gdn_tiny", "pgdn_tiny"])
def test_gated_delta_nets_follow_their_recurrence(name):
    mixer, x = built(name)
    q, k, v = (
        heads(getattr(mixer, f"{c}_conv"), getattr(mixer, f"{c}_proj"), x, 16) for c in "qkv"
    )
    q, k = norm(q), norm(k)
    write = k if mixer.preconditioner is None else curvature(mixer, k, x) * k
    decay, beta = scalar_decay(mixer, x), torch.sigmoid(mixer.gain.b_proj(x))
    S, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        S = decay[:, t, :, None, None] * S
        error = v[:, t] - (S.mT @ k[:, t, :, :, None])[..., 0]
        S = S + beta[:, t, :, None, None] * write[:, t, :, :, None] * error[..., None, :]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] * 16**-0.5)
    torch.testing.assert_close(
        mixer(x)[0], finish(mixer, torch.stack(outputs, 1), x), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("count", [2, 6])
def test_inputs_and_axes_are_one_product_whatever_fills_its_width_up(count):
    """Six heads of 64 make it wider than ``WIDE``; gradients are compared, too."""
    config = small_config("pgdn_tiny").mixers["pgdn"]
    config = config.model_copy(update={"num_heads": count, "head_dim": 64})
    mixer = config.build(32).double()
    init_weights(mixer, 0)
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    axes = mixer.decay, mixer.gain, mixer.preconditioner, mixer.output_gate
    narrow = narrow_projections(*axes)
    own = [mixer.q_proj, mixer.k_proj, mixer.v_proj]
    width = sum(len(linear.weight) for linear in [*own, *narrow])
    assert project(x, [*own, *narrow]).shape[-1] == (width if count == 2 else 1216) >= width

    def apart():
        q, k, v = (
            heads(conv, proj, x, 64)
            for conv, proj in zip((mixer.q_conv, mixer.k_conv, mixer.v_conv), own, strict=True)
        )
        decay, gain, preconditioner, _ = evaluate(x, *axes)
        o, _ = mixer.solve(q, k, v, decay, gain, preconditioner, return_state=False)
        return mixer.o_proj(mixer.o_norm(o).flatten(-2))

    leaves = [x, *(linear.weight for linear in [*own, *narrow])]
    found, expected = mixer(x)[0], apart()
    torch.testing.assert_close(found, expected)
    for mine, right in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, right)


class Joined(TorchDispatchMode):
    """Records the shapes of what is concatenated."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.cat.default:
            self.shapes |= {part.shape for part in args[0]}
        return func(*args, **(kwargs or {}))


def test_a_step_of_decoding_on_a_cpu_copies_no_weights():
    mixer, x = built("retnet_340m")
    with torch.no_grad(), Joined() as joined:
        y, _ = mixer(x[:, :1], state=mixer.init_state(2, x.device, x.dtype))
    assert joined.shapes and not joined.shapes & {p.shape for p in mixer.parameters()}
    torch.testing.assert_close(y, mixer(x)[0][:, :1])


def test_comba_erases_from_the_state_before_its_decay_and_normalises_last():
    """Follow flash-linear-attention 0.6.0: layers/comba.py with ops/comba/fused_recurrent.py."""
    mixer, x = built("comba_tiny")
    q, k, v = (
        heads(getattr(mixer, f"{c}_conv"), getattr(mixer, f"{c}_proj"), x, 16) for c in "qkv"
    )
    p = torch.sigmoid(mixer.feedback.decay)[:, None] * k
    q, k, p = norm(q - mixer.feedback.D[:, None] * p), norm(k), norm(p)
    decay, beta = scalar_decay(mixer, x), torch.sigmoid(mixer.gain.b_proj(x))
    S, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        error = v[:, t] - (S.mT @ p[:, t, :, :, None])[..., 0]
        S = decay[:, t, :, None, None] * S
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[..., None, :]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] * 16**-0.5)
    o = mixer.o_norm(torch.stack(outputs, 1))
    o = o * torch.sigmoid(mixer.output_gate.g_proj(x)).unflatten(-1, (2, 16))
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(o.flatten(-2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [5.0, 60.0])
def test_comba_survives_tokens_that_forget_nearly_everything(size):
    mixer, x = built("comba_tiny")
    with torch.no_grad():
        mixer.decay.rates.dt_bias.fill_(size)
    x = x.repeat(1, 20, 1).requires_grad_()
    results = []
    for backend in ("reference", "chunkwise"):
        ops.set_default_backend(backend)
        try:
            y = mixer(x)[0]
        finally:
            ops.set_default_backend("auto")
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_the_kernels_compute_comba_with_a_decay_of_each_channel():
    """Give each channel a decay: with one of each head the kernels invert enlarged keys.

    The decay has then enlarged the keys beyond float32.
    """
    pytest.importorskip("triton")
    mixer, x = built("comba_tiny")
    with torch.no_grad():
        mixer.decay.rates.dt_bias.fill_(5.0)
    x = x[:1].repeat(1, 10, 1)
    q, k, v = (
        heads(getattr(mixer, f"{c}_conv"), getattr(mixer, f"{c}_proj"), x, 16).float()
        for c in "qkv"
    )
    decay, gain = mixer.decay(mixer.decay.a_proj(x)), torch.sigmoid(mixer.gain.b_proj(x)).float()
    found = []
    for backend, per_channel in (("chunkwise", False), ("triton", True)):
        (*keys, write), log_decay = mixer._published(q, k, 2, decay, per_channel=per_channel)
        o, _ = ops.delta_rule(
            *(y.float() for y in keys), v, write_k=write.float(), beta=gain,
            log_decay=log_decay.float(), backend=backend,
        )  # fmt: skip
        found.append(o)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_preconditioned_comba_erases_from_the_decayed_state_with_a_scaled_key():
    mixer, x = built("pcomba_tiny")
    q, k, v = (
        heads(getattr(mixer, f"{c}_conv"), getattr(mixer, f"{c}_proj"), x, 16) for c in "qkv"
    )
    q, k = norm(q), norm(k)
    p = torch.sigmoid(mixer.feedback.decay)[:, None] * k
    q = q - mixer.feedback.D[:, None] * p
    write = k if mixer.preconditioner is None else curvature(mixer, k, x) * k
    decay, beta = scalar_decay(mixer, x), torch.sigmoid(mixer.gain.b_proj(x))
    S, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        S = decay[:, t, :, None, None] * S
        error = v[:, t] - (S.mT @ p[:, t, :, :, None])[..., 0]
        S = S + beta[:, t, :, None, None] * write[:, t, :, :, None] * error[..., None, :]
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] * 16**-0.5)
    torch.testing.assert_close(
        mixer(x)[0], finish(mixer, torch.stack(outputs, 1), x), rtol=1e-10, atol=1e-10
    )


def test_delta_product_takes_two_householder_steps_a_token_and_decays_once():
    mixer, x = built("delta_product_tiny")
    q = norm(heads(mixer.q_conv, mixer.q_proj, x, 16))
    k, v = (
        heads(getattr(mixer, f"{c}_conv"), getattr(mixer, f"{c}_proj"), x, 16).unflatten(2, (2, 2))
        for c in "kv"
    )
    k, beta = norm(k), torch.sigmoid(mixer.gain.b_proj(x)).unflatten(-1, (2, 2))
    decay = scalar_decay(mixer, x)
    S, outputs = torch.zeros(2, 2, 16, 16, dtype=torch.float64), []
    for t in range(x.shape[1]):
        S = decay[:, t, :, None, None] * S
        for step in range(2):
            error = v[:, t, step] - (S.mT @ k[:, t, step, :, :, None])[..., 0]
            S = (
                S
                + beta[:, t, step, :, None, None] * k[:, t, step, :, :, None] * error[..., None, :]
            )
        outputs.append((S.mT @ q[:, t, :, :, None])[..., 0] * 16**-0.5)
    torch.testing.assert_close(
        mixer(x)[0], finish(mixer, torch.stack(outputs, 1), x), rtol=1e-10, atol=1e-10
    )


def test_mamba2_is_the_state_space_recurrence():
    mixer, x = built("mamba2_tiny")
    c, ssm = mixer.config, mixer.ssm
    z, xBC, dt = mixer.in_proj(x).split([c.d_inner, c.conv_channels, c.num_heads], -1)
    u, B, C = mixer.conv(xBC)[0].split([c.d_inner, c.state_size, c.state_size], -1)
    u = u.unflatten(-1, (c.num_heads, c.head_dim))
    delta = F.softplus(dt + ssm.dt_bias)
    state, outputs = torch.zeros(2, c.num_heads, c.head_dim, c.state_size, dtype=torch.float64), []
    for t in range(x.shape[1]):
        step = delta[:, t, :, None, None]
        state = (
            torch.exp(-ssm.A_log.exp()[:, None, None] * step) * state
            + step * u[:, t, :, :, None] * B[:, t, None, None, :]
        )
        outputs.append((state * C[:, t, None, None, :]).sum(-1) + ssm.D[:, None] * u[:, t])
    y = mixer.norm(torch.stack(outputs, 1).flatten(-2) * F.silu(z))
    torch.testing.assert_close(mixer(x)[0], mixer.out_proj(y), rtol=1e-10, atol=1e-10)


def test_attention_is_causal_softmax_attention_with_rotary_positions():
    mixer, x = built("transformer_tiny")
    q, k, v = (
        projection(x).unflatten(-1, (-1, 16))
        for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )

    def rotate(y):
        a, b = y[..., :8], y[..., 8:]
        angle = torch.arange(7)[:, None, None] * 10000.0 ** (
            -torch.arange(8, dtype=torch.float64) / 8
        )
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    scores = torch.einsum("bihk,bjhk->bhij", rotate(q), rotate(k)) / 4
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    o = torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v)
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(o.flatten(-2)), rtol=1e-10, atol=1e-10)
