"""Every shipped configuration composes, parses, and says the truth about its model.

A run's identity is what defines it.
"""

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from pdn.cli.compose import CONFIGS, Composed, compose
from pdn.cli.parse import parse
from pdn.cli.paths import at
from pdn.models.language_model import LanguageModel
from pdn.runs.schema import config_changes
from pdn.training.config import RunConfig
from pdn.training.names import former_name, name_of
from pdn.training.setup import repeats_bits

GROUPS = ("model", "data", "optim", "schedule", "parallel", "eval", "logger", "experiment")
OPTIONS = [
    (group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))
]
MODELS = [name for group, name in OPTIONS if group == "model"]
MIXERS = [path.stem for path in sorted((CONFIGS / "mixer").glob("*.yaml"))]
SIZES = [path.stem for path in sorted((CONFIGS / "model" / "size").glob("*.yaml"))]

# From the paper, its released configurations, and an independent count, at a vocabulary of 32,000
# with tied embeddings
PARAMETERS = {
    "deltanet_340m": 341_594_112,
    "gdn_340m": 341_791_104,
    "pgdn_340m": 342_184_896,
    "kda_340m": 354_226_368,
    "pkda_340m": 354_620_160,
    "gdn_1b": 995_009_952,
    "pgdn_1b": 996_215_184,
    "pdn_340m": 341_987_904,
    "pdn_1b": 995_612_400,
    "deltanet_1b": 994_407_168,
    "kda_1b": 995_186_832,
    "pkda_1b": 996_392_064,
    "kda_1b_d1680": 902_662_176,
    "pkda_1b_d1680": 903_792_144,
    "transformer_340m": 341_099_520,
    "transformer_1b": 993_285_888,
    "mamba2_340m": 343_018_656,
    "mamba2_1b": 990_363_096,
    "mamba2_340m_48": 349_619_712,
}


@cache
def config_of(*overrides: str) -> RunConfig:
    return parse(compose(overrides))


def with_values(*assignments: str) -> RunConfig:
    """Return the default configuration with keys set after composing, which is faster.

    For example ``trainer.steps=400``.
    """
    values = copy.deepcopy(default().values)
    for assignment in assignments:
        path, _, value = assignment.partition("=")
        parent, _, name = path.rpartition(".")
        holder = at(parent, values)
        assert name in holder, path
        holder[name] = yaml.safe_load(value)
    return RunConfig.model_validate(values)


@cache
def default() -> Composed:
    return compose([])


@pytest.mark.parametrize(("group", "name"), [option for option in OPTIONS if option[0] != "model"])
def test_every_option_of_every_group_composes_and_parses(group, name):
    config_of(f"{group}={name}")


@pytest.mark.parametrize("name", SIZES)
def test_every_size_composes_and_parses(name):
    config_of(f"model/size@model={name}")


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_composes_into_a_model(name):
    config_of(f"mixer@model.mixers.pgdn={name}")


def test_no_yaml_file_is_left_out_of_these_tests():
    seen = {CONFIGS / group / f"{name}.yaml" for group, name in OPTIONS}
    seen |= {CONFIGS / "mixer" / f"{name}.yaml" for name in MIXERS} | {
        CONFIGS / "model/size" / f"{name}.yaml" for name in SIZES
    }
    seen |= {CONFIGS / "train.yaml"}
    # tests/cli/test_launch.py; tests/evals; tests/reports
    elsewhere = ("hydra/launcher", "eval/suites", "eval/tasks", "experiment/evidence")
    seen |= {path for folder in elsewhere for path in (CONFIGS / folder).glob("*.yaml")}
    assert set(CONFIGS.rglob("*.yaml")) == seen


@pytest.mark.parametrize(
    "name",
    [n for g, n in OPTIONS if g == "experiment" and n not in ("mqar", "pgdn_340m_long")],
)
def test_an_experiment_trains_the_model_of_its_name_with_the_papers_recipe(name):
    config = config_of(f"experiment={name}")
    assert config.model.name == name
    assert config.trainer.global_batch_size * config.data.seq_len == 2**19  # tokens a step
    assert config.trainer.steps == {"340m": 30_000, "1b": 95_000}[name.rpartition("_")[2]]
    assert (config.optim.lr, config.optim.betas, config.optim.eps, config.optim.weight_decay) == (
        4e-4,
        (0.9, 0.95),
        1e-8,
        0.01,
    )
    assert config.optim.groups.embeddings.lr_scale == 1.0
    assert (
        config.schedule.kind,
        config.schedule.warmup_steps,
        config.schedule.final_lr_fraction,
    ) == ("cosine", 1024, 0.1)
    assert config.trainer.grad_clip == 1.0
    assert config.data.corpus == "slimpajama"


