"""Running the examples: in a process of their own, or here, with receivers connected anew."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> str:
    """Run Python and return what it printed; a warning or anything on stderr is a failure."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "utf8", *arguments],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def connect_receivers(module: str) -> ModuleType:
    """Import `module`, or run it again if it was imported before: its decorators connect."""
    if module in sys.modules:
        return importlib.reload(sys.modules[module])
    return importlib.import_module(module)
