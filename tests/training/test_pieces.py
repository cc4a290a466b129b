"""Sequences in pieces: the loss and gradient of the whole, with a piece in memory at a time."""

import pytest
import torch

from pdn.data.pack import document_boundaries
from pdn.distributed.world import World
from pdn.errors import ConfigError
from pdn.models.language_model import LanguageModel
from pdn.training.pieces import cut
from pdn.training.step import accumulate_gradients
from pdn.training.trainer import Trainer
from tests.presets import TINY, perturb, small_config, small_model
from tests.small_runs import losses, run_config, train, train_on_ranks
from tests.tolerances import SUM_FACTOR

EOS, ROWS, TIME, SHORTEST = 7, 2, 40, 1
# Sizes of other presets that mix in ways of their own
OTHERS = ["mesa_net_340m", "plonghorn_340m", "nlms_340m", "gdn_learned_340m", "retnet_340m"]
RECURRENT = [name for name in TINY if name not in ("hybrid_tiny", "transformer_tiny")]
ONE = World(0, 1, torch.device("cpu"))


def inputs(isolated: bool) -> dict[str, torch.Tensor]:
    """Return two micro-batches of rows whose documents end before, at and after pieces' ends."""
    drawn = torch.randint(8, 256, (2, ROWS, TIME + 1), generator=torch.manual_seed(0))
    drawn[0, 0, [3, 9, 20, 31]] = EOS  # token 9 is the last of a piece of 10
    drawn[1, 1, [19, 20]] = EOS
    found = {"tokens": drawn[..., :-1], "labels": drawn[..., 1:].clone()}
    found["labels"][0, 1, :15] = -100  # no label in a whole piece
    if isolated:
        bounds = [document_boundaries(x.numpy(), EOS, SHORTEST) for x in found["tokens"]]
        found["cu_seqlens"] = torch.stack([torch.from_numpy(x) for x in bounds])
    return found


def computed(model, isolated: bool, size: int | None, z_loss: float = 0.0) -> list[torch.Tensor]:
    """Return the shares of the loss and the gradients of a step."""
    shares = accumulate_gradients(
        model, inputs(isolated), ONE, bf16=False, keep_gathered=True, z_loss=z_loss,
        piece_tokens=size,
    )  # fmt: skip
    found = [shares, *(parameter.grad for parameter in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def errors(model, isolated: bool, size: int, z_loss: float = 0.0) -> float:
    """Return the worst relative error of the gradients against whole sequences.

    Those of vectors, sums that largely cancel, may differ ``SUM_FACTOR`` times as much.
    """
    shares, *found = computed(model, isolated, size, z_loss)
    expected, *whole = computed(model, isolated, None, z_loss)
    assert torch.allclose(shares, expected, rtol=1e-6)  # kept in float32
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-30)) / (SUM_FACTOR if b.ndim == 1 else 1)
        for a, b in zip(found, whole, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "isolated"),
    [
        ("pgdn_tiny", False),
        ("pgdn_tiny", True),
        ("pkda_tiny", True),
        ("mamba2_tiny", True),
        ("hybrid_tiny", False),
    ],
)
def test_a_sequence_in_pieces_has_the_loss_and_gradient_of_the_whole(name, isolated):
    assert errors(small_model(name), isolated, 10) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("name", [*RECURRENT, *OTHERS])
def test_so_it_has_with_every_other_mixer(name, isolated):
    assert errors(small_model(name), isolated, 10) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_tiny", "hybrid_tiny"])
def test_so_it_has_with_attention_over_all_pieces_before_or_a_window(name):
    config = small_config(name)
    windowed = {
        key: mixer.model_copy(update={"window": 13}) if mixer.kind == "attention" else mixer
        for key, mixer in config.mixers.items()
    }
    for mixers in (config.mixers, windowed):
        model = LanguageModel(config.model_copy(update={"mixers": mixers})).double()
        model.init_weights(seed=1)
        assert errors(perturb(model), False, 10) < 1e-10


def test_pieces_shorter_than_a_convolution_take_the_z_loss_too():
    model = small_model("pgdn_tiny")
    assert errors(model, True, 2, z_loss=1e-2) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ["pgdn_tiny", "pkda_tiny", "gdn_tiny", "kda_tiny", "mamba2_tiny"])
