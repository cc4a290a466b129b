#!/usr/bin/env python
"""Measure speed and memory: ``benchmark.py <command> [options]``.

A command is a module of ``scripts/benchmarks`` with ``add_arguments(parser)`` and ``main(args)``;
its docstring is its help.
"""

import pdn.cli.process  # noqa: F401 (before torch: see there)

# isort: split
import argparse
import importlib
import sys
from pathlib import Path


def main() -> None:
    commands = sorted(path.stem for path in (Path(__file__).parent / "benchmarks").glob("[!_]*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    command = parser.parse_args(sys.argv[1:2]).command
    module = importlib.import_module(f"benchmarks.{command}")
    options = argparse.ArgumentParser(
        prog=f"benchmark.py {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(options)
    module.main(options.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    main()
