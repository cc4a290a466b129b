"""A run goes on as another one, or otherwise from a step on, and stays exact."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from data import show
from pdn.checkpoint.format import read_side, step_directory, verify
from pdn.checkpoint.read import read_checkpoint
from pdn.data import open_data
from pdn.errors import ConfigError, StorageError
from pdn.inference.average import average
from pdn.inference.load import load_trained
from pdn.runs.ancestry import check, tree
from pdn.training.trainer import Trainer
from tests.data.corpus import documents, make_shards
from tests.data.test_phases import repeated
from tests.small_runs import losses, metrics, run_config, shared_cache, train, train_on_ranks
from tests.training.test_continuation import forget

LAST = 10
TRUNK = ("schedule=constant", f"trainer.steps={LAST}", "schedule.warmup_steps=3", "eval=none",
         "checkpoint.every=3", "checkpoint.keep_last=9", "checkpoint.asynchronous=false",
         "data.unit_tokens=48")  # fmt: skip


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    home = tmp_path_factory.mktemp("branches") / "trunk"
    train(home, "gdn_tiny", *TRUNK)
    return home


def branch(trunk, name, *words, step=6, **keys):
    """Train a branch of the trunk beside it; returns its records and its directory."""
    home = trunk.parent / name
    origin = f"branch_from={trunk / 'run'}@{step}"
    return train(home, "gdn_tiny", *TRUNK, origin, *words, **keys), home


def lines(home):
    return [json.loads(line) for line in (home / "run" / "ledger.jsonl").read_text().splitlines()]


def files_of(home, step):
    """Return the SHA-256 of every file with tensors of a checkpoint."""
    manifest = verify(step_directory(home / "run" / "checkpoints", step), rank=0, world_size=1)
    return {name: file["sha256"] for name, file in manifest.files.items() if name.startswith("__")}


def data_of(home, *words):
    """Open a run's data with the history of its last checkpoint."""
    config = run_config(home, "gdn_tiny", *TRUNK, *words)
    batch = config.trainer.global_batch_size
    data = open_data(config.data, global_batch_size=batch, seed=config.data_seed)
    newest = max((home / "run" / "checkpoints").glob("step-*"))
    data.recall(read_side(newest)["side"]["history"])
    return data


def targets_of(data, ledger):
    found = []
    for line in ledger:
        if line["end"] > line["first"]:
            found += data.targets(np.arange(line["first"], line["end"]))
    return found


def test_an_unchanged_branch_is_its_parent_bit_for_bit(trunk):
    records, home = branch(trunk, "same")
    assert losses(records) == losses(metrics(trunk))[6:]
    assert files_of(home, LAST) == files_of(trunk, LAST)
    first, *rest = lines(home)
    parent = lines(trunk)
    assert (first["step"], first["hash"]) == (6, parent[5]["hash"]) and rest == parent[6:]
    assert first["parent"] == {"run": str(trunk / "run"), "changes": {}}
    assert check(home / "run") == [
        f"{home / 'run'}: 10 steps of 2 runs, 80 samples, 3,840 tokens: none twice within an epoch"
    ]


def test_a_branch_killed_before_its_first_checkpoint_begins_again(trunk):
    with pytest.raises(RuntimeError, match="killed"):
        branch(trunk, "begun", trainer_cls=DiesBeforeItSaves)
    # as a SIGKILL leaves it, which cannot say that it failed
    status = trunk.parent / "begun" / "run" / "status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "running"}))
    records, _ = branch(trunk, "begun")
    assert losses(records) == losses(metrics(trunk))[6:]


def test_phases_that_end_before_the_ones_before_them_are_refused(tmp_path):
    words = "phases=[{until: 5, seq_len: 24}, {until: 3, global_batch_size: 4}]"
    with pytest.raises(ConfigError, match="until steps 5, 3; expected later ones"):
        run_config(tmp_path, "gdn_tiny", *TRUNK, words)


def test_a_branch_that_decays_is_the_wsd_run_planned_from_the_start(trunk):
    wsd = ("schedule=wsd", "schedule.decay_steps=4", "trainer.steps=9", "schedule.warmup_steps=3")
    planned = train(trunk.parent / "planned", "gdn_tiny", *TRUNK, *wsd)
    records, home = branch(trunk, "decayed", *wsd, step=3)
    assert losses(records) == losses(planned)[3:]
    assert files_of(home, 9) == files_of(trunk.parent / "planned", 9)
    assert lines(home)[0]["parent"]["changes"]["schedule.kind"] == ["constant", "wsd"]


CHANGED = ("data.seq_len=24", "trainer.global_batch_size=4", "optim.lr=1e-4", "trainer.steps=12")