def test_the_embeddings_rate_is_the_recipes_and_one_where_a_size_file_names_none():
    def scale(*overrides: str) -> float:
        return config_of(*overrides).optim.groups.embeddings.lr_scale

    assert RunConfig.model_validate(default().values).optim.groups.embeddings.lr_scale == 4.0
    assert scale("~model.recipe.embedding_lr_scale") == 1.0
    assert scale("optim=muon", "model.recipe.embedding_lr_scale=3.0") == 3.0
    assert scale("optim.groups.embeddings.lr_scale=2.0") == 2.0


def test_a_longer_context_keeps_the_tokens_of_a_step_and_begins_where_the_trunk_ended():
    trunk, config = config_of("experiment=pgdn_340m"), config_of("experiment=pgdn_340m_long")
    assert config.branch_from == f"runs/pgdn_340m@{trunk.trainer.steps}"
    assert config.model == trunk.model
    rate = trunk.optim.lr * trunk.schedule.final_lr_fraction
    assert config.optim.lr == pytest.approx(rate) and config.optim.betas == trunk.optim.betas
    parts = config.every_phase()
    assert [part.data.seq_len for part in parts] == [8192, 32768, 131072]
    for part in parts:
        assert part.trainer.global_batch_size * part.data.seq_len == 2**19
        length = min(part.data.seq_len, config.trainer.piece_tokens)
        assert part.trainer.micro_batch_size * length <= 16 * 2048
        assert config.data.unit_tokens % part.data.seq_len == 0


# ------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_name_of_its_file_and_the_parameters_that_its_configuration_says(name):
    model = config_of(f"model={name}", "model.vocab_size=32000").model
    assert model.name == name
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in LanguageModel(model).parameters())
    assert model.num_params() == built
    assert built == PARAMETERS.get(name, built)
    if not name.endswith("_tiny"):
        comment = (CONFIGS / "model" / f"{name}.yaml").read_text().splitlines()[0]
        assert comment.startswith(f"# {built:,} parameters with a vocabulary of 32,000")


def test_the_table_of_parameters_names_models_that_exist():
    assert set(PARAMETERS) <= set(MODELS)


# ------------------------------------------------------------ identity

GROUPS_THAT_DEFINE = ["model=gdn_tiny", "data=mqar", "schedule=constant"]
KEYS_THAT_DEFINE = [
    "seed=1",
    "init_from=elsewhere",
    "model.num_layers=2",
    "model.vocab_size=5000",
    "model.mixers.pgdn.preconditioner.bound=1.2",
    "data.path=elsewhere",
    "data.seq_len=128",
    "data.seed=1",
    "data.document_isolation=true",
    "optim.lr=0.1",
    "optim.betas=[0.9, 0.99]",
    "optim.decay=all",
    "optim.ema=0.99",
    "optim.groups.vectors.lr_scale=2.0",
    "schedule.warmup_steps=5",
    "trainer.steps=400",
    "trainer.global_batch_size=32",
    "trainer.grad_clip=2.0",
    "trainer.z_loss=0.0001",
    "trainer.precision=bf16",
]
GROUPS_THAT_DO_NOT = ["eval=none", "logger=none", "parallel=ddp"]
KEYS_THAT_DO_NOT = [
    "output_dir=elsewhere",
    "resume=step:5",
    "trainer.stop_at=10",
    "trainer.micro_batch_size=2",
    "trainer.device=cpu",
    "trainer.log_every=7",
    "trainer.stall_timeout=5.0",
    "trainer.dry_run=true",
    "checkpoint.every=7",
    "checkpoint.keep_last=5",
    "checkpoint.asynchronous=false",
    "eval.max_samples=3",
    "logger.project=other",
    "parallel.activation_checkpointing=full",
    "parallel.compile=true",
    "data.cache_dir=elsewhere",
    "data.workers=0",
]


@pytest.mark.parametrize("override", GROUPS_THAT_DEFINE + KEYS_THAT_DEFINE)
def test_what_defines_a_run_changes_its_identity_and_name(override):
    config = config_of(override) if override in GROUPS_THAT_DEFINE else with_values(override)
    assert config.identity() != with_values().identity()
    assert name_of(config) != name_of(with_values())


