"""Export: names and shapes of the released classes, and the same logits in them."""

import json
from pathlib import Path

import pytest
import torch

from pdn.errors import ConfigError
from pdn.hub import export
from pdn.hub.architectures import exported_shape, target_of
from pdn.models.language_model import LanguageModel
from pdn.reports.plots import save_curves
from tests.hub.small import exported, run_of, tokens
from tests.presets import released_config, released_model

FLA = [
    "deltanet_tiny",
    "deltanet_neg_tiny",
    "gdn_tiny",
    "gdn_neg_tiny",
    "kda_tiny",
    "kda_neg_tiny",
    "pdn_tiny",
    "pgdn_tiny",
    "pkda_tiny",
]
TRANSFORMERS = ["transformer_tiny", "mamba2_tiny"]
OWN = ["hybrid_tiny", "pcomba_tiny", "pla_tiny", "pmamba2_tiny", "pdelta_product_tiny"]
TENSORS = json.loads((Path(__file__).parents[1] / "fixtures" / "fla_tensors.json").read_text())


# ---------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("name", FLA)
def test_every_tensor_of_the_released_class_is_there_in_its_shape(name):
    model = released_model(name)
    target, why_own = target_of(model.config)
    assert why_own is None
    ours = {
        target.names[key]: list(exported_shape(target.names[key], value))
        for key, value in model.named_parameters()
    }
    ours |= {key: list(value.shape) for key, value in target.constants.items()}
    assert ours == TENSORS[name]["tensors"]
    assert target.architecture == TENSORS[name]["class"]


@pytest.mark.slow
def test_the_recorded_tensors_are_those_of_the_installed_library():
    pytest.importorskip("fla")
    from transformers import AutoConfig, AutoModelForCausalLM

    for name in FLA:
        target, _ = target_of(released_config(name))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(target.model_type, **target.config)
            )
        model.tie_weights()
        assert {key: list(value.shape) for key, value in model.named_parameters()} == TENSORS[name][
            "tensors"
        ]


@pytest.mark.parametrize("name", OWN)
def test_a_model_without_released_class_says_why(name):
    target, why_own = target_of(released_config(name))
    assert target.library == "pdn" and why_own


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gdn_tiny", "model.mixers.gdn.gain.range=1.5"),
        ("gdn_tiny", "model.mixers.gdn.norm_eps=1e-5"),
        ("gdn_tiny", "model.mixers.gdn.qk_l2norm=false"),
        ("gdn_tiny", "model.mixers.gdn.output_gate.kind=sigmoid"),
        ("gdn_tiny", "model.mixers.gdn.feature_map=relu"),
        ("pgdn_tiny", "model.mixers.pgdn.preconditioner.squash=tanh"),
        ("transformer_tiny", "model.mixers.attention.positions=nope"),
        ("comba_tiny", "model.mixers.comba.form=decayed"),
        ("mamba2_tiny", "model.mixers.mamba2.num_groups=2"),
        ("mamba2_tiny", "model.norm_eps=1e-6"),
    ],
)
def test_a_computation_that_the_released_class_has_not_is_never_exported_as_one(name, change):
    assert target_of(released_config(name, change))[0].library == "pdn"


# ---------------------------------------------------------------- the folder in its library


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_computes_the_same_logits(name, tmp_path):
    import transformers

    model, folder = exported(name, tmp_path)
    # Name the class: flash-linear-attention, once imported, claims Mamba-2 for its own.
    library_class = getattr(transformers, target_of(model.config)[0].architecture)
    theirs, report = library_class.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens()).logits, theirs.eval()(tokens()).logits, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("name", ["hybrid_tiny", "pla_tiny"])