def test_a_branch_of_other_length_batch_and_rate_trains_no_token_twice(trunk):
    _, home = branch(trunk, "short", *CHANGED)
    before = lines(trunk)[:6]
    data = data_of(home, *CHANGED)
    assert [entry["first_step"] for entry in data.history] == [0, 6]
    rows = targets_of(data, before) + targets_of(data, lines(home)[1:])
    data.close()
    assert repeated(rows) == 0 and len(rows) == 6 * 8 + 6 * 4
    assert "12 steps of 2 runs, 72 samples, 2,880 tokens" in check(home / "run")[0]
    # resumed after its parent is gone, a branch of it is checked along the whole path
    moved = trunk.parent / "moved"
    shutil.copytree(home, moved)
    grandchild = trunk.parent / "grandchild"
    origin = f"branch_from={home / 'run'}@9"
    train(grandchild, "gdn_tiny", *TRUNK, *CHANGED, origin, "data.seq_len=48", "trainer.steps=11")
    assert "11 steps of 3 runs" in check(grandchild / "run")[0]
    drawn = tree(trunk.parent)
    assert any("─ grandchild/run  step 11, from step 9" in line for line in drawn)


def test_a_path_that_repeats_tokens_is_found_out(trunk, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trunk, copy)
    file = copy / "run" / "ledger.jsonl"
    ledger = lines(copy)
    ledger[7]["places"] = {"data": [100, 484]}
    file.write_text("".join(json.dumps(line) + "\n" for line in ledger))
    with pytest.raises(StorageError, match=r"PATH.*step 8: data: tokens 100 to 483.*2688"):
        check(copy / "run")


@pytest.mark.slow
def test_a_branch_goes_on_without_its_parent(trunk, tmp_path):
    home = tmp_path / "trunk"
    shutil.copytree(trunk, home)
    _, child = branch(home, "child", "trainer.stop_at=6")
    assert [line["step"] for line in lines(child)] == [6]
    shutil.rmtree(home)
    records, _ = branch(home, "child")
    assert losses(records) == losses(metrics(trunk))[6:]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("seed=5",), r"BRANCH-SEED.*order of seed 0, found 5.*data\.seed=0"),
        (("data.vocab_size=300",), r"BRANCH-DATA.*vocab_size was 320, found 300"),
        (("data.seq_len=40",), r"seq_len = 40 does not divide.*unit_tokens = 48.*repeat=allow"),
        (("trainer.steps=6",), r"begins after step 6, trainer\.steps = 6; expected more"),
        (("optim=muon",), r"BRANCH-OPTIM.*optimiser was adamw, found muon"),
    ],
)
def test_what_a_branch_may_not_change_is_refused(words, found, trunk):
    with pytest.raises(ConfigError, match=found):
        branch(trunk, "refused", *words)
    assert not (trunk.parent / "refused" / "run" / "ledger.jsonl").exists()


def test_a_branch_names_a_checkpoint_of_another_run(trunk):
    with pytest.raises(ConfigError, match=r"CKPT-ABSENT.*step 7; expected one of 3, 6, 9, 10: @10"):
        branch(trunk, "absent", step=7)
    with pytest.raises(ConfigError, match=r"CKPT-ABSENT.*nobody/run has none; expected a run with"):
        branch(trunk.parent / "nobody", "absent")
    with pytest.raises(ConfigError, match=r"is this run itself.*resume=step:6"):
        branch(trunk.parent / "itself", "itself")
    with pytest.raises(ConfigError, match="branch_from and init_from are both given"):
        branch(trunk, "both", f"init_from={trunk / 'run'}")


@pytest.mark.slow
def test_a_run_from_before_there_were_histories_is_continued_and_branched(trunk, tmp_path):
    home = tmp_path / "trunk"
    shutil.copytree(trunk, home)
    forget(home, "history")
    records, child = branch(home, "child", "trainer.steps=8")
    assert losses(records) == losses(metrics(trunk))[6:8]
    assert data_of(child).history[0]["law"]["unit_tokens"] == 48
    resumed = train(home, "gdn_tiny", *TRUNK, "resume=step:9")
    assert losses(resumed) == losses(metrics(trunk))


PHASES = "phases=[{until: 3, seq_len: 24, micro_batch_size: 8}," \
    "{until: {tokens: 2400}, global_batch_size: 4, lr_scale: 0.5}]"  # fmt: skip


class Dies(Trainer):
    """Dies after a step, before anything is saved of it."""

    at = 3

    def _boundary(self):
        if self.step == self.at:
            raise RuntimeError("killed")
        super()._boundary()


class DiesLater(Dies):
    at = 7


class DiesWhereWeightsChange(Dies):
    at = 5


