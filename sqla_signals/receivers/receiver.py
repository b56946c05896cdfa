"""One connected receiver: its options, the senders it stands for, and how it is described.

A :class:`Receiver` is what ``connect`` stores. It knows no session and sends nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Literal
from weakref import WeakKeyDictionary

from blinker import ANY
from sqlalchemy.orm import QueryableAttribute, class_mapper
from sqlalchemy.schema import Table

from .._sqlalchemy.instances import state_of
from .._sqlalchemy.mappers import column_keys, is_mapped
from ..errors import ReceiverOptionError, ReceiverTypeError

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper

On = Literal["flush", "commit", "rollback"]
"""The option ``on``."""
Phase = Literal["flush", "commit", "rollback", "durable"]
"""How a receiver is called: in its phase, or by a worker for a durable message."""
PHASES: Final[tuple[Phase, ...]] = ("flush", "commit", "rollback", "durable")

MAX_NAME: Final = 255
"""Characters in the name of a durable receiver: what the inbox takes."""

_serials = itertools.count()


class Receiver:
    """A callable connected to a signal for one sender, with the options it was connected with."""

    def __init__(
        self,
        fn: Callable[..., Any],
        sender: Any,
        *,
        weak: bool,
        on: On = "flush",
        propagate: bool = False,
        created: bool | None = None,
        fields: frozenset[str] | None = None,
        durable: bool = False,
        name: str | None = None,
        dispatch_uid: object = None,
        forget: Callable[[Receiver], None],
    ) -> None:
        self.serial: int = next(_serials)
        self.fn_id: Any = identity(fn)
        self.key: tuple[Any, ...] = (
            (self.fn_id if dispatch_uid is None else ("uid", dispatch_uid)),
            identity(sender),
            on,
            durable,
            # The same function may be connected twice with different filters; it is called once.
            (propagate, created, fields) if dispatch_uid is None else None,
        )
        self.on: On = on
        self.phase: Phase = "durable" if durable else on
        self.propagate: bool = propagate
        self.created: bool | None = created
        self.fields: frozenset[str] | None = fields
        self.others: tuple[Receiver, ...] = ()
        """Other connections of the same function, each with conditions of its own."""
        self.chooses: bool = created is not None or fields is not None
        """Whether it is not called for each row."""
        self.durable: bool = durable
        self.dispatch_uid: object = dispatch_uid
        self.weak: bool = weak
        self.is_async: bool = is_async(fn)
        self.name: str = name or qualified_name(fn)
        self.location: str = location(fn)
        self._columns: WeakKeyDictionary[Mapper[Any], frozenset[str]] = WeakKeyDictionary()

        me = weakref.ref(self)

        def forget_me(_: object) -> None:
            receiver = me()
            if receiver is not None:
                forget(receiver)

        self.strong: Callable[..., Any] | None = None if weak else fn
        """What to call, without asking :attr:`fn`: the callable, if it is held."""
        self._fn: Callable[[], Callable[..., Any] | None]
        if not weak:
            self._fn = _strong(fn)
        elif inspect.ismethod(fn):
            self._fn = weakref.WeakMethod(fn, forget_me)
        else:
            self._fn = weakref.ref(fn, forget_me)
        try:
            self._sender: Callable[[], Any] = weakref.ref(sender, forget_me)
        except TypeError:
            self._sender = _strong(sender)

    def passes(self, mapper: Mapper[Any], created: bool, *written: Iterable[str]) -> bool:
        """Whether the conditions let a new row through, or an UPDATE of these attributes."""
        if self.created is created or self.created is None:
            if created or self.fields is None:
                return True
            wanted = self.columns(mapper)
            if any(not wanted.isdisjoint(keys) for keys in written):
                return True
        return any(one.passes(mapper, created, *written) for one in self.others)

    @property
    def fn(self) -> Callable[..., Any] | None:
        """The callable, or ``None`` once a weakly connected one was garbage collected."""
        return self._fn()

    @property
    def sender(self) -> Any:
        """What the receiver was connected to: a class, a name, ``blinker.ANY``, any object."""
        return self._sender()

    def matches(self, sender: Any) -> bool:
        """Whether an event that ``sender`` sends is for this receiver."""
        if not matches(self._sender(), sender, self.propagate):
            return False
        if self.fields is None or not is_mapped(sender) or self._names(sender):
            return True
        mapper = class_mapper(sender, configure=False)
        return not mapper.configured or bool(self.columns(mapper))

    def columns(self, mapper: Mapper[Any]) -> frozenset[str]:
        """The column attributes of ``mapper`` that ``fields`` names, as far as it has them."""
        assert self.fields is not None
        found = self._columns.get(mapper)
        if found is None:
            keys = (column_keys(mapper, field) for field in self.fields)
            found = self._columns[mapper] = frozenset[str]().union(*keys)
        return found

    def check_fields(self, mapper: Mapper[Any]) -> None:
        """Raise :class:`ReceiverOptionError` if the class lacks what ``fields`` names.

        A class that the receiver was not connected to by name may lack it.
        """
        if not self._names(mapper.class_):
            return
        for field in sorted(self.fields or ()):
            if not column_keys(mapper, field):
                raise ReceiverOptionError(
                    f"receiver {self}: {mapper.class_.__name__} has no column attribute "
                    f"{field!r} to watch with fields=. Use one of: "
                    f"{', '.join(sorted(prop.key for prop in mapper.column_attrs))}"
                )

    def _names(self, cls: type) -> bool:
        """Whether the sender is this very class, or its name."""
        sender = self._sender()
        return sender is cls or (isinstance(sender, str) and is_named(cls, sender))

    def merged(self, other: Receiver) -> Receiver:
        """This receiver, which lets through what either of the two would."""
        if not self.chooses:
            return self
        merged = copy.copy(self)
        if other.chooses:
            merged.others = (*self.others, other)
        else:
            merged.created, merged.fields, merged.others = None, None, ()
            merged.chooses = False
        return merged

    def __str__(self) -> str:
        return f"{self.name} ({self.location})"

    def __repr__(self) -> str:
        return f"<Receiver {self} on={self.on!r} sender={describe_sender(self.sender)}>"


def _strong(value: Any) -> Callable[[], Any]:
    return lambda: value


def identity(value: Any) -> Any:
    """A hashable that is equal for the same object (and for equal strings), as blinker has it."""
    if isinstance(value, str | int):
        return value
    if inspect.ismethod(value):
        return (id(value.__func__), id(value.__self__))
    return id(value)


def unwrapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind partials, decorators and callable instances."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not inspect.isroutine(fn) and not isinstance(fn, type):
        fn = getattr(fn, "__call__", fn)  # noqa: B004 - the bound method is wanted, not the test
    return fn


def is_async(fn: Callable[..., Any]) -> bool:
    """Whether calling ``fn`` gives a coroutine: also for partials and ``async def __call__``."""
    return inspect.iscoroutinefunction(unwrapped(fn))


def qualified_name(named: Any) -> str:
    """``module.qualname`` of a class or a function, or of the class of an instance."""
    while isinstance(named, functools.partial):
        named = named.func
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}"


def location(fn: Callable[..., Any]) -> str:
    """``file:line`` where ``fn`` is defined, or ``<built-in>``."""
    code = getattr(inspect.unwrap(unwrapped(fn)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else "<built-in>"


def matches(wanted: Any, sender: Any, propagate: bool = False) -> bool:
    """Whether ``sender`` is one that ``sender=wanted`` stands for."""
    if wanted is ANY or wanted is sender:
        return True
    if not isinstance(sender, type):
        return isinstance(wanted, str | int) and bool(wanted == sender)
    if isinstance(wanted, str):
        return is_named(sender, wanted) or (
            propagate
            and is_mapped(sender)
            and any(is_mapped(base) and is_named(base, wanted) for base in sender.__mro__[1:])
        )
    if isinstance(wanted, type) and (propagate or not is_mapped(wanted)):
        return issubclass(sender, wanted) and is_mapped(sender)
    return False


def describe(fn: Callable[..., Any]) -> str:
    """How a function is named in messages."""
    return f"{qualified_name(fn)} ({location(fn)})"


def is_named(cls: type, name: str) -> bool:
    """Whether ``name`` is the class's bare or dotted name."""
    if "." not in name:
        return cls.__name__ == name
    return name in (qualified_name(cls), f"{cls.__module__}.{cls.__name__}")


