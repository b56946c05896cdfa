"""``Signal``: ordered receivers behind blinker's API, and ``ModelSignal``, which models send."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator, Mapping
from inspect import isawaitable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Unpack

import blinker
from blinker import ANY

from ..errors import ReceiverOptionError
from ..receivers import dispatch, mapping
from ..receivers.blocks import block
from ..receivers.observing import observed, observed_async, observers
from ..receivers.protocols import F, M, Options, OtherSender, P, R, ReceiverOf
from ..receivers.receiver import (
    CALLS,
    PHASES,
    Phase,
    Receiver,
    check_callable,
    check_durable_name,
    default_name,
    describe,
    describe_sender,
    field_names,
    identity,
    is_class_name,
    is_same_sender,
    sender_list,
)

Results = list[tuple[Callable[..., Any], Any]]

logger: Final = logging.getLogger("sqla_signals")

_signals: Final[weakref.WeakSet[Signal]] = weakref.WeakSet()
_signals_lock: Final = threading.Lock()


def known_signals() -> list[Signal]:
    """Every signal that there is, a user's own as well, by name."""
    with _signals_lock:
        return sorted(_signals, key=lambda signal: signal.name)


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
    _phases: tuple[Phase, ...] = ("flush",)

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
        self._table: dispatch.Table | None = None
        # Reentrant: garbage collection inside the lock may run a weak reference's callback.
        self._lock = threading.RLock()
        with _signals_lock:
            _signals.add(self)

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

    # -- connecting ----------------------------------------------------------------------------

    def connect(
        self,
        receiver: F,
        sender: Any = ANY,
        weak: bool = True,
        *,
        on: Phase = "flush",
        propagate: bool = False,
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
        check_callable(receiver, self.name, sent)
        who = f"{self.name}: receiver {describe(receiver)}"
        if on not in PHASES or on not in self._phases:
            raise ReceiverOptionError(
                f"{who}: on={on!r} is not one of {', '.join(map(repr, self._phases))}, "
                f"which this signal takes"
            )
        if not isinstance(name, str | None):
            raise ReceiverOptionError(f"{who}: name={name!r} is no str")
        try:
            if durable:
                self._check_durable(receiver, on, name or default_name(receiver))
                on = "commit"
            names = field_names(fields)
            senders = sender_list(sender)
        except ReceiverOptionError as error:
            raise ReceiverOptionError(f"{who}: {error}") from None
        for one in senders:
            self._check_sender(one, receiver)
        connected = [
            Receiver(
                receiver,
                one,
                weak=weak,
                on=on,
                propagate=propagate,
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
            self._table = None
        self._announce_connect(receiver, sender, weak)
        return receiver

    def _announce_connect(self, receiver: Callable[..., Any], sender: Any, weak: bool) -> None:
        # blinker's cached property: the signal exists once somebody asked for it.
        if "receiver_connected" in self.__dict__ and self.receiver_connected.receivers:
            self.receiver_connected.send(self, receiver=receiver, sender=sender, weak=weak)

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
        # Not `ANY in senders`: a mapped attribute makes SQL of a comparison.
        any_sender = any(one is ANY for one in senders)
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
            self._table = None
        listened_to = "receiver_disconnected" in self.__dict__
        if gone and listened_to and self.receiver_disconnected.receivers:
            self.receiver_disconnected.send(self, receiver=receiver, sender=sender)
        return bool(gone)

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

    # -- sending -------------------------------------------------------------------------------

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
        table = self._table or self.table
        if not table.receivers:  # sending to nobody has to cost next to nothing
            return []
        results: Results = []
        receivers = dispatch.audible(self, sender, table.lookup(sender))
        if _async_wrapper is None:
            for receiver in receivers:
                if receiver.is_async:
                    raise dispatch.unawaitable(self, receiver, sender, "send(): use send_async()")
        for receiver in receivers:
            fn = receiver.fn
            if fn is not None:
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
        for receiver in self._lookup(sender):
            fn = receiver.fn
            if fn is None:
                continue
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
        for receiver in self._lookup(sender):
            fn = receiver.fn
            if fn is None:
                continue
            try:
                if receiver.is_async:
                    raise dispatch.unawaitable(
                        self, receiver, sender, "send_robust(): use send_async()"
                    )
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
        table = self.table
        return any(table.lookup(sender, call) for call in CALLS)

    def receivers_for(self, sender: Any) -> Generator[Callable[..., Any]]:
        """Yield the receivers that :meth:`send` would call for ``sender``, in order."""
        for receiver in self.table.lookup(sender):
            fn = receiver.fn
            if fn is not None:
                yield fn

    def _lookup(self, sender: Any) -> tuple[Receiver, ...]:
        table = self._table or self.table
        return dispatch.audible(self, sender, table.lookup(sender))

    @property
    def table(self) -> dispatch.Table:
        """The receivers as they are now; a new object after each change."""
        table = self._table
        if table is None:
            with self._lock:
                self._prune()
                table = self._table = dispatch.Table(self._connected.values())
        return table

    # -- bookkeeping ---------------------------------------------------------------------------

    def forget_lookups(self) -> None:
        """Let new mappings be seen by the next lookup."""
        self._table = None

    def _check_sender(self, sender: Any, receiver: Callable[..., Any]) -> None:
        """Overridden where only some objects can be senders."""

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        """Overridden where options depend on the sender."""
        refuse_fields(self, receivers)

    def _check_durable(self, receiver: Callable[..., Any], on: Phase, name: str) -> None:
        """Overridden where there is something to be durable."""
        raise ReceiverOptionError(
            "durable=True is for what mapped classes send; whoever sends this signal can write "
            "into the database first, and be durable by that"
        )

    def _forget(self, receiver: Receiver) -> None:
        # Called by a weak reference at any moment, even inside the lock: nothing is removed here.
        self._forgotten.append(receiver)
        self._table = None

    def _prune(self) -> None:
        while self._forgotten:
            receiver = self._forgotten.popleft()
            if self._connected.get(receiver.key) is receiver:
                del self._connected[receiver.key]

    def _disconnect(self, receiver_id: Any, sender_id: Any) -> None:
        raise NotImplementedError("blinker's internal bookkeeping is not used")

    def _cleanup_bookkeeping(self) -> None:
        with self._lock:
            self._prune()

    def _clear_state(self) -> None:
        """Disconnect every receiver. For tests."""
        with self._lock:
            self._forgotten.clear()
            self._connected.clear()
            self._table = None


def refuse_fields(signal: Signal, receivers: Collection[Receiver]) -> None:
    """Refuse receivers that ask for changes of rows where there are none."""
    for receiver in receivers:
        if receiver.fields is not None:
            raise ReceiverOptionError(
                f"{signal.name}: receiver {receiver}: fields= selects changes of rows, as pre_save "
                f"and post_save tell of, and {signal.name} does not. Leave it out."
            )


class ModelSignal(Signal):
    """A signal that is sent by mapped classes, by an installation and not by hand."""

    if TYPE_CHECKING:

        def connect(  # type: ignore[override]  # takes fewer receivers than its base
            self,
            receiver: ReceiverOf[M, P, R],
            sender: type[M] | OtherSender = ANY,
            weak: bool = True,
            **options: Unpack[Options],
        ) -> Callable[P, R]:
            """Like :meth:`Signal.connect`, for receivers that take an instance of ``sender``."""
            ...

    def __init__(
        self, name: str, doc: str, *, arguments: Collection[str], phases: tuple[Phase, ...]
    ) -> None:
        super().__init__(name, doc, arguments=arguments)
        self._phases = phases
        mapping.model_signals.append(self)

    def _check_sender(self, sender: Any, receiver: Callable[..., Any]) -> None:
        if sender is not ANY and not isinstance(sender, str | type):
            raise ReceiverOptionError(
                f"{self.name}: receiver {describe(receiver)}: sender={sender!r} is no sender; "
                f"give a mapped class, a base class or mixin of models, or a class name"
            )
        if isinstance(sender, str) and not is_class_name(sender):
            raise ReceiverOptionError(
                f"{self.name}: receiver {describe(receiver)}: sender={sender!r} is not the name "
                f"of a class. Write 'Order', or 'shop.models.Order' if there are several."
            )

    def _check_receivers(self, receivers: Collection[Receiver]) -> None:
        mapping.connected(self, receivers)

    def _check_durable(self, receiver: Callable[..., Any], on: Phase, name: str) -> None:
        if "commit" not in self._phases or on == "rollback":
            raise ReceiverOptionError(
                f"durable=True delivers what was committed, which "
                f"{self.name if on != 'rollback' else 'on=' + repr(on)} does not know. "
                f"Connect it to post_save or post_delete, and leave out on="
            )
        check_durable_name(name)
        for known in mapping.durable_receivers():
            if known.name == name and known.fn_id != identity(receiver):
                raise ReceiverOptionError(
                    f"durable=True: {known} has the name {name!r} already, and a worker could not "
                    f"tell the two apart. Give one of them another name="
                )
