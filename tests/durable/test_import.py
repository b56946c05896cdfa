"""The core does not pay for durable delivery until somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import sqla_signals
assert "sqla_signals.durable.tables" not in sys.modules
assert "sqlalchemy.dialects.postgresql" not in sys.modules
from sqla_signals import outbox_table
assert outbox_table is sys.modules["sqla_signals.durable"].outbox_table
try:
    sqla_signals.outbox
except AttributeError as error:
    print(error)
"""


def test_outbox_table_is_imported_when_it_is_asked_for():
    """Importing the package imports no dialect."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert run.stdout == "module 'sqla_signals' has no attribute 'outbox'\n"