def names_of(cls: type) -> set[str]:
    """The bare and the dotted name by which a class is meant to be called."""
    return {cls.__name__, qualified_name(cls)}


def is_class_name(name: str) -> bool:
    """Whether some class could have this bare or dotted name."""
    return all(part.isidentifier() or part == "<locals>" for part in name.split("."))


def is_same_sender(connected: Any, given: Any) -> bool:
    """Whether a sender was connected to by what is given: the object, or a class and its name."""
    if isinstance(connected, str) and isinstance(given, type):
        connected, given = given, connected
    if isinstance(connected, type) and isinstance(given, str):
        return is_named(connected, given)
    return bool(identity(connected) == identity(given))


def describe_sender(sender: Any) -> str:
    """How a sender is named in messages."""
    if sender is ANY:
        return "any sender"
    if isinstance(sender, type):
        return sender.__name__
    # The repr() of a table is its whole definition, that of an attribute an address.
    if isinstance(sender, Table | QueryableAttribute):
        return str(sender)
    try:
        if is_mapped(type(sender)):  # its repr() may load what is expired
            return _describe_instance(sender)
        return repr(sender)
    except Exception:  # it is for an error message, which must not be lost
        return object.__repr__(sender)


def _describe_instance(instance: Any) -> str:
    key = state_of(instance).identity
    name = type(instance).__name__
    return f"new {name}" if key is None else f"{name} {key[0] if len(key) == 1 else key}"


