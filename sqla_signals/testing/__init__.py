"""What the fixture ``signals`` is made of; see :mod:`sqla_signals.pytest_plugin`."""

from .capture import Capture, Failure, Sent
from .signals import Signals

__all__ = ["Capture", "Failure", "Sent", "Signals"]
