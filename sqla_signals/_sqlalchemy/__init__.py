"""Every private name of SQLAlchemy that this package relies on, and nothing else.

``tests/test_sqlalchemy_private.py`` asserts each of them by name, so that an upgrade which moves
one fails there with its name instead of somewhere in a flush. Where SQLAlchemy 2.0 and 2.1 differ,
the difference is settled here.
"""

from typing import Any


def renamed(module: Any, name: str) -> Any:
    """What SQLAlchemy 2.0 calls ``name``; 2.1 put an underscore before it."""
    return getattr(module, f"_{name}", None) or getattr(module, name)