class DiesBeforeItSaves(Trainer):
    """Dies when it has begun, before its first checkpoint is written."""

    def save(self):
        raise RuntimeError("killed")


@pytest.fixture(scope="module")
def phased(trunk):
    home = trunk.parent / "phased"
    train(home, "gdn_tiny", *TRUNK, PHASES)
    return home


def test_phases_change_length_batch_and_rate_where_they_say(phased, capsys):
    # 3 x 8 x 24 tokens, then 4 x 48 a step until 2400 are passed, then the run's own
    assert [(line["step"], line["end"] - line["first"]) for line in lines(phased)] == [
        *((step, 8) for step in (1, 2, 3)),
        *((step, 4) for step in range(4, 11)),
    ]
    tokens = {record["step"]: record["tokens"] for record in metrics(phased) if "loss" in record}
    assert tokens[3] == 576 and tokens[4] == 768 and tokens[10] == 1920
    rates = {record["step"]: record["lr"] for record in metrics(phased) if "loss" in record}
    assert rates[4] == rates[3] / 2
    data = data_of(phased)
    assert [entry["first_step"] for entry in data.history] == [0, 3]
    assert repeated(targets_of(data, lines(phased))) == 0
    data.close()
    assert "10 steps of 1 run," in check(phased / "run")[0]
    for step, told in ((3, "sample 16: data sample 16, epoch 0, 24 tokens"), (4, "48 tokens")):
        show.main([str(phased / "run"), "--step", str(step), "--sample", "0"])
        assert told in capsys.readouterr().out