def test_eight_pieces_of_4096_tokens_have_them(name, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("tests.training.test_pieces.TIME", 4096)
    monkeypatch.setattr("tests.training.test_pieces.SHORTEST", 16)
    assert errors(small_model(name, dtype), True, 512) < tolerance


@pytest.mark.parametrize("shortest", [1, 3, 7])
def test_a_piece_has_slots_for_the_documents_that_it_can_hold_and_no_more(shortest):
    """In every piece of windows that are full of the shortest documents, however they lie."""
    for offset in range(8):
        tokens = torch.full((2, 48), 9)
        tokens[:, offset::shortest] = EOS
        bounds = torch.from_numpy(document_boundaries(tokens.numpy(), EOS, shortest))
        micro = {"tokens": tokens, "labels": tokens, "cu_seqlens": bounds}
        for number, part in enumerate(cut(micro, 8)):
            starts = {0, 8, 16}
            for row, place in (divmod(int(bound), 48) for bound in bounds[bounds < 96]):
                if number * 8 <= place < number * 8 + 8:
                    starts.add(row * 8 + place - number * 8)
            assert sorted(starts) == part.cu_seqlens.unique().tolist()
            assert (part.cu_seqlens.diff() >= 0).all()
            assert len(part.cu_seqlens) <= 2 * (3 + 8 // shortest) + 1


def test_what_the_backward_pass_keeps_is_that_of_a_piece(monkeypatch):
    monkeypatch.setattr("tests.training.test_pieces.TIME", 640)
    held, most = 0, 0

    class Kept:
        def __init__(self, x: torch.Tensor):
            nonlocal held, most
            self.x, self.size = x, x.numel()
            held += self.size
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.size

    model, found = small_model("pgdn_tiny"), []
    for size in (None, 80):
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
            computed(model, False, size)
        found.append(most)
    assert found[1] < found[0] / 5, found  # an eighth, and the weights that both keep


def test_a_run_takes_its_sequences_in_pieces_and_has_the_losses_of_whole_ones(tmp_path):
    seen, found = set(), []

    class Watching(Trainer):
        hook = None

        def train_step(self, batch):
            if self.hook is not None:
                self.hook.remove()
            whole = accumulate_gradients(
                self.model, batch, self.world, bf16=False, keep_gathered=True, z_loss=1e-4
            )
            self.optimizer.zero_grad()
            self.hook = self.model.register_forward_pre_hook(
                lambda _, given: seen.add(given[0].shape[1])
            )
            step = super().train_step(batch)
            found.append((step.loss - whole[0], step.z_loss - whole[1]))
            return step

    options = "data.document_isolation=true", "trainer.stop_at=2", "trainer.z_loss=1e-4"
    options += "trainer.piece_tokens=16", "trainer.telemetry_every=1"
    train(tmp_path, "pgdn_tiny", *options, trainer_cls=Watching)
    assert seen == {16} and len(found) == 2
    assert all(abs(error) < 1e-5 for errors in found for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_so_is_one_on_two_ranks_whose_length_grows_and_that_is_stopped(layout, tmp_path):
    options = "phases=[{until: 3, seq_len: 16}]", "data.unit_tokens=48", "data.pool_units=8"
    options = *options, "trainer.micro_batch_size=2", "trainer.steps=8", "schedule.warmup_steps=2"
    one = train(tmp_path / "one", "pgdn_tiny", *options)
    own = *options, f"parallel={layout}", "trainer.piece_tokens=16"
    train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *own, "trainer.stop_at=5")
    two = train_on_ranks(2, tmp_path / "two", "pgdn_tiny", *own)
    assert losses(two) == pytest.approx(losses(one), rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("preset", "words", "found"),
    [
        (
            "hybrid_tiny",
            ("data.document_isolation=true",),
            "an attention layer reaches all pieces before",
        ),
        ("pgdn_tiny", ("parallel.context=2",), "with parallel.context: both cut sequences"),
        ("pgdn_tiny", ("data.carry_windows=2",), "with data.carry_windows: both cut sequences"),
        ("pgdn_tiny", ("data.seq_len=40",), "does not divide the length of 40 tokens"),
        ("pgdn_tiny", ("phases=[{until: 3, seq_len: 24}]",), "the length of 24 tokens"),
    ],
)
def test_pieces_that_cannot_be_are_refused_by_name(preset, words, found, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_config(tmp_path, preset, "trainer.piece_tokens=16", *words)
    assert "trainer.piece_tokens = 16" in str(caught.value) and found in str(caught.value)