def sender_list(sender: Any) -> list[Any]:
    """``sender=`` as given by a user, as a list; ``None`` is any sender."""
    if sender is None or sender is ANY:
        return [ANY]
    if isinstance(sender, list | tuple | set | frozenset):
        if not sender:
            raise ReceiverOptionError("sender=[] never matches; leave sender out for every model")
        return [ANY if one is None else one for one in sender]
    return [sender]


def field_names(fields: Iterable[Any] | str | None) -> frozenset[str] | None:
    """``fields=`` as given by a user (names or mapped attributes), as names."""
    if fields is None:
        return None
    names = [fields] if isinstance(fields, str) else [getattr(f, "key", f) for f in fields]
    if not names or not all(isinstance(name, str) for name in names):
        raise ReceiverOptionError(
            f"fields= takes attribute names, {{'status'}} or {{Order.status}}, not {fields!r}"
        )
    return frozenset(names)


def check_durable_name(name: str) -> None:
    """Raise :class:`ReceiverOptionError` unless a worker can know the receiver by this name."""
    if "<" in name or len(name) > MAX_NAME:
        raise ReceiverOptionError(
            f"durable=True needs a name by which another process finds this receiver, of "
            f"{MAX_NAME} characters at most; {name!r} is not one. "
            f'Give it one that stays: name="orders.reindex"'
        )


def check_callable(
    fn: Any, signal: str, arguments: tuple[str, ...] | None, can_await: bool
) -> None:
    """Raise :class:`ReceiverTypeError` if the signal of this name could not call ``fn``.

    :param arguments: the names of what the signal sends; ``None`` if its sender decides.
    :param can_await: whether the code that sends the signal can await a receiver.
    """
    if not callable(fn):
        raise ReceiverTypeError(f"{signal}: {fn!r} is not callable, so it cannot be a receiver")
    try:
        signature = inspect.signature(fn)
    except ValueError:  # a builtin that does not tell
        return
    who = f"{signal}: receiver {describe(fn)}"
    if inspect.isgeneratorfunction(unwrapped(fn)) or inspect.isasyncgenfunction(unwrapped(fn)):
        raise ReceiverTypeError(f"{who} is a generator: calling it would run nothing of its body")
    if is_async(fn) and not can_await:
        raise ReceiverTypeError(
            f"{who} is async, but what sends {signal} never awaits. Make it a plain function."
        )
    parameters = list(signature.parameters.values())
    if inspect.isfunction(fn) and parameters and parameters[0].name == "self":
        raise ReceiverTypeError(
            f"{who} takes self, so it is a method without an instance. Connect the method of an "
            f"instance, for example in __init__: {signal}.connect(self.{fn.__name__})"
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        keywords = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        mended = signature.replace(parameters=[*parameters, keywords])
        raise ReceiverTypeError(
            f"{who} must accept **kwargs, because signals may send more in a later version. "
            f"Add it: def {getattr(fn, '__name__', 'receiver')}{mended}"
        )
    try:
        if arguments is None:
            signature.bind_partial(object())
        else:
            signature.bind(object(), **dict.fromkeys(arguments))
    except TypeError as error:
        raise ReceiverTypeError(
            f"{who} cannot be called: {error}. {signal} sends the sender as the first "
            f"argument, then by keyword {', '.join(arguments or ('what send() is given',))}"
        ) from None
