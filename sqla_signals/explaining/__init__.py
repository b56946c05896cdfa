"""What is connected, to be read before anything happens: :func:`explain` and its pictures."""

from .connections import explain
from .explanation import Explanation
from .parts import Entry, Group, Notice, Step

__all__ = ["Entry", "Explanation", "Group", "Notice", "Step", "explain"]
