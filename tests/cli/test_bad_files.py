"""A mistake in a file of the configuration is named with its line and its fix."""

from pathlib import Path

import pytest

from pdn.cli.compose import Source, compose
from pdn.cli.launch import quote_home
from pdn.cli.parse import parse
from pdn.cli.paths import at
from pdn.cli.sweep import expand
from pdn.training.names import directory_of
from tests.cli.test_bad_config import SHIPPED, refused

FILES = [
    (
        "trainer:\n  lrr: 1\n",
        "pdn[E-CONFIG-KEY] trainer.lrr (",
        "bad.yaml:3): found an unknown key",
        "did you mean optim.lr?",
    ),
    (
        "optim:\n  lr: abc\n",
        "optim.lr (",
        "bad.yaml:3): found 'abc'; expected a number; correct it there",
    ),
    ("trainer: null\n", "trainer (", "bad.yaml:2): found null; expected a group of keys"),
    ("data: null\n", "data (", "bad.yaml:2): found null"),
    ("defaults:\n  - override /data: null\n", "data (", "found nothing chosen", "set data=<name>"),
    (
        "seed: 1\nseed: 2\n",
        "pdn[E-CONFIG-YAML]",
        "bad.yaml:3:1: found duplicate key seed",
        "remove all but one",
    ),
    (
        "trainer:\n  steps: 010\n",
        "trainer.steps (",
        "bad.yaml:3): found 010, which YAML 1.1 reads as an octal",
        "write '010'",
        "write 10",
    ),
    (
        "name: 12:30:45\n",
        "name (",
        "bad.yaml:2): found 12:30:45, which YAML 1.1 reads as a number in base 60",
        "write '12:30:45'",
    ),
    ("trainer: [1\n", "pdn[E-CONFIG-YAML]", "bad.yaml:3:1:", "expected YAML"),
    ("trainer:\n\tsteps: 1\n", "pdn[E-CONFIG-YAML]", "bad.yaml:3:1:", "expected YAML"),
    ("name: !!python/object/apply:os.system ['true']\n", "bad.yaml:2", "remove the tag"),
    (
        "name: !!python/object/apply:pathlib.Path ['x']\n",
        "pdn[E-CONFIG-UNSAFE]",
        "bad.yaml:2",
        "remove the tag",
    ),
    ("name: !!str x\n", "pdn[E-CONFIG-UNSAFE]", "bad.yaml:2: found the YAML tag", "remove the tag"),
    ("name: &x y\noutput_dir: *x\n", "pdn[E-CONFIG-UNSAFE]", "bad.yaml:3: found the YAML alias *x"),
    (
        "optim:\n  _target_: os.system\n",
        "pdn[E-CONFIG-UNSAFE] optim._target_ (",
        "bad.yaml:3): found a key that names code",
    ),
    (
        "hydra:\n  launcher:\n    _target_: os.system\n",
        "pdn[E-CONFIG-UNSAFE] hydra.launcher._target_ (",
        "bad.yaml:4)",
    ),
    (
        "name: ${oc.env:PDN_NOT_SET}\n",
        "name (",
        "bad.yaml:2): found '${oc.env:PDN_NOT_SET}', but PDN_NOT_SET is not set",
    ),
    ("name: ${name}\n", "name (", "bad.yaml:2): found '${name}', which refers back to itself"),
    (
        "name: ${oc.decode:x}\n",
        "pdn[E-CONFIG-UNSAFE] name (",
        "bad.yaml:2): found the resolver oc.decode",
    ),
    ("- 1\n- 2\n", "experiment/bad", "Cannot merge"),
]


@pytest.mark.parametrize(("text", "fragments"), [(text, fragments) for text, *fragments in FILES])
def test_a_mistake_in_a_file_is_named_with_its_line_and_fix(text, fragments, tmp_path, monkeypatch):
    monkeypatch.delenv("PDN_NOT_SET", raising=False)
    message = refused("experiment=bad", source=with_experiment(tmp_path, text))
    for fragment in fragments:
        assert fragment in message


def test_quoted_text_that_looks_like_a_number_is_text(tmp_path):
    config = parse(
        compose(
            ["experiment=bad"], with_experiment(tmp_path, "name: '010'\noutput_dir: \"12:30:45\"\n")
        )
    )
    assert (config.name, config.output_dir) == ("010", "12:30:45")


def with_experiment(folder: Path, text: str) -> Source:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "bad.yaml").write_text(f"# @package _global_\n{text}")
    return Source(search=(folder,))


def test_of_a_repeated_key_the_last_value_counts_as_in_hydra():
    config = parse(compose(["seed=1", "model=pgdn_tiny", "seed=2", "model=gdn_tiny"]))
    assert (config.seed, config.model.name) == (2, "gdn_tiny")
    assert expand(["seed=1,2", "seed=3", "model=gdn_tiny,pgdn_tiny"], SHIPPED) == [
        ["seed=3", "model=gdn_tiny"],
        ["seed=3", "model=pgdn_tiny"],
    ]


def test_a_pattern_builds_the_mixers_that_it_names():
    model = parse(compose(["model.pattern=[gdn,attention]", "model.head_dim=32"])).model
    assert model.pattern == ["gdn", "attention"] and set(model.mixers) == {"gdn", "attention"}
    assert model.mixers["attention"].head_dim == 32
    config = compose(["model.pattern=[pgdn,kda]", "model.mixers.pgdn.conv_size=3"])
    assert parse(config).model.mixers["pgdn"].conv_size == 3
    hybrid = compose(["model=hybrid_tiny", "model.pattern=[attention]"])
    assert set(parse(hybrid).model.mixers) == {"attention"}


def test_an_experiment_without_its_package_line_is_told_so(tmp_path):
    source = with_experiment(tmp_path, "seed: 1\n")
    file = tmp_path / "experiment" / "bad.yaml"
    file.write_text("seed: 1\ntrainer:\n  steps: 5\n")
    message = refused("experiment=bad", source=source)
    assert f"{file}:1: found no package" in message and "# @package _global_" in message


@pytest.mark.parametrize("key", ["data.path", "output_dir", "data.cache_dir", "init_from"])
def test_a_tilde_may_begin_a_path_on_the_command_line(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    word = quote_home(f"{key}=~/place")
    config = parse(compose([word]))
    assert at(key, config.model_dump()) == "~/place"
    if key == "output_dir":
        assert str(directory_of(config)).startswith("/home/someone/place/")
    assert [quote_home(text) for text in ("a=[~/x,~y]", "a='~/x'", "~data", "a=b~c")] == [
        "a=['~/x','~y']", "a='~/x'", "~data", "a=b~c"
    ]  # fmt: skip