@pytest.mark.parametrize("override", GROUPS_THAT_DO_NOT + KEYS_THAT_DO_NOT)
def test_what_does_not_define_a_run_keeps_its_identity_and_name(override):
    config = config_of(override) if override in GROUPS_THAT_DO_NOT else with_values(override)
    assert config != with_values()
    assert config.identity() == with_values().identity()
    assert name_of(config) == name_of(with_values())


ONE_RATE = "optim.groups.embeddings.lr_scale=1.0"  # what all recipes had at first
RUN = ["data=text", "trainer.steps=20", "eval.every=10", "checkpoint.every=10", "logger=none"]


@pytest.mark.parametrize("name", ["pgdn_tiny-text-8c6388d6", "hybrid_tiny-text-a542d673"])
def test_the_default_names_of_the_first_runs_stay_theirs(name):
    """Take the names from runs of the first release: a new key must not rename them."""
    assert former_name(config_of(f"model={name.partition('-')[0]}", ONE_RATE, *RUN)) == name


def test_a_key_younger_than_a_run_counts_as_changed_only_where_it_changes_the_run():
    recorded = with_values(ONE_RATE).model_dump(mode="json")
    del recorded["optim"]["decay"], recorded["optim"]["groups"], recorded["trainer"]["z_loss"]
    for assignment, changed in (
        ((), []),
        (("optim.decay=all",), ["optim.decay"]),
        (("trainer.z_loss=0.0001",), ["trainer.z_loss"]),
    ):
        now = with_values(ONE_RATE, *assignment)
        before = RunConfig.completed(recorded)
        found = config_changes(before, now.model_dump(mode="json"), now.may_change())
        assert [key for key, *_ in found] == changed
        assert (name_of(now) != name_of(with_values(ONE_RATE))) == bool(changed)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (
            "model=gdn_340m data=slimpajama optim.lr=4e-4 seed=1",
            "gdn-340m-slimpajama-lr4e-4-s1",
        ),
        ("model=pgdn_tiny data.path=/my.books/ optim.lr=0.00035", "pgdn-tiny-my-lr3.5e-4-s0"),
        ("model=pgdn_tiny data=mqar", "pgdn-tiny-mqar-lr2e-3-s0"),
    ],
)
def test_a_default_name_says_what_the_run_is(words, name):
    assert re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{6}}", name_of(config_of(*words.split())))


def test_only_a_schedule_that_ends_by_steps_has_their_number_in_its_name():
    def name(*words):
        return name_of(config_of(*words))

    wsd = "schedule=wsd", "schedule.decay_steps=20"
    assert name(*wsd, "trainer.steps=100") == name(*wsd, "trainer.steps=200")
    assert name("schedule=constant", "trainer.steps=100") == name("schedule=constant")
    assert name("trainer.steps=100") != name("trainer.steps=200")


def test_a_given_name_is_the_runs_name_and_no_part_of_its_identity():
    assert name_of(with_values("name=mine")) == "mine"
    assert with_values("name=mine").identity() == with_values().identity()


@pytest.mark.parametrize(
    ("group", "name"), [("data", "mixture"), ("data", "slimpajama"), ("experiment", "pkda_340m")]
)
def test_a_recorded_configuration_parses_to_the_same_one(group, name):
    config = config_of(f"{group}={name}")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_paths_in_the_configuration_are_no_places_of_this_machine():
    for file in CONFIGS.rglob("*.yaml"):
        for line in file.read_text().splitlines():
            value = line.partition(": ")[2]
            assert not value.startswith("/") or value.startswith("//"), f"{file}: {line}"
    assert not Path(with_values().output_dir).is_absolute()


@pytest.mark.parametrize("size", ["340m", pytest.param("1b", marks=pytest.mark.slow)])
def test_a_large_preset_trains_on_the_corpus_of_its_recipe_unless_told_otherwise(size):
    for file in sorted((CONFIGS / "model").glob(f"*_{size}.yaml")):
        data = config_of(f"model={file.stem}").data
        assert getattr(data, "corpus", None) == "slimpajama", file
    assert config_of(f"model=pgdn_{size}", "data=text").data.kind == "text"
    assert config_of("model=pgdn_tiny").data.kind == "text"


@pytest.mark.parametrize(
    ("words", "device", "expected"),
    [
        (["model=pgdn_tiny"], "cuda", True),
        (["model=hybrid_tiny"], "cuda", False),
        (["model=hybrid_tiny", "trainer.deterministic=true"], "cuda", True),
        (["model=transformer_tiny"], "cpu", True),
    ],
)
def test_a_launch_knows_whether_its_steps_repeat_their_bits(words, device, expected):
    assert repeats_bits(parse(compose(words)), torch.device(device)) is expected
