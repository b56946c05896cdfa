"""What the fixture ``signals`` is made of; see :mod:`sqla_signals.pytest_plugin`."""

from .capture import Failure, Sent
from .signals import Signals

__all__ = ["Failure", "Sent", "Signals"]
