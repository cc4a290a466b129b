"""What the scripts refuse: no words, options without effect, a Python that lacks packages."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pdn.cli.options import parse, run_script
from pdn.errors import ConfigError
from pdn.wording import override
from scripts import generate

ROOT = Path(__file__).parents[2]


def names_of(script: str) -> dict:
    return runpy.run_path(str(ROOT / script))


def test_a_script_without_words_asks_for_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py"])
    with pytest.raises(SystemExit) as ended:
        run_script(lambda words: pytest.fail("ran"), usage="how to")
    assert ended.value.code == 78 and "no arguments" in capsys.readouterr().err


def test_help_is_printed_wherever_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export.py", "run=runs/x", "--help"])
    run_script(lambda words: pytest.fail("ran"), usage="how to")
    assert capsys.readouterr().out == "how to\n"


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("evidence.py", ["corpus=x", "slots=2"], r"corpus=x, slots=2: without effect.*run="),
        ("evidence.py", ["run=code_14m", "check=true"], "check=True: without effect"),
    ],
)
def test_an_option_without_effect_is_refused(script, words, said):
    with pytest.raises(ConfigError, match=said):
        names_of(f"scripts/{script}")["main"](words)


def test_a_path_that_is_empty_is_refused_and_not_taken_for_this_directory():
    with pytest.raises(ConfigError, match="run=: found nothing"):
        names_of("scripts/export.py")["main"](["run="])


def test_a_tilde_in_a_path_of_a_script_is_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    options = parse(generate.Options, ["run=~/x", "prompt=~"])
    assert (options.run, options.prompt) == ("/home/someone/x", "~")


@pytest.mark.parametrize("word", ["seeds=3", "trainer.steps=5", "optim=muon"])
def test_a_comparison_of_finished_runs_refuses_what_would_train(word, tmp_path):
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / "config.yaml").write_text("{}")
    main = names_of("scripts/compare.py")["main"]
    main.__globals__["_record"] = lambda run, arm: {}
    with pytest.raises(ConfigError, match=r"without effect.*finished runs"):
        main([f"base={tmp_path / 'a'}", f"other={tmp_path / 'b'}", word])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("prepare.py", ["--path", "x", "--out", "y", "--split", "test"]),
        ("prepare.py", ["--path", "x", "--out", "y", "--revision", "main"]),
        ("prepare.py", ["--path", "x", "--out", "y", "--tokenizer-revision", "main"]),
        ("prepare.py", ["--path", "x", "--out", "y", "--tokenizer", "t", "--vocab-size", "300"]),
        ("show.py", ["corpus=slimpajama", "--check", "--step", "3"]),
    ],
)
def test_a_flag_without_effect_is_refused(script, words, capsys):
    with pytest.raises(SystemExit) as ended:
        names_of(f"data/{script}")["main"](words)
    assert ended.value.code == 2 and "no effect" in capsys.readouterr().err


def test_what_is_not_installed_is_named_with_what_to_do():
    code = (
        "import importlib.util as util, runpy, sys; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'hydra' else find(name, *rest)\n"
        "sys.argv = ['train.py']; runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 78
    assert done.stderr.startswith("pdn[E-INSTALL] hydra: not installed")
    assert "make install" in done.stderr and "Traceback" not in done.stderr


def test_the_example_that_reads_a_run_asks_for_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["read_a_run.py"])
    with pytest.raises(SystemExit, match="expected one run"):
        runpy.run_path(str(ROOT / "examples" / "read_a_run.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=x", "device=gpu"], "device: found 'gpu'; expected one of auto, cpu, cuda; did you"),
        (["run=x", "top_p=0"], "top_p: found '0'; expected more than 0; keys: run, "),
        (["run=x", "seed=1.5"], "seed: found '1.5'; expected an integer; keys: run, "),
        (["prompt=x"], "run: found none; expected one: write run=<value>"),
        (["--prompt", "x"], "'--prompt': expected key=value: write prompt=x; keys"),
        (["--max-new-tokens", "5"], "write max_new_tokens=5; keys"),
        (["--prompt", "run=x"], "'--prompt': expected key=value: write prompt=<value>"),
        (["prompt", "=x"], "'prompt': expected key=value: write prompt=x; keys"),
        (["--prompt=x"], "'--prompt=x': expected key=value: write prompt=x"),
        (["."], "'.': expected key=value: write run=."),
    ],
)
def test_a_wrong_word_of_a_script_is_answered_with_what_to_write(words, said):
    with pytest.raises(ConfigError) as caught:
        parse(generate.Options, words)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["runs/sweep", "my runs", "rüns/日本", "2024", "1e3", "null", "true", "", "a,b", "[a]", "a=b"]
    + ["it's", 'say "hi"', "C:\\runs", "end\\", 'end\\"', "a\\\\b", "{a: b}", "~/x", "x#y", "*"],
)
def test_a_place_of_any_name_is_handed_on_to_the_runs(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import QuotedString

    value = OverridesParser.create().parse_override(override("output_dir", text)).value()
    assert (value.text if isinstance(value, QuotedString) else value) == text
