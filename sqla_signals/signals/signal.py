"""``Signal``: ordered receivers behind blinker's API."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Iterator, Mapping
from inspect import isawaitable
from types import MappingProxyType
from typing import Any, Final, NoReturn

import blinker
from blinker import ANY

from ..errors import ReceiverOptionError, ReceiverTypeError
from ..receivers import dispatch
from ..receivers.blocks import block
from ..receivers.observing import observed, observed_async, observers
from ..receivers.protocols import F
from ..receivers.receiver import (
    On,
    Receiver,
    check_callable,
    describe,
    describe_sender,
    field_names,
    identity,
    is_same_sender,
    qualified_name,
    sender_list,
)

Results = list[tuple[Callable[..., Any], Any]]

logger: Final = logging.getLogger("sqla_signals")


def known_signals() -> list[Signal]:
    """Every signal of the process, those of users included, by name."""
    return [signal for signal in dispatch.known_signals() if isinstance(signal, Signal)]


class Signal(blinker.NamedSignal):
    """A named signal with ordered receivers; blinker's API, safe to use from several threads.

    :param name: the name, used in messages and ``repr``.
    :param doc: the docstring of the signal.
    :param arguments: names of the keyword arguments that are always sent. When given, a receiver
        that requires another one is refused at connect time.

    Receivers are called in the order in which they were connected, each once per event however
    many of its connections match. A send uses the receivers there were when it began.
    """

    arguments: tuple[str, ...] | None = None
    _phases: tuple[On, ...] = ("flush",)
    _tells_changes = False
    """Whether it is sent for a row with its changes, among which ``fields=`` chooses."""

    _awaits = True
    """Whether what sends it can await a receiver."""

    # blinker keeps sets of ids in instance attributes and iterates over them without a lock; none
    # of that is used here, so its __init__, which creates them, is not called.
    def __init__(
        self, name: str, doc: str | None = None, *, arguments: Collection[str] | None = None
    ) -> None:
        self.name = name
        if doc:
            self.__doc__ = doc
        if arguments is not None:
            self.arguments = tuple(arguments)
        self._connected: dict[Any, Receiver] = {}
        self._forgotten: deque[Receiver] = deque()
        self.table: dispatch.Table = dispatch.Table(self._current)
        """The receivers as they are now; a new object after each change."""
        # Reentrant: garbage collection inside the lock may run a weak reference's callback.
        self._lock = threading.RLock()
        dispatch.add_signal(self)

    @property
    def receivers(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """Public as a boolean only: ``if signal.receivers:``."""
        with self._lock:
            self._prune()
            return MappingProxyType(dict(self._connected))

    @property
    def is_muted(self) -> bool:  # type: ignore[override]
        """Whether this thread or task is inside :meth:`muted` or a ``mute`` that covers all."""
        return dispatch.is_muted(self)

    @property
    def _tells_saves(self) -> bool:
        """Whether it is sent for new rows and for updated ones, which ``created=`` tells apart."""
        return "created" in (self.arguments or ())

    def connect(
        self,
        receiver: F,
        sender: Any = ANY,
        weak: bool = True,
        *,
        on: On = "flush",
        propagate: bool = False,
        created: bool | None = None,
        fields: Collection[Any] | None = None,
        durable: bool = False,
        name: str | None = None,
        dispatch_uid: object = None,
    ) -> F:
        """Connect ``receiver`` and return it.

        :param receiver: called as ``receiver(sender, **kwargs)``; must accept ``**kwargs``.
        :param sender: a mapped class; an unmapped base class or mixin, for every model that
            inherits it; a string, the name of a class that may not exist yet; a list of these;
            ``None`` or ``blinker.ANY`` for any sender. A signal of your own may be sent by any
            object, then that object.
        :param weak: hold the receiver by a weak reference, as blinker does. A lambda or a local
            function needs ``weak=False``.
        :param on: ``"flush"``: called at once, inside the transaction; ``"commit"``: after the
            transaction was committed, in one of its own; ``"rollback"``: after the work was undone.
        :param propagate: also for the mapped subclasses of ``sender``.
        :param created: ``True``: only for new rows; ``False``: only for rows that were updated.
        :param fields: attribute names; only called when one of them changed, or the row is new or
            deleted.
        :param durable: called by a worker process, at least once, even if this one dies right
            after the commit; implies ``on="commit"`` and adds the argument ``event``. The models
            need an outbox: :func:`sqla_signals.durable.outbox_table`.
        :param name: stable name for messages, ``module.qualname`` by default.
        :param dispatch_uid: a second connection with the same uid and sender is ignored.
        :raises ReceiverTypeError: not callable, or not with what this signal sends.
        :raises ReceiverOptionError: an option that makes no sense here.

        Connecting the same function for the same sender again has no effect.
        """
        sent = self.arguments
        if durable and sent is not None:
            sent = (*sent, "event")
        if isinstance(receiver, Signal):
            raise ReceiverTypeError(
                f"{self.name}: {receiver.name} is a signal, so it cannot be a receiver"
            )
        check_callable(receiver, self.name, sent, self._awaits)
        try:
            if on not in self._phases:
                raise ReceiverOptionError(
                    f"on={on!r} is not one of {', '.join(map(repr, self._phases))}, which this "
                    f"signal takes"
                )
            if not isinstance(name, str | None):
                raise ReceiverOptionError(f"name={name!r} is not a string")
            if durable:
                self._check_durable(receiver, on, name or qualified_name(receiver))
                on = "commit"
            if created is not None and not self._tells_saves:
                raise ReceiverOptionError(
                    f"created= chooses between new rows and updated ones, as pre_save and "
                    f"post_save tell of, and {self.name} does not. Leave it out."
                )
            if not isinstance(created, bool | None):
                raise ReceiverOptionError(f"created={created!r} is not True, False or None")
            names = field_names(fields)
            if names is not None and not self._tells_changes:
                raise ReceiverOptionError(
                    f"fields= selects changes of rows, as pre_save and post_save tell of, and "
                    f"{self.name} does not. Leave it out."
                )
            senders = sender_list(sender)
            for one in senders:
                self._check_sender(one)
        except ReceiverOptionError as error:
            raise ReceiverOptionError(
                f"{self.name}: receiver {describe(receiver)}: {error}"
            ) from None
        connected = [
            Receiver(
                receiver,
                one,
                weak=weak,
                on=on,
                propagate=propagate,
                created=created,
                fields=names,
                durable=durable,
                name=name,
                dispatch_uid=dispatch_uid,
                forget=self._forget,
            )
            for one in senders
        ]
        self._check_receivers(connected)
        with self._lock:
            self._prune()
            for new in connected:
                self._connected.setdefault(new.key, new)
            self.forget_lookups()
        self._notify("receiver_connected", receiver=receiver, sender=sender, weak=weak)
        return receiver

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be used as a decorator."""
        raise ReceiverTypeError(
            f"{self.name} is a signal: it cannot be called, nor used as a decorator. Write "
            f"@receiver({self.name}) to connect a function, {self.name}.send(sender) to send it"
        )

    def disconnect(  # type: ignore[override]
        self,
        receiver: Callable[..., Any] | None = None,
        sender: Any = ANY,
        *,
        dispatch_uid: object = None,
    ) -> bool:
        """Disconnect ``receiver`` and return whether anything was removed.

        :param receiver: the function; may be left out when ``dispatch_uid`` is given.
        :param sender: only its connections to this sender (or list of senders); by default all. A
            class may also be given by the name it was connected by, and the other way round.
        :param dispatch_uid: only its connection with this uid.

        A send that has begun still calls it.
        """
        who = identity(receiver) if receiver is not None else None
        if who is None and dispatch_uid is None:
            raise ReceiverOptionError(
                f"{self.name}.disconnect() needs a receiver or a dispatch_uid"
            )
        senders = sender_list(sender)
        any_sender = any(one is ANY for one in senders)  # an attribute's == would make SQL
        with self._lock:
            self._prune()
            gone = [
                key
                for key, known in self._connected.items()
                if (who is None or known.fn_id == who)
                and (dispatch_uid is None or known.dispatch_uid == dispatch_uid)
                and (any_sender or any(is_same_sender(known.sender, one) for one in senders))
            ]
            for key in gone:
                del self._connected[key]
            self.forget_lookups()
        if gone:
            self._notify("receiver_disconnected", receiver=receiver, sender=sender)
        return bool(gone)

    def _notify(self, name: str, **arguments: Any) -> None:
        # A cached property of blinker's: the signal exists once somebody asked for it.
        if name in self.__dict__:
            getattr(self, name).send(self, **arguments)

    @block
    def connected_to(  # type: ignore[override]
        self, receiver: Callable[..., Any], sender: Any = ANY, **options: Any
    ) -> Generator[None]:
        """Connect ``receiver`` inside a ``with`` block; a permanent connection stays as it was.

        Takes the options of :meth:`connect`, except ``weak`` and ``dispatch_uid``.
        """
        uid = object()
        self.connect(receiver, sender, weak=False, dispatch_uid=uid, **options)
        try:
            yield
        finally:
            self.disconnect(receiver, dispatch_uid=uid)

    @block
    def muted(self) -> Generator[None]:  # type: ignore[override]
        """Send nothing inside a ``with`` block, in this thread or task; blocks may nest."""
        with dispatch.mute(self):
            yield

    def send(
        self,
        sender: Any = None,
        /,
        *,
        _async_wrapper: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> Results:
        """Call the receivers of ``sender`` in order; return ``(receiver, result)`` pairs.

        An exception passes through and the receivers behind it are not called.

        :raises AsyncReceiverError: a receiver is async and no ``_async_wrapper`` was given; then
            no receiver was called at all.
        """
        if not self.table.receivers:
            return []  # at once, because most signals have no receivers
        receivers = self._audible(sender)
        if _async_wrapper is None:
            self._refuse_async(receivers, sender, "send()")
        results: Results = []
        for receiver, fn in _alive(receivers):
            call = receiver.strong or fn
            if _async_wrapper and receiver.is_async:
                call = _async_wrapper(call)
            if observers:
                call = observed(call, self, receiver)
            results.append((fn, call(sender, **kwargs)))
        return results

    async def send_async(
        self,
        sender: Any = None,
        /,
        *,
        _sync_wrapper: Callable[[Callable[..., Any]], Callable[..., Coroutine[Any, Any, Any]]]
        | None = None,
        **kwargs: Any,
    ) -> Results:
        """Like :meth:`send`, awaiting async receivers; sync ones are called in their turn."""
        results: Results = []
        for receiver, fn in _alive(self._audible(sender)):
            call = receiver.strong or fn
            if _sync_wrapper is not None and not receiver.is_async:
                call = _sync_wrapper(call)
            if observers:
                call = observed_async(call, self, receiver)
            result = call(sender, **kwargs)
            if isawaitable(result):
                result = await result
            results.append((fn, result))
        return results

    def send_robust(self, sender: Any = None, /, **kwargs: Any) -> Results:
        """Like :meth:`send`, but an exception is logged and stands in the list as the result.

        Exceptions that are not an ``Exception``, such as ``KeyboardInterrupt``, pass through.
        """
        results: Results = []
        for receiver, fn in _alive(self._audible(sender)):
            try:
                self._refuse_async([receiver], sender, "send_robust()")
                call = receiver.strong or fn
                if observers:
                    call = observed(call, self, receiver)
                result = call(sender, **kwargs)
            except Exception as error:
                logger.exception(
                    "%s: receiver %s failed for %s", self.name, receiver, describe_sender(sender)
                )
                result = error
            results.append((fn, result))
        return results

    def has_receivers_for(self, sender: Any) -> bool:
        """Whether anybody would be called for ``sender``, in any phase. Ignores muting."""
        return any(self.table.phases(sender).values())

    def receivers_for(self, sender: Any) -> Generator[Callable[..., Any]]:
        """Yield the receivers that :meth:`send` would call for ``sender``, in order."""
        yield from (fn for _, fn in _alive(self.table.lookup(sender)))

    def _audible(self, sender: Any) -> tuple[Receiver, ...]:
        return dispatch.audible(self, sender, self.table.lookup(sender))

    def _refuse_async(self, receivers: Iterable[Receiver], sender: Any, method: str) -> None:
        for receiver in receivers:
            if receiver.is_async:
                raise dispatch.unawaitable(self, receiver, sender, f"{method}: use send_async()")

    def _current(self) -> list[Receiver]:
        with self._lock:
            self._prune()
            return list(self._connected.values())

    def forget_lookups(self) -> None:
        """Let new mappings be seen by the next lookup."""
        self.table = dispatch.Table(self._current)

    def _check_sender(self, sender: Any) -> None:
        """Overridden by signals that only some objects send."""

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        """Overridden by signals whose options depend on mapped classes."""

    def _check_durable(self, receiver: Callable[..., Any], on: On, name: str) -> None:
        """Overridden by signals that can be delivered durably."""
        raise ReceiverOptionError(
            "durable=True is for what mapped classes send; whoever sends this signal can write "
            "into the database first, and be durable by that"
        )

    def _forget(self, receiver: Receiver) -> None:
        # Called by a weak reference at any moment, even inside the lock: nothing is removed here.
        self._forgotten.append(receiver)
        self.forget_lookups()

    def _prune(self) -> None:
        while self._forgotten:
            receiver = self._forgotten.popleft()
            if self._connected.get(receiver.key) is receiver:
                del self._connected[receiver.key]

    def _clear_state(self) -> None:
        """Disconnect every receiver. For tests."""
        with self._lock:
            self._connected.clear()
            self.forget_lookups()


def _alive(receivers: Iterable[Receiver]) -> Iterator[tuple[Receiver, Callable[..., Any]]]:
    """The receivers with their functions, except those that were garbage collected meanwhile."""
    for receiver in receivers:
        fn = receiver.fn
        if fn is not None:
            yield receiver, fn