@pytest.mark.parametrize("death", [Dies, pytest.param(DiesLater, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_boundary_of_phases_or_within_one_resumes_bit_by_bit(
    death, phased, trunk
):
    home = trunk.parent / death.__name__
    with pytest.raises(RuntimeError, match="killed"):
        train(home, "gdn_tiny", *TRUNK, PHASES, "checkpoint.every=2", trainer_cls=death)
    records = train(home, "gdn_tiny", *TRUNK, PHASES)
    assert losses(records) == losses(metrics(phased)) and lines(home) == lines(phased)
    assert files_of(home, LAST) == files_of(phased, LAST)


def test_phases_to_come_may_be_planned_anew_and_begun_ones_not(phased, trunk):
    home = trunk.parent / "replanned"
    train(home, "gdn_tiny", *TRUNK, PHASES, "trainer.stop_at=3")
    later = PHASES.replace("lr_scale: 0.5", "lr_scale: 0.25").replace("2400", "960")
    with pytest.raises(ConfigError, match=r"RUN-PHASES.*from step 1 on seq_len was 24, now 48"):
        train(home, "gdn_tiny", *TRUNK)
    records = train(home, "gdn_tiny", *TRUNK, later, "trainer.stop_at=6")
    assert losses(records)[:4] == losses(metrics(phased))[:4]
    assert [line["end"] - line["first"] for line in lines(home)] == [8, 8, 8, 4, 4, 8]


@pytest.mark.parametrize(
    ("phases", "found"),
    [
        ("[{seq_len: 24}, {until: 5}]", r"phases\[0\]: until is null; .*only the last"),
        ("[{until: 5, global_batch_size: 6}]", r"phases\[0\].*= 6 is not divisible by"),
        ("[{until: 5, weights: {web: 1}}]", r"weights are of a mixture, found data\.kind = text"),
        ("[{until: {seconds: 5}}]", "found seconds; expected steps or"),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases, found, tmp_path):
    with pytest.raises(ConfigError, match=found):
        run_config(tmp_path, "gdn_tiny", f"phases={phases}")


def test_a_later_length_that_does_not_divide_is_refused_before_the_first_step(tmp_path, trunk):
    with pytest.raises(ConfigError, match=r"seq_len = 32 does not divide"):
        train(trunk.parent / "odd", "gdn_tiny", *TRUNK, "phases=[{until: 5}, {seq_len: 32}]")
    assert not (trunk.parent / "odd" / "run" / "ledger.jsonl").exists()


def killed_at(step):
    """Return a ``_boundary`` that SIGKILLs all ranks after ``step``.

    Each waits until all have come so far: nobody is killed in a collective, whose end would depend
    on who dies first.
    """
    whole = Trainer._boundary

    def boundary(trainer):
        if trainer.step == step:
            here = trainer.directory.path.parent
            (here / f"reached-{trainer.world.world_rank}").touch()
            while len(list(here.glob("reached-*"))) < trainer.world.size:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(trainer)

    return boundary


def test_on_two_ranks_a_branch_and_a_killed_change_of_phase_go_on_bit_by_bit(trunk, monkeypatch):
    place = trunk.parent / "two-ranks"
    words = (*TRUNK, "trainer.steps=5", "trainer.micro_batch_size=2", "checkpoint.every=2",
             f"data.cache_dir={shared_cache()}",
             "phases=[{until: 3, seq_len: 24}, {until: 4, global_batch_size: 4}]")  # fmt: skip

    def run(name, *more, **keys):
        return train_on_ranks(2, place / name, "gdn_tiny", *words, *more, start="fork", **keys)

    def ends_as(home, whole, first=0):
        assert losses(metrics(home)) == losses(metrics(whole))[first:]
        assert lines(home)[-1]["hash"] == lines(whole)[-1]["hash"]
        assert files_of(home, 5) == files_of(whole, 5)

    whole = place / "whole"
    run("whole")
    run("branch", f"branch_from={whole / 'run'}@2")
    ends_as(place / "branch", whole, 2)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_boundary", killed_at(3))
        run("killed", codes=[-signal.SIGKILL] * 2)
    run("killed")
    ends_as(place / "killed", whole)


@pytest.mark.slow
def test_on_two_ranks_a_branch_that_decays_is_the_wsd_run_planned_from_the_start(trunk):
    place = trunk.parent / "two-ranks-decay"
    words = (*TRUNK, "trainer.micro_batch_size=2", f"data.cache_dir={shared_cache()}")
    wsd = ("schedule=wsd", "schedule.decay_steps=4", "trainer.steps=9", "schedule.warmup_steps=3")

    def run(name, *more):
        return train_on_ranks(2, place / name, "gdn_tiny", *words, *more, start="fork")

    run("trunk", "trainer.stop_at=3")
    planned = run("planned", *wsd)
    branched = run("decayed", *wsd, f"branch_from={place / 'trunk' / 'run'}@3")
    assert losses(branched) == losses(planned)[3:]
    assert files_of(place / "decayed", 9) == files_of(place / "planned", 9)
    assert lines(place / "decayed")[-1]["hash"] == lines(place / "planned")[-1]["hash"]


@pytest.mark.slow
def test_a_mixture_annealed_and_killed_at_the_boundary_and_after_it_resumes_bit_by_bit(tmp_path):
    """The last phase takes other weights, and a source that rested before."""
    names = ("web", "code")
    made = [make_shards(tmp_path / n, documents(400, seed=k)) for k, n in enumerate(names)]
    sources = ", ".join(
        f"{name}: {{kind: shards, weight: 1, path: '{shards}', validation: null}}"
        for name, shards in zip(names, made, strict=True)
    )
    words = (*TRUNK, "data=mixture", f"data.sources={{{sources}}}", "data.pool_units=2",
             "data.seq_len=24",
             "phases=[{until: 5, weights: {web: 1}}, {weights: {web: 0.25, code: 0.75}}]",
             f"data.cache_dir={tmp_path / 'cache'}")  # fmt: skip
    whole = losses(train(tmp_path / "whole", "gdn_tiny", *words))
    for death in (DiesWhereWeightsChange, DiesLater):
        with pytest.raises(RuntimeError, match="killed"):
            train(tmp_path / "killed", "gdn_tiny", *words, trainer_cls=death)
    train(tmp_path / "killed", "gdn_tiny", *words)
    assert losses(metrics(tmp_path / "killed")) == whole and len(whole) == LAST
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert files_of(tmp_path / "killed", LAST) == files_of(tmp_path / "whole", LAST)
    said = check(tmp_path / "killed" / "run")
    assert "10 steps of 1 run, 80 samples" in said[0] and "none twice" in said[0]
    read = [set(line["places"]) for line in lines(tmp_path / "whole")]
    assert read == [{"web"}] * 5 + [set(names)] * 5


def test_the_average_of_checkpoints_is_a_run_with_their_mean(trunk):
    out = trunk.parent / "average"
    assert average(trunk / "run", 2, out) == [9, LAST]
    readers = [read_checkpoint(step_directory(trunk / "run" / "checkpoints", s)) for s in (9, LAST)]
    mean = load_trained(out)
    for name, weight in mean.model.named_parameters():
        a, b = (reader[name].double() for reader in readers)
        assert torch.equal(weight, ((a + b) / 2).float())
    assert mean.step == LAST and mean.tokenizer is not None
    with pytest.raises(ConfigError, match=r"last = 9, found the checkpoints \[3, 6, 9, 10\]"):
        average(trunk / "run", 9, trunk.parent / "more")
    one = trunk.parent / "one"
    (one / "checkpoints").mkdir(parents=True)
    shutil.copy(trunk / "run" / "config.yaml", one)
    with pytest.raises(ConfigError, match="expected two of them at least"):
        average(one, 2, trunk.parent / "more")
    with pytest.raises(ConfigError, match="average: exists; expected a new directory"):
        average(trunk / "run", 2, out)