def test_our_own_class_loads_scores_and_generates(name, tmp_path):
    from transformers import AutoModelForCausalLM

    import pdn.hub.modeling  # noqa: F401
    from pdn.inference.generate import generate

    model, folder = exported(name, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x = tokens()
    with torch.no_grad():
        assert torch.equal(model(x).logits, theirs(x).logits)
    expected = torch.stack(list(generate(model, x.tolist(), max_new_tokens=8, temperature=0)), 1)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(theirs.generate(x, **options)[:, 80:], expected)
    assert theirs.generate(x, num_beams=2, **options).shape == (2, 88)
    with pytest.raises(ValueError, match="padding on the left"):
        theirs(x, attention_mask=torch.tensor([[0] + [1] * 79, [1] * 80]))


@pytest.fixture(scope="module")
def own_class(tmp_path_factory):
    """Return a function that loads a model in the class of this package, and the model itself."""
    from transformers import AutoModelForCausalLM

    import pdn.hub.modeling  # noqa: F401

    model, folder = exported("hybrid_tiny", tmp_path_factory.mktemp("own"))

    def load(dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    return load, model


def test_a_batch_in_several_parts_has_the_gradient_of_one_under_transformers_trainer(
    own_class, tmp_path
):
    from transformers import Trainer, TrainingArguments

    load, _ = own_class
    rows = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
    # Rows of unequal numbers of labels: a mean of means is not the mean.
    data = [{"input_ids": r, "labels": r[:n] + [-100] * (16 - n)} for n, r in enumerate(rows, 4)]
    found = []
    for per_device, accumulation in ((8, 1), (2, 4)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulation, max_steps=1, logging_steps=1, report_to=[],
            use_cpu=True, max_grad_norm=1e9, seed=0, disable_tqdm=True, save_strategy="no",
            gradient_checkpointing=accumulation > 1,
        )  # fmt: skip
        trainer = Trainer(model=load(), args=arguments, train_dataset=data)
        trainer.train()
        found.append([trainer.state.log_history[0][key] for key in ("loss", "grad_norm")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_recomputed_blocks_give_the_same_gradients(own_class):
    load, _ = own_class
    x, gradients = tokens(), []
    for recomputing in (False, True):
        model = load().train()
        if recomputing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@torch.no_grad()
def test_a_cache_is_advanced_in_place_and_padding_on_the_right_changes_nothing(own_class):
    model = own_class[0]().eval()
    x = tokens()
    whole = model(x).logits
    first = model(x[:, :50], use_cache=True)
    cache = first.past_key_values
    rest = model(x[:, 50:], past_key_values=cache, position_ids=torch.arange(50, 80).expand(2, -1))
    assert rest.past_key_values is cache and cache.get_seq_length() == 80
    torch.testing.assert_close(rest.logits, whole[:, 50:], rtol=0, atol=1e-5)
    padded = torch.cat([x, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.cat([torch.ones_like(x), torch.zeros(2, 3, dtype=torch.int64)], 1)
    kept = model(padded, attention_mask=mask).logits[:, :80]
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-5)
    assert torch.equal(model(x, logits_to_keep=2).logits, whole[:, -2:])
    assert torch.equal(model(x, return_dict=False)[0], whole)


@torch.no_grad()
def test_documents_that_positions_tell_apart_do_not_see_each_other(own_class):
    model = own_class[0]().eval()
    x = tokens()[:1]
    positions = torch.cat([torch.arange(30), torch.arange(50)])[None]
    packed = model(x, position_ids=positions).logits
    alone = torch.cat([model(x[:, :30]).logits, model(x[:, 30:]).logits], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    x = tokens()
    every = model(x, position_ids=positions.repeat(2, 1)).logits
    assert torch.equal(model(x, position_ids=positions).logits, every)
    torch.testing.assert_close(every[:1], packed, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_of_another_type_means_the_same(own_class):
    model = own_class[0]().eval()
    mask = torch.ones_like(tokens()).index_fill(1, torch.tensor([78, 79]), 0)
    expected = model(tokens(), attention_mask=mask).logits
    for kind in (torch.bool, torch.float32, torch.uint8):
        assert torch.equal(model(tokens(), attention_mask=mask.to(kind)).logits, expected)


def test_what_our_own_class_cannot_do_is_refused_by_name(own_class):
    from transformers import DynamicCache

    model = own_class[0]().eval()
    x = tokens()
    right = torch.ones_like(x).index_fill(1, torch.tensor([79]), 0)
    for error, named, arguments in [
        (TypeError, "inputs_embeds", {"inputs_embeds": torch.zeros(2, 80, 8)}),
        (TypeError, "output_hidden_states", {"output_hidden_states": True}),
        (TypeError, "output_attentions", {"output_attentions": True}),
        (TypeError, "past_key_values: found a DynamicCache", {"past_key_values": DynamicCache()}),
        (ValueError, "padding on the left", {"attention_mask": right.flip(1)}),
        (ValueError, "enter the states", {"attention_mask": right, "use_cache": True}),
        (ValueError, "attention_mask: expected", {"attention_mask": right[:, None, None]}),
        (ValueError, "attention_mask: expected", {"attention_mask": 1 + right}),
        (ValueError, "attention_mask: expected", {"attention_mask": right[:1]}),
        (ValueError, "attention_mask: expected", {"attention_mask": right[:, :70]}),
        (ValueError, "position_ids: found", {"position_ids": torch.arange(80)}),
        (ValueError, "position_ids: found", {"position_ids": torch.arange(70)[None]}),
        (ValueError, "position_ids: expected", {"position_ids": torch.arange(5, 85).expand(2, -1)}),
    ]:
        with pytest.raises(error, match=named):
            model(x, **arguments)
    with pytest.raises(ValueError, match="enter the states"):
        model.generate(x, attention_mask=right, max_new_tokens=2)
    documents = torch.arange(40).repeat(2).expand(2, -1)
    with pytest.raises(ValueError, match="position_ids: found several documents"):
        model.generate(x, position_ids=documents, max_new_tokens=2)
    for prompt in ({}, {"input_ids": x}):
        with pytest.raises(ValueError, match="inputs_embeds"):
            model.generate(**prompt, inputs_embeds=torch.zeros(2, 80, 8), max_new_tokens=2)
    for size in ({"new_num_tokens": 300}, {"pad_to_multiple_of": 100}):
        with pytest.raises(NotImplementedError, match="resize_token_embeddings to 300"):
            model.resize_token_embeddings(**size)
    model.resize_token_embeddings(pad_to_multiple_of=128)
    options = {"return_dict_in_generate": True, "output_hidden_states": True}
    with pytest.raises(TypeError, match="output_hidden_states"):
        model.generate(x, max_new_tokens=2, **options)
    cache = model(x, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: has seen 80 tokens of 80"):
        model.generate(x, past_key_values=cache, max_new_tokens=2)


def test_a_fresh_model_of_our_own_class_is_initialised_and_tied(own_class):
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = AutoConfig.for_model("pdn", pdn=own_class[0]().config.pdn)
    found = []
    for _ in range(2):
        set_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        assert model.lm_head.weight is model.model.embedding.weight
        assert 0.01 < model.lm_head.weight.std() < 0.03
        found.append(model(tokens()).logits)
    assert found[0].isfinite().all() and torch.equal(*found)


def test_what_is_put_around_the_head_counts(own_class):
    model = own_class[0]()
    expected = 2 * model(tokens()).logits
    model.lm_head.register_forward_hook(lambda _, __, logits: 2 * logits)
    assert torch.equal(model(tokens()).logits, expected)


def test_decays_and_norms_stay_float32_in_a_bfloat16_model(own_class):
    load, original = own_class
    model = load(torch.bfloat16)
    delicate = {
        f"{name}.{own}"
        for name, module in original.named_modules()
        if not getattr(module, "weight_decay", True)
        for own, _ in module.named_parameters()
    }
    assert delicate
    for name, parameter in model.model.named_parameters():
        wanted = torch.float32 if name in delicate else torch.bfloat16
        assert parameter.dtype == wanted, name
    assert model(tokens()).logits.isfinite().all()


def released(folder: Path, device: str) -> torch.nn.Module:
    """Load the class that AutoModelForCausalLM finds once fla is imported.

    All its tensors are there, in their shapes.
    """
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (
        type(theirs).__name__
        == json.loads((folder / "config.json").read_text())["architectures"][0]
    )
    return theirs.to(device).eval()


def error(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits.double().cpu() - exact).norm() / exact.norm())


@torch.no_grad()
def float32_error(model: LanguageModel, theirs: torch.nn.Module, device: str, length: int) -> float:
    """Return the error in float32.

    Up to 64 tokens the library works token by token; its chunkwise delta rule refuses float32.
    """
    x = tokens()[:1, :length]
    exact = model.double().cpu()(x).logits
    model.float()
    return error(theirs(x.to(device)).logits, exact)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles here; the test on a GPU takes its place"
)
@pytest.mark.parametrize("name", FLA)
def test_the_released_class_computes_the_same_logits_under_the_interpreter(name, tmp_path, untuned):
    model, folder = exported(name, tmp_path)
    assert float32_error(model, released(folder, "cpu"), "cpu", length=12) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLA)
def test_the_released_class_computes_the_same_logits_on_a_gpu(name, tmp_path, untuned, capsys):
    """Compare float32 to 1e-5, and bf16 with the error of our own kernels.

    In bf16 it is no further from the exact logits than our own kernels, whose loss it has to 2e-3.
    bf16 alone moves the logits of either by about 1e-2, so that a bound of 2e-3 on them would
    refuse both.
    """
    torch.set_float32_matmul_precision("highest")
    model, folder = exported(name, tmp_path, "model.head_dim=64", "model.d_model=128")
    theirs = released(folder, "cuda")
    float32 = float32_error(model, theirs, "cuda", length=64)
    x = tokens().repeat(1, 2)  # more than 64 tokens: chunkwise
    with torch.no_grad():
        exact = model.double().cpu()(x).logits
        model.float().cuda()
        with torch.autocast("cuda", torch.bfloat16):
            logits = [m(x.cuda()).logits.double().cpu() for m in (model, theirs)]
    ours, released_one = (error(found, exact) for found in logits)
    losses = [
        torch.nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten()).item()
        for y in logits
    ]
    largest = (logits[0] - logits[1]).abs().max().item()
    with capsys.disabled():
        print(
            f"\n{name:18} float32 {float32:.1e}; bf16 {released_one:.1e}, ours {ours:.1e}, largest "
            f"difference {largest:.1e}, "
            f"loss {losses[0] - losses[1]:+.1e}"
        )
    assert float32 <= 1e-5
    assert released_one <= 1.5 * ours and ours <= 2e-2
    assert abs(losses[0] - losses[1]) <= 2e-3


def test_the_tokenizer_ends_documents_and_puts_nothing_before_them(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    _, folder = exported("pgdn_tiny", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc")["input_ids"] == [3, 4, 5]
    assert tokenizer.eos_token_id == 0 and tokenizer.bos_token is None
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0


def test_the_card_says_how_to_load_and_shows_curves_and_scores(tmp_path):
    run = run_of(released_model("pgdn_tiny"), tmp_path / "run")
    records = [
        {"step": s, "tokens": 64 * s, "loss": 5 / s, "tokens_per_second": 9.0} for s in range(1, 8)
    ]
    records.append({"step": 7, "validation/loss": 1.25, "validation/perplexity": 3.49})
    (run.directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    (run.directory / "evaluations").mkdir()
    result = {
        "options": {"limit": 20},
        "results": [
            {"task": "piqa", "metric": "acc", "value": 0.5123}
            | {"stderr": 0.1, "n": 20, "condition": "limit=20"}
        ],
    }
    (run.directory / "evaluations" / "step-00000007-piqa.json").write_text(json.dumps(result))
    export(run, tmp_path / "out", curves=save_curves)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "import fla",
        "| piqa | limit=20 | acc | 0.5123 ± 0.1 | 20 |",
        "| validation |  | loss | 1.25 |  |",
        "curves.png",
    ):
        assert part in card
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_a_picture_that_cannot_be_drawn_does_not_keep_the_model_from_being_exported(
    tmp_path, caplog
):
    def no_library(directory, file):
        raise ConfigError("PLOTS", "matplotlib is not installed")

    (tmp_path / "run").mkdir()
    run = run_of(released_model("pgdn_tiny"), tmp_path / "run")
    export(run, tmp_path / "out", curves=no_library)
    assert "curves.png" not in (tmp_path / "out" / "README.md").read_text()
    assert "the model card has no curves: pdn[E-PLOTS] matplotlib" in caplog.text
