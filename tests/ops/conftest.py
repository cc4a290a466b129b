import pytest
import torch


@pytest.fixture
def fresh_memory_is_nan():
    """Fill fresh memory: what a kernel reads before anything wrote it shows in its results."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
