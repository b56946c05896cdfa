"""A drawn order where SQLAlchemy has none, so that a program does the same whenever it is run.

The unit of work goes through sets of states and of its own actions, so in the order of their
addresses, and some of what it does depends on that. Inside of :func:`drawn_orders` they have
numbers instead: the same in each run of a program, others for another :class:`Order`. Garbage is
collected between programs only, since cycles that wait for it are still in the identity map.

Mappers keep their addresses: they are the same in every program of a process.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from zlib import crc32

import pytest
from sqlalchemy.orm import InstanceState, unitofwork

_Action: type[Any] = getattr(unitofwork, "_PostSortRec", None) or unitofwork.PostSortRec
_MASK = 2**64 - 1


class Order:
    """The order of the states and actions of one program; each number is another one."""

    current: Order
    """That of the program being run."""

    def __init__(self, number: int = 0, owner: str = "") -> None:
        self.owner = owner
        """Whose program it is, for :data:`lost_states`."""
        self.number = number
        self._states = count(1)

    def next(self) -> int:
        """The place of a further state."""
        return _mixed(self.number, next(self._states))


Order.current = Order()

lost_states: Counter[str] = Counter()
"""How often SQLAlchemy could not discard a state that was garbage, by the owner of the program.

What is raised in the midst of a flush's bookkeeping, such as the warning of two new instances with
one key, can leave a state in the identity map that has lost its key. It happens without signals as
well; where only the programs with signals have it, it is ours.
"""


@contextmanager
def drawn_orders() -> Iterator[None]:
    """Let states and actions have the order of the program that is run."""
    make, collects, ignored = InstanceState.__init__, gc.isenabled(), sys.unraisablehook

    def make_numbered(state: Any, *arguments: Any) -> None:
        make(state, *arguments)
        hash(state)

    def unraisable(unraised: Any) -> None:
        state = getattr(unraised.object, "__self__", None)
        if isinstance(state, InstanceState) and unraised.exc_type is AssertionError:
            lost_states[state.__dict__["_owner"]] += 1
        else:
            ignored(unraised)

    gc.disable()
    sys.unraisablehook = unraisable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstanceState, "__init__", make_numbered)
        patch.setattr(InstanceState, "__hash__", _place_of_state)
        patch.setattr(_Action, "__hash__", _place_of_action)
        yield
    sys.unraisablehook = ignored
    if collects:
        gc.enable()


def _place_of_state(state: InstanceState[Any]) -> int:
    held = state.__dict__
    place: int | None = held.get("_place")
    if place is None:
        place = held["_place"] = Order.current.next()
        held["_owner"] = Order.current.owner
    return place


def _place_of_action(action: Any) -> int:
    name = f"{type(action).__name__} {action.sort_key} {getattr(action, 'isdelete', '')}"
    state = getattr(action, "state", None)
    return _mixed(crc32(name.encode()), Order.current.number if state is None else hash(state))


def _mixed(one: int, other: int) -> int:
    """A number with the bits of both all over it (splitmix64)."""
    number = (one * 0xD6E8FEB86659FD93 + other * 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
