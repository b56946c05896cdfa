"""What a project pays for the plugin if it does not use it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, pytest
before = set(sys.modules)
import sqla_signals_pytest
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_plugin_imports_nothing_but_itself():
    """pytest imports it in every project where the package is installed."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout == "['sqla_signals_pytest']\n"
