"""mypy and pyright agree with the comments in the files of this folder."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest  # `make types` checks this file where pytest is not installed

from sqla_signals import signals
from sqla_signals.receivers.protocols import Arguments
from sqla_signals.signals.kinds import ModelSignal

HERE = Path(__file__).parent


def check(module: str, *options: str) -> None:
    # In CI, `make types` fails without a checker; the rows for other versions do without.
    if importlib.util.find_spec(module) is None:
        raise SkipTest(f"{module} is not installed")
    command = [sys.executable, "-m", module, *options, str(HERE)]
    # From the root, for the configuration in pyproject.toml.
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy() -> None:
    check("mypy", "--strict", "--follow-imports=silent")


def test_pyright() -> None:
    check("pyright", "--pythonpath", sys.executable)


def test_the_arguments_of_every_signal_are_known() -> None:
    sent = {
        argument
        for signal in vars(signals).values()
        if isinstance(signal, ModelSignal)
        for argument in signal.arguments or ()
    }
    assert sent <= Arguments.__required_keys__
