"""Bad configurations: each gets one message.

It names the key path, the place, what was found, what was expected, the fix.
"""

import pytest

from pdn.cli.compose import Source, compose
from pdn.cli.parse import parse
from pdn.errors import ConfigError

SHIPPED = Source()


def refused(*overrides: str, source: Source = SHIPPED, world_size: int = 1) -> str:
    """Return the message of the refusal."""
    with pytest.raises(ConfigError) as caught:
        parse(compose(overrides, source), world_size)
    assert caught.value.exit_code == 78
    return str(caught.value)


# Overrides, separated by spaces, and fragments of the message
COMMAND_LINE = [
    (
        "trainer.profile={steps:[9,5]}",
        "trainer.profile.steps (command line)",
        "the first step and the last",
    ),
    ("trainer.profile={steps:[2,5]}", "trainer.profile.steps", "found 2"),
    (
        "data=text data.path=",
        "data.path (command line)",
        "found an empty path",
        "expected a file or directory",
    ),
    ("data=text data.text_field=", "data.text_field (command line): found ''", "not empty"),
    (
        "trainer.lrr=1",
        "pdn[E-CONFIG-KEY] trainer.lrr (command line): found an unknown key",
        "did you mean optim.lr?",
    ),
    ("lr=1", "lr (command line)", "did you mean optim.lr?"),
    (
        "model=pgdn_tiny model.mixers.gdn.decay.spread=true",
        "model.mixers.gdn.decay.spread (command line): found no entry gdn; expected pgdn",
        "did you mean model.mixers.pgdn.decay.spread?",
    ),
    ("model.mixers.decay.spread=true", "did you mean model.mixers.pgdn.decay.spread?"),
    ("decay.spread=true", "did you mean model.mixers.pgdn.decay.spread?"),
    ("model.mixers.gdn.x=1", "found no entry gdn; expected pgdn; remove it"),
    (
        "trainer.steps 10",
        "found trainer.steps 10; expected key=value in one word; write trainer.st",
    ),
    ("trainer.steps: 10", "in one word; write trainer.steps=10"),
    ("trainer.steps:10", "expected key=value; write trainer.steps=10"),
    ("trainer.steps==10", "expected key=value; write trainer.steps=10"),
    ("optim.lr=1e-3,", "expected key=value; write optim.lr=1e-3"),
    ("resume=false", "found false", "write resume=never"),
    ("hydra=x", "hydra (command line): found a setting of Hydra"),
    ("data=my/text.txt", "found 'my/text.txt'", "write data=text data.path=my/text.txt"),
    ("seed.x=1", 'seed (command line): found {"x": 1}; expected an integer'),
    ("trainr.steps=4", "trainr.steps (command line)", "did you mean trainer.steps"),
    ("modle=pgdn_tiny", "modle (command line)", "did you mean model"),
    (
        "+train.lrr=1",
        "pdn[E-CONFIG-KEY] train.lrr (command line): found an unknown key",
        "did you mean optim.lr?",
    ),
    (
        "+foo=1",
        "foo (command line): found an unknown key",
        "expected one of branch_from, checkpoint, data,",
        "remove it",
    ),
    (
        "model=pgdn_2b",
        "pdn[E-CONFIG-GROUP] model (command line): found 'pgdn_2b'",
        "did you mean pgdn_1b",
    ),
    ("model=PGDN_Tiny", "model (command line): found 'PGDN_Tiny'", "did you mean pgdn_tiny"),
    (
        "data=null",
        "pdn[E-CONFIG-GROUP] data (command line): found null",
        "expected one of",
        "shards",
    ),
    ("~data", "pdn[E-CONFIG-GROUP] data (command line): found nothing chosen", "set data=<name>"),
    (
        "~model=odd",
        "pdn[E-CONFIG-GROUP] ~model (command line): found 'odd'; expected 'pgdn_tiny'; write "
        "model=<name> to have another",
    ),
    (
        "~optim=muon ~trainer.step ~experiment=a",
        "~optim (command line): found 'muon'; expected 'adamw'",
        "~trainer.step (command line): found nothing to take away",
        "did you mean trainer.steps",
        "~experiment (command line): found 'a'; expected what is there",
    ),
    ("~seed=7", "~seed (command line): found 7; expected 0; write seed=<value> to have another"),
    (
        "~phases ~trainer.stop_at=5",
        "~phases (command line): found null; expected a value to take away; leave it out: phases",
        "~trainer.stop_at (command line): found 5; expected a value to take away",
    ),
    ("experiment=null", "experiment (command line): found null", "leave it out"),
    ("trainer=null", "trainer (command line): found null; expected a group of keys"),
    ("checkpoint=null", "checkpoint (command line): found null; expected a group of keys"),
    (
        "trainer.steps=null",
        "trainer.steps (command line): found null; expected an integer",
        "shipped value",
    ),
    ("~trainer.steps", "trainer.steps (command line): found no value", "set trainer.steps=<value>"),
    (
        "optim.lr=abc",
        "pdn[E-CONFIG-VALUE] optim.lr (command line): found 'abc'; expected a number",
        "shipped value",
    ),
    ("optim.lr='0.1'", "found '0.1'; expected a number; write 0.1 without quotes"),
    ("optim.lr=nan", "found NaN; expected a finite number"),
    ("optim.lr=1e400", "found Infinity; expected a finite number"),
    ("optim.betas=[0.9]", "optim.betas (command line): found [0.9]; expected at least 2 entries"),
    ("optim.betas.1=1.0", "optim.betas.1 (command line): found 1.0; expected less than 1"),
    ("trainer.steps=1.5", "trainer.steps (command line): found 1.5; expected an integer"),
    ("trainer.steps=2.0", "found 2.0; expected an integer; write 2"),
    ("trainer.steps=true", "found true; expected an integer"),
    ("trainer.steps=-5", "trainer.steps (command line): found -5; expected at least 1"),
    ("trainer.dry_run=1", "trainer.dry_run (command line): found 1; expected true or false"),
    (
        "checkpoint.every=0",
        "checkpoint.every (command line): found 0; expected at least 1; leave it out for the "
        "shipped value 500",
    ),
    ("eval.every=0", "eval.every (command line): found 0; expected at least 1"),
    (
        "seed=010",
        "seed (command line): found '010'; expected an integer",
        "without leading zeros or colons, e.g. 10",
    ),
    (
        "seed=12:30:45",
        "seed (command line): found '12:30:45'; expected an integer",
        "without leading zeros or colons",
    ),
    ("trainer.device=cud", "found 'cud'; expected one of auto, cpu, cuda; did you mean cuda"),
    ("optim.kind=adam", "optim.kind (command line): found 'adam'; expected", "did you mean adamw?"),
    (
        "model.mixers.pgdn.decay.kind=scaler",
        "model.mixers.pgdn.decay.kind (command line)",
        "did you mean scalar?",
    ),
    (
        "model.mixers.pgdn.preconditioner.bound=3",
        "preconditioner.bound (command line): found 3; expected at most 2",
    ),
    (
        "resume=yes",
        "resume (command line): found 'yes'; expected one of auto, never, restart, step:<number>",
    ),
    (
        "model.pattern=[gdn,gdnn]",
        "model.pattern: found 'gdnn'",
        "configs/mixer",
        "did you mean gdn",
    ),
    ("seed=99999999999999999999", "expected less than 2147483648"),
    ("branch_from=runs/a", "branch_from (command line): found 'runs/a'; expected <run>@<step>"),
    ("model.pattern=[]", "found []; expected at least 1 entry"),
    ("eval.every=1h", "expected an integer of steps, {seconds: s} or {tokens: n}"),
    ("trainer.device=gpu", "did you mean cuda?"),
    ("optim.betas=[0.9,1.5]", "optim.betas.1 (command line): found 1.5; expected less than 1"),
    (
        "--model pgdn_tiny",
        "found --model pgdn_tiny; expected key=value in one word; write model=pg",
    ),
    ("--seed -1", "write seed=-1"),
    ("--dry-run", "write dry_run=<value>"),
    ("seed = 1", "found seed = 1; expected key=value in one word; write seed=1"),
    ("seed =1", "write seed=1"),
    ("optim.lr= 1e-3", "found optim.lr= 1e-3; expected key=value in one word; write optim.lr=1e-3"),
    ("name=my run", "write run=<value>, or with the word before: 'name=my run'"),
    ("seed=1, 2", "cut at its spaces; expected one word; write seed=1,2"),
    ("optim.lr=1e-3, 2e-3, 3e-3 seed=1", "write optim.lr=1e-3,2e-3,3e-3"),
    ("seed=1,,2", "found seed=1,,2", "write seed=1,2"),
    ("seed=1,", "found seed=1,", "write seed=1"),
    ("optim.betas=(0.9,0.95)", "write 'optim.betas=[0.9,0.95]'"),
    ('data.path=it"s', "quote a value with special characters: data.path=\\''it\"s'\\'"),
    ("+seed=1", "+seed=1 (command line): found an addition of a key that is there", "write seed=1"),
    ("+logger=wandb", "found an addition; expected one choice; write logger=wandb"),
    ("++experiment=mqar", "found an addition; expected one choice; write experiment=mqar"),
    ("mixer=gdn", "found a place where nothing is chosen", "write model.pattern=[gdn]"),
    ("model@x=gdn_tiny", "found a place where nothing is chosen", "write model=gdn_tiny"),
    ("logger.mode=offline", "logger.mode (command line): found an unknown key", "tags; remove it"),
    ("wandb=true", "wandb (command line): found an unknown key", "write logger=wandb"),
    ("parallel.fsdp=true", "reshard_after_forward, shard; write parallel=fsdp"),
    ("logger=null", "logger (command line): found null", "write logger=none"),
    ("eval=off", "eval (command line): found 'off'", "write eval=none"),
    ("trainer.epochs=3", "did you mean data.max_epochs?"),
    (
        "phases=[{step: 1}] trainer.steps=4",
        "found phases=[{step:, the beginning of a value that the shell has cut at its spaces",
        "quote it: 'phases=[{step: 1}]'",
    ),
    ("data=shards data.text_field=a", "data=text have it: remove it, or choose one of them"),
    (
        "data=stream_local data.path=x data.max_bytes=3",
        "data=text has it: remove it, or choose that",
        "did you mean data.max_cache_bytes?",
    ),
    ("resume=100", "resume (command line): found 100; expected one of auto", "write step:100"),
    ("optim.learning_rate=1", "optim.learning_rate (command line)", "did you mean optim.lr?"),
    ("trainer.batch_size=8", "did you mean trainer.global_batch_size"),
    ("eval/suites=", "eval/suites (command line): found ''", "write eval.suite=<name>"),
    ("eval/suites=commonsense", "found 'commonsense'", "write eval.suite=<name>"),
    ("model=[1,2]", "pdn[E-CONFIG-GROUP] model (command line): found [1, 2]; expected one of"),
    ("model=[gdn_tiny]", "model (command line): found [", "expected one of the"),
    ("data={a:1}", "pdn[E-CONFIG-GROUP] data (command line): found {", "expected one of"),
    (
        "trainer.steps=9223372036854775807",
        "trainer.steps = 9223372036854775807; expected at most",
        "trainer.steps: command line",
    ),
    ("trainer.steps=" + 4000 * "9", "trainer.steps = 999", "expected at most 1,000,000,000"),
    ("trainer.steps=" + 5000 * "9", "pdn[E-CONFIG-SYNTAX]", "4300 digits"),
    ("trainer.global_batch_size=100000000", "expected at most 1,048,576, since"),
    ("data.vocab_size=10000000000", "data.vocab_size"),
    ("model.vocab_size=4294967296", "model.vocab_size = 4294967296; expected at most", "since"),
    ("model.norm_eps=1e308", "model.norm_eps = 1e+308; expected at most 1, since"),
    ("optim.weight_decay=1000", "optim.weight_decay = 1000.0; expected at most 10, since"),
    (
        "output_dir=s3://bucket/runs",
        "output_dir = s3://bucket/runs: found the scheme s3, which is "
        "not supported; expected a local path",
        "output_dir: command line",
    ),
    ("data.path=gs://bucket/text", "data.path = gs://bucket/text: found the scheme gs"),
    ("init_from=https://host/run", "init_from = https://host/run: found the scheme https"),
    ("data.cache_dir=file:///tmp/x", "data.cache_dir = file:///tmp/x: found the scheme file"),
    (
        "name=../other",
        "name (command line): found '../other'; expected the name of a directory below output_dir",
    ),
    (
        "phases=[{steps:5}]",
        "phases.0.steps (command line): found an unknown key; expected one of global_batch_size, ",
        "until, weights; remove it",
    ),
    ("phases=[{trainer:{steps:5}}]", "phases.0.trainer.steps", "until, weights; remove it"),
    ("phases=[{seqlen:5}]", "did you mean phases.0.seq_len?"),
    ("trainer.profile={step:[1,2]}", "expected steps; did you mean trainer.profile.steps"),
    ("trainer.profile={steps:[3]}", "found [3]; expected at least 2 entries"),
    ("trainer.stop_at=0", "found 0; expected at least 1; leave it out for the shipped value null"),
    ("model=a,b", "model (command line): found several values a,b; expected one; add -m"),
    ("--hlep", "found --hlep (no flag of train.py); expected key=value; did you mean --help?"),
    ("seed=1,2", "seed (command line): found several values 1,2; expected one; add -m"),
    (
        "foo",
        "pdn[E-CONFIG-SYNTAX] command line: found foo",
        "expected key=value; write foo=<value>",
    ),
    (
        "pgdn_tiny",
        "pdn[E-CONFIG-SYNTAX] command line: found pgdn_tiny",
        "expected key=value; write model=pgdn_tiny",
    ),
    ("--steps 100", "command line: found --steps 100", "write steps=100"),
    (
        "model=configs/model/pgdn_tiny.yaml",
        "model (command line): found 'configs/model/pgdn_tiny.yaml'",
        "write model=pgdn_tiny",
    ),
    ("eval.tasks=piqa", "eval.tasks (command line): found 'piqa'; expected a list; write [piqa]"),
    ("init_from=", "init_from (command line): found ''; expected text that is not empty"),
    ("--trainer.steps=5", "command line: found --trainer.steps=5", "write trainer.steps=5"),
    ("optim.betas[0]=0.5", "command line: found optim.betas[0]=0.5", "write optim.betas.0=0.5"),
    (
        "trainer.steps=[1",
        "command line: found trainer.steps=[1",
        "quote a value with special characters",
    ),
    ("=5", "command line: found =5", "write <key>=5"),
    (
        "name=${oc.env:PDN_NOT_SET}",
        "name (command line): found '${oc.env:PDN_NOT_SET}', but PDN_NOT_SET is not set",
        "export",
    ),
    ("name=${nope.x}", "name (command line): found '${nope.x}', but there is no key nope.x"),
    (
        "seed=${trainer.steps} trainer.steps=${seed}",
        "pdn[E-CONFIG-INTERPOLATION]",
        "seed (command line)",
        "refers back to itself",
    ),
    ("name=???", "name (command line): found '???'", "set name=<value>"),
    (
        "name=${oc.decode:x}",
        "pdn[E-CONFIG-UNSAFE] name (command line): found the resolver oc.decode",
        "expected one of oc.env",
    ),
    ("name='${oc.env:A,${oc.create:x}}'", "found the resolver oc.create"),
    ("name=${now:%Y}", "found the resolver now"),
    (
        "name=run-${oc.env:MY_API_KEY}",
        "pdn[E-CONFIG-UNSAFE] name (command line): found ${oc.env:MY_API_KEY}",
        "like a secret",
    ),
    (
        "+optim._target_=os.system",
        "pdn[E-CONFIG-UNSAFE] optim._target_ (command line): found a key that names code",
    ),
    (
        "+x={_target_:os.system}",
        "pdn[E-CONFIG-UNSAFE] x (command line): found a key that names code",
    ),
    ("hydra.run.dir=x", "hydra.run.dir (command line): found a setting of Hydra", "add -m"),
    (
        "hydra/launcher=torchrun",
        "hydra/launcher (command line): found a setting of Hydra",
        "add -m",
    ),
    (
        "trainer.global_batch_size=10 trainer.micro_batch_size=4",
        "trainer.global_batch_size = 10 is not divisible by trainer.micro_batch_size = 4; nearest "
        "valid: 8 or 12",
        "trainer.global_batch_size: command line",
    ),
    (
        "trainer.steps=5 schedule.warmup_steps=10",
        "schedule.warmup_steps + schedule.decay_steps = 10 exceed trainer.steps = 5; expected at "
        "most that: shorten the phases, or keep trainer.steps and end early with trainer.stop_at",
        "schedule.warmup_steps: command line",
    ),
    (
        "trainer.stop_at=10 trainer.steps=5 schedule.warmup_steps=1",
        "trainer.stop_at = 10 exceeds trainer.steps = 5",
    ),
    (
        "parallel.context=2 data.seq_len=4",
        "model.mixers.pgdn.conv_size = 4 with parallel.context = 2: a tap reaches over a piece of "
        "2 tokens; expected at least 3",
    ),
    ("parallel.context=2 phases=[{until:3,seq_len:4}]", "a tap reaches over a piece of 2 tokens"),
    ("parallel.context=2 data.seq_len=7", "data.seq_len = 7 is not divisible by parallel.context"),
    (
        "parallel=hsdp",
        "parallel.replicate = 2 does not divide the number of processes, 1",
        "hsdp.yaml:1",
    ),
]


