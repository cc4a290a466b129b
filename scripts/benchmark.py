#!/usr/bin/env python
"""Measure speed and memory: ``benchmark.py <command> [options]``.

A command is a module of ``scripts/benchmarks`` with ``add_arguments(parser)`` and ``main(args)``;
its docstring is its help.
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import argparse
import importlib
from pathlib import Path

from pdn.cli.options import run_script


def main(words: list[str]) -> None:
    commands = sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("[!_]*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    command = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"benchmarks.{command}")
    options = argparse.ArgumentParser(
        prog=f"benchmark.py {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(options)
    module.main(options.parse_args(words[1:]))


if __name__ == "__main__":
    run_script(main)
