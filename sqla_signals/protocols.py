"""What type checkers know of receivers; nothing here is used at run time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypedDict, TypeVar, overload

from .receivers import Phase

if TYPE_CHECKING:
    pass  # the type of ANY

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)

# A sender of a model signal that says nothing about ``instance``. Must not match a class.
OtherSender = "str | Collection[Any] | Symbol | None"


class Options(TypedDict, total=False):
    """The options of ``connect()`` that have no influence on the types."""

    on: Phase
    propagate: bool
    fields: Collection[Any] | None
    durable: bool
    name: str | None
    dispatch_uid: object


# Whatever is given for an overloaded protocol must match each of its overloads. So these two say
# "accepts an ``instance`` of this class" and "has the parameters P and returns R" of one function,
# and the decorator can check the first and hand on the second.
#
# The first names all arguments and has no ``**kwargs``: mypy takes what comes out of ``**kwargs``
# for optional, and would refuse each receiver that requires one of them, such as ``created``.
#
# pyright looks for the variance in P and R alone.
class ReceiverOf(Protocol[M_contra, P, R_co]):  # pyright: ignore[reportInvalidTypeVarUse]
    """A receiver of a model signal that is sent with instances of ``M``."""

    @overload
    def __call__(
        self,
        sender: Any,
        /,
        *,
        instance: M_contra,
        created: Any,
        changes: Any,
        update_fields: Any,
        raw: Any,
        origin: Any,
        using: Any,
        session: Any,
        signal: Any,
        event: Any,
    ) -> object: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class ReceiverDecorator(Protocol[M_co]):
    """What ``receiver(post_save, sender=M)`` returns."""

    def __call__(self, fn: ReceiverOf[M_co, P, R], /) -> Callable[P, R]: ...


class OwnSignal(Protocol):
    """A ``Signal`` but not a ``ModelSignal``: nothing is known of what it sends."""

    def connect(
        self, receiver: F, sender: Any = ..., weak: bool = ..., *, on: Phase = ...
    ) -> F: ...