@pytest.mark.parametrize(
    ("line", "fragments"), [(line, fragments) for line, *fragments in COMMAND_LINE]
)
def test_a_mistake_on_the_command_line_is_named_with_its_fix(line, fragments, monkeypatch):
    monkeypatch.delenv("PDN_NOT_SET", raising=False)
    message = refused(*line.split(" "))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("name", "secret"),
    [("PGPASS", True), ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET", True),
     ("MYSQL_PWD", True), ("DB_PASSWORD", True), ("GITHUB_PAT", True), ("APIKEY", True),
     ("TOKENIZER_PATH", False), ("KEYBOARD", False), ("PWD", False), ("HOME", False),
     ("PATTERN", False), ("MONKEY_PATH", False)],
)  # fmt: skip
def test_a_secret_of_the_environment_is_told_by_the_words_of_its_name(name, secret, monkeypatch):
    monkeypatch.setenv(name, "value")
    if secret:
        assert "looks like a secret" in refused(f"name=${{oc.env:{name}}}")
    else:
        assert parse(compose([f"name=${{oc.env:{name}}}"])).name == "value"


def test_several_choices_of_a_group_are_a_sweep_and_nothing_else():
    for word in ("model=a,b", "seed=range(1,3)"):
        assert refused(word).endswith("expected one; add -m to run one trial for each")
    assert refused("eval.tasks=a,b").endswith("list, or quote it: 'eval.tasks=\"a,b\"'")


