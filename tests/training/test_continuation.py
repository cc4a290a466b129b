"""A launch continues the run that its checkpoint is of, and no other."""

import json
import shutil

import pytest
import yaml

from pdn.checkpoint.format import read_side
from pdn.data import open_data
from pdn.errors import ConfigError, StorageError
from pdn.training.fit import fit
from pdn.training.names import directory_of, former_name
from tests.small_runs import losses, metrics, run_config, train

STOP = ("trainer.stop_at=4", "checkpoint.every=2")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    place = tmp_path_factory.mktemp("stopped")
    train(place / "home", "pgdn_tiny", *STOP)
    return place / "home"


@pytest.fixture
def home(stopped, tmp_path):
    """Copy a run of 20 steps that stopped after 4."""
    shutil.copytree(stopped, tmp_path / "home")
    return tmp_path / "home"


def lines(home):
    return (home / "run" / "ledger.jsonl").read_text().splitlines(keepends=True)


def put(home, changed):
    (home / "run" / "ledger.jsonl").write_text("".join(changed))


EDITS = {
    "a line removed": lambda found: [found[0], *found[2:]],
    "a line doubled": lambda found: [found[0], *found],
    "the last line removed": lambda found: found[:-1],
    "all lines removed": lambda found: [],
    "two lines swapped": lambda found: [found[1], found[0], *found[2:]],
    "a hash changed": lambda found: [found[0].replace('"hash": "', '"hash": "0'), *found[1:]],
    "a sample changed": lambda found: [found[0], found[1].replace('"first": 8', '"first": 9'),
                                       *found[2:]],
    "a space added": lambda found: [found[0].replace(",", " ,"), *found[1:]],
    "a skip invented": lambda found: [
        *found, '{"step": 3, "skipped_first": 32, "skipped_end": 40}\n'],
}  # fmt: skip
KINDS = "a line removed", "all lines removed", "a hash changed", "a skip invented"


def slow(name: str):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("edit", [name if name in KINDS else slow(name) for name in EDITS])
def test_an_edited_ledger_is_refused(edit, home):
    whole = lines(home)
    put(home, EDITS[edit](whole))
    edited = lines(home)
    if edit == "a skip invented":  # at the checkpoint's own step a rewind may have left it
        put(home, [*whole[:3], edited[-1], whole[3]])
    with pytest.raises(StorageError, match=r"LEDGER-CHANGED.*Restore it.*resume=restart") as caught:
        train(home, "pgdn_tiny", "trainer.stop_at=5")
    assert caught.value.exit_code == 74


@pytest.mark.parametrize(
    "edit",
    [name if name in KINDS else slow(name) for name in EDITS if name != "a space added"],
)
def test_an_edited_ledger_of_a_run_from_before_its_digest_is_refused(edit, home):
    forget(home, "run")
    put(home, EDITS[edit](lines(home)))
    if edit == "a hash changed":  # known of the last line only
        put(home, [line.replace('"hash": "', '"hash": "0') for line in lines(home)])
    if edit == "a skip invented":
        found = lines(home)
        put(home, [*found[:3], found[4], found[3]])
    with pytest.raises(StorageError, match="LEDGER-CHANGED"):
        train(home, "pgdn_tiny", "trainer.stop_at=5")


def test_what_follows_the_checkpoint_may_be_torn_or_gone(home):
    put(home, [*lines(home), '{"step": 5, "first": 32, "end": 40, "hash": "00"}\n', '{"st'])
    assert len(losses(train(home, "pgdn_tiny", "trainer.stop_at=6"))) == 6


def test_a_run_whose_ledger_is_gone_goes_on_and_says_so(home, caplog):
    (home / "run" / "ledger.jsonl").unlink()
    train(home, "pgdn_tiny", "trainer.stop_at=5", "checkpoint.every=2")
    assert "ledger.jsonl: is gone; the run goes on" in caplog.text
    first = json.loads(lines(home)[0])
    assert first == {"step": 4, "lost_first": 0, "lost_end": 32}
    train(home, "pgdn_tiny", "trainer.stop_at=6")
    assert [json.loads(line)["step"] for line in lines(home)] == [4, 5, 6]


