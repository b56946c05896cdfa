"""Types of receivers, for type checkers only; nothing here is used at run time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from .receiver import On

if TYPE_CHECKING:
    from blinker._utilities import Symbol

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)

# A sender of a model signal that says nothing about ``instance``: a name, several senders, ANY
# (which is a Symbol) or None. Must match no class, or a receiver of another class would pass.
OtherSender: TypeAlias = (
    "str | list[Any] | tuple[Any, ...] | set[Any] | frozenset[Any] | Symbol | None"
)


class Options(TypedDict, total=False):
    """The options of ``connect()`` that have no influence on the types."""

    on: On
    propagate: bool
    created: bool | None
    fields: Collection[Any] | None
    durable: bool
    name: str | None
    dispatch_uid: object


class Arguments(TypedDict, Generic[M]):
    """What the model signals send besides the sender, all of them together."""

    instance: M
    created: Any
    changes: Any
    update_fields: Any
    raw: Any
    origin: Any
    using: Any
    session: Any
    signal: Any
    event: Any
    args: Any
    kwargs: Any
    loaded: Any


# What is given for an overloaded protocol must match every overload. So these two say of one
# function that it accepts an ``instance`` of this class, and that it has the parameters P and
# returns R: the decorator checks the first and hands on the second.
#
# The first has no ``**kwargs: Any`` instead of all those names: mypy takes what comes out of
# ``**kwargs`` for optional, and would refuse a receiver that requires ``created``.
#
# pyright judges the variance by P and R alone.
class ReceiverOf(Protocol[M_contra, P, R_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A receiver of a model signal that is sent with instances of ``M``."""

    @overload
    def __call__(self, sender: Any, /, **kwargs: Unpack[Arguments[M_contra]]) -> object: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class ReceiverDecorator(Protocol[M_co]):
    """What ``receiver(post_save, sender=M)`` returns."""

    def __call__(self, fn: ReceiverOf[M_co, P, R], /) -> Callable[P, R]:
        """Connect ``fn`` and return it."""
        ...


class OwnSignal(Protocol):
    """A ``Signal`` but not a ``ModelSignal``: nothing is known of what it sends."""

    def connect(self, receiver: F, sender: Any = ..., weak: bool = ..., *, on: On = ...) -> F:
        """Connect ``receiver`` and return it."""
        ...