def test_several_mistakes_are_reported_together():
    message = refused("trainer.steps=-4", "optim.lr=abc", "+foo=1", "trainer.lrr=1")
    assert message.startswith("pdn[E-CONFIG] 4 problems:")
    keys = ("trainer.steps", "optim.lr", "foo", "trainer.lrr")
    assert all(f"\n  {key} (command line)" in message for key in keys)


@pytest.mark.parametrize(
    ("key", "copy"), [("steps", "trainer.steps"), ("embedding_lr_scale", "optim.groups")]
)
def test_a_wrong_value_that_other_keys_copy_is_reported_once_where_it_was_set(key, copy):
    message = refused(f"model.recipe.{key}=-5")
    assert message.startswith(f"pdn[E-CONFIG-VALUE] model.recipe.{key} (command line): found -5")
    assert copy not in message


def test_a_batch_that_the_processes_cannot_share_names_the_nearest_that_they_can():
    message = refused("trainer.global_batch_size=20", "trainer.micro_batch_size=2", world_size=3)
    assert "trainer.micro_batch_size x 3 processes = 6; nearest valid: 18 or 24" in message
    message = refused("trainer.global_batch_size=12", "trainer.micro_batch_size=4", world_size=2)
    assert "nearest valid: 8 or 16, or trainer.micro_batch_size=3" in message


# ------------------------------------------------------------ YAML files

# The text of configs/experiment/bad.yaml below its package line, and fragments of the message
