"""What a project pays for the plugin if it does not use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import sqla_signals

CODE = """
import sys, importlib.metadata, pytest
before = set(sys.modules)
(found,) = importlib.metadata.entry_points(group="pytest11", name="sqla_signals")
found.load()
print(sorted(set(sys.modules) - before))
"""


def test_the_plugin_imports_nothing_but_itself():
    """pytest imports it in every project where the package is installed."""
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout == "['sqla_signals', 'sqla_signals.pytest_plugin']\n"


def test_no_module_has_the_name_of_something_public():
    """Importing such a module would put it in the place of what the package has by that name."""
    package = Path(sqla_signals.__file__).parent
    modules = {path.stem for path in package.iterdir()}
    assert not modules.intersection(sqla_signals.__all__)


FIRST = """
import os, sys, blinker, celery, opentelemetry.trace, sqlalchemy.ext.asyncio, sqlalchemy.orm
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(module)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module
"""


def test_each_module_and_room_can_be_imported_first():
    """Whatever it needs of the others comes along."""
    package = Path(sqla_signals.__file__).parent
    names = {path.stem for path in package.iterdir()} - {"__init__", "__main__", "__pycache__"}
    modules = [f"sqla_signals.{name}" for name in names if name != "py"]
    subprocess.run([sys.executable, "-W", "error", "-c", FIRST, *modules], check=True)


def test_a_name_that_the_package_does_not_have_is_an_attribute_error():
    """As with any other module."""
    assert not hasattr(sqla_signals, "post_saved")
