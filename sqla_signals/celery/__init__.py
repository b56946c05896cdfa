"""Durable delivery through Celery, on the user's own app and broker.

The relay hands messages to a :class:`CeleryPublisher`; Celery's workers, which import the module
where it is made, run them. Needs the extra ``celery``.
"""

from .publisher import CeleryPublisher, MessageTooLargeError
from .sending import UnroutableError

__all__ = ["CeleryPublisher", "MessageTooLargeError", "UnroutableError"]
