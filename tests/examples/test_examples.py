"""The examples run as they stand: programs, every cell of the notebooks, the README's snippet."""

import json
import runpy
from pathlib import Path

import matplotlib
import pytest
import torch

from tests.small_runs import train

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    train(directory, "pgdn_tiny", "trainer.steps=2", "schedule.warmup_steps=1")
    return directory / "run"


def program(name: str):
    return runpy.run_path(str(EXAMPLES / name))


def test_a_layer_of_ones_own_learns():
    for first, last in program("drop_in_layer.py")["main"](steps=40):
        assert last < 0.75 * first


def test_a_run_is_read(run, capsys):
    text = program("read_a_run.py")["main"](run)
    printed = capsys.readouterr().out
    assert text and "exp_avg_sq" in printed and "step 2" in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_of_a_notebook_runs(path, run, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.setenv("PDN_RUN", str(run))
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(1))
    names: dict = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs are not committed"
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert len(shown) >= 2
    matplotlib.pyplot.close("all")


def test_the_snippet_of_the_readme_runs(run):
    (snippet,) = (EXAMPLES / "README.md").read_text().split("```python\n")[1:]
    code = snippet.split("```")[0].replace("runs/<name>", str(run)).replace("_340m", "_tiny")
    g = -torch.rand(1, 5, 2)
    q, k, w, v = (torch.nn.functional.normalize(torch.randn(1, 5, 2, 8), dim=-1) for _ in range(4))
    names = dict(q=q, k=k, v=v, w=w, g=g, beta=torch.rand(1, 5, 2))
    exec(code, names)
    assert names["logits"].shape == (1, 16, 32000) and names["moments"]["step"] == 2
