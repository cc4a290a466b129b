"""Parameter groups and precision."""

import torch

from pdn import ops
from pdn.optim.config import AdamWConfig
from pdn.optim.optimizers import build_optimizer
from tests.presets import small_model


def test_weight_decay_spares_norms_biases_and_the_parameters_of_the_recurrence():
    model = small_model("pkda_tiny")
    config = AdamWConfig(kind="adamw", lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decayed, plain = (
        {id(p) for p in group["params"]} for group in build_optimizer(model, config).param_groups
    )
    spared = {
        name.rsplit(".", 1)[1]
        for name, p in model.named_parameters()
        if id(p) in plain and "norm" not in name
    }
    assert spared == {"A_log", "dt_bias", "mu", "bias"}
    assert all(id(p) in plain for name, p in model.named_parameters() if "norm" in name)
    assert len(decayed | plain) == len(list(model.parameters())) and not decayed & plain


def test_autocast_does_not_lower_the_precision_of_a_recurrence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 8, generator=generator) for _ in range(3))
    beta = torch.rand(1, 70, 2, generator=generator)
    for backend in ("reference", "chunkwise"):
        plain, _ = ops.delta_rule(q, k, v, beta=beta, qk_l2norm=True, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            lowered, _ = ops.delta_rule(q, k, v, beta=beta, qk_l2norm=True, backend=backend)
        assert torch.equal(plain, lowered)