def forget(home, key):
    """Make the checkpoints those of a version that did not keep ``key``."""
    from hashlib import sha256

    for path in (home / "run" / "checkpoints").iterdir():
        side = json.loads((path / "side.json").read_text())
        side["side"].pop(key)
        (path / "side.json").write_text(json.dumps(side))
        manifest = json.loads((path / "manifest.json").read_text())
        content = (path / "side.json").read_bytes()
        record = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
        manifest["files"]["side.json"] = record
        (path / "manifest.json").write_text(json.dumps(manifest))
        digest = sha256((path / "manifest.json").read_bytes()).hexdigest()
        (path / "COMMITTED").write_text(f"{digest}\n")


def test_without_config_yaml_the_checkpoint_tells_what_defines_the_run(home):
    (home / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"step-00000004: saved with optim\.lr: .*, now 0\.5"):
        train(home, "pgdn_tiny", "trainer.stop_at=5", "optim.lr=0.5")
    assert not (home / "run" / "config.yaml").exists()
    train(home, "pgdn_tiny", "trainer.stop_at=5")
    assert (home / "run" / "config.yaml").exists()


def test_without_config_yaml_an_old_checkpoint_is_not_continued(home):
    (home / "run" / "config.yaml").unlink()
    forget(home, "run")
    with pytest.raises(ConfigError, match=r"RUN-CONFIG-GONE.*restore the file"):
        train(home, "pgdn_tiny", "trainer.stop_at=5")


def test_an_edited_config_yaml_is_refused(home):
    file = home / "run" / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["optim"]["lr"] = 0.5
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"saved with optim\.lr"):
        train(home, "pgdn_tiny", "trainer.stop_at=5", "optim.lr=0.5")


def test_a_configuration_of_a_newer_version_is_refused(home):
    file = home / "run" / "config.yaml"
    assert yaml.safe_load(file.read_text())["schema"] == 2
    file.write_text(file.read_text().replace("schema: 2", "schema: 3"))
    with pytest.raises(ConfigError, match="schema 3, expected at most 2; update pdn"):
        train(home, "pgdn_tiny")


def test_a_longer_run_of_a_constant_rate_is_the_same_run(tmp_path):
    words = "schedule=constant", "checkpoint.every=2"
    whole = losses(train(tmp_path / "whole", "pgdn_tiny", *words, "trainer.steps=12"))
    train(tmp_path / "parts", "pgdn_tiny", *words, "trainer.steps=10")
    assert losses(train(tmp_path / "parts", "pgdn_tiny", *words, "trainer.steps=12")) == whole
    history = (tmp_path / "parts" / "run" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["changes"] == {"trainer.steps": [10, 12]}
    newest = max((tmp_path / "parts" / "run" / "checkpoints").glob("step-*"))
    assert read_side(newest)["side"]["run"]["lengths"] == [[0, 10], [10, 12]]


def test_a_longer_run_of_wsd_is_the_same_run_until_its_decay(tmp_path):
    words = "schedule=wsd", "schedule.decay_steps=4", "checkpoint.every=2"
    longer = "trainer.steps=20"
    whole = losses(train(tmp_path / "whole", "pgdn_tiny", *words, longer, "trainer.stop_at=12"))
    train(tmp_path / "parts", "pgdn_tiny", *words, "trainer.steps=14", "checkpoint.keep_last=3")
    with pytest.raises(ConfigError, match=r"RUN-STEPS.*begins after step 10.*resume=step"):
        train(tmp_path / "parts", "pgdn_tiny", *words, longer, "checkpoint.keep_last=3")
    again = "resume=step:10", "trainer.stop_at=12"
    assert losses(train(tmp_path / "parts", "pgdn_tiny", *words, longer, *again)) == whole


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_run_of_a_former_default_name_is_found(schedule, tmp_path):
    def config(*words):
        return run_config(
            tmp_path / "home", "pgdn_tiny", f"schedule={schedule}", "name=null", *words
        )

    first = config("trainer.stop_at=2")
    fit(first, open_data=open_data)
    here = directory_of(first)
    former = here.with_name(former_name(first))
    here.rename(former)
    more = () if schedule == "cosine" else ("trainer.steps=30",)
    assert directory_of(config(*more)) == former
    assert directory_of(config("seed=5")) != former
    fit(config("trainer.stop_at=3", *more), open_data=open_data)
    assert not here.exists()
    shutil.move(former, tmp_path / "home" / "run")
    assert len(losses(metrics(tmp_path / "home"))) == 3
