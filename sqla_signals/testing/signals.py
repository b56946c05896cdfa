"""``Signals``, which is the fixture ``signals``: what a test may ask, and what it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .. import observe
from ..errors import ReceiverOptionError
from ..receivers.blocks import block
from ..receivers.installations import installations
from ..signals.signal import Signal
from .capture import Capture, Failure, Sent
from .filters import Expected, Wanted

if TYPE_CHECKING:
    from ..receivers.receiver import Phase


class Signals:
    """What was sent since the test began, or since :meth:`clear`.

    A signal is noted when it reaches a receiver. One that nobody listens to is not sent;
    :meth:`listen` listens where a test has no receiver of its own.

    The filters are the same everywhere:

    - ``signal``: which signal; ``None`` for any.
    - ``sender``: a class, a base class or mixin, the name of a class, a ``secondary`` table or its
      relationship, any object; ``None`` for any.
    - ``on``: ``"flush"``, ``"commit"``, ``"rollback"`` or ``"durable"``; ``None`` for any.
    - ``receiver``: a receiver that was called, the function or its name.
    - the arguments of the signal by name: ``created=True``. An ``instance`` is the same if it
      stands for the same row. ``changes={"status": "paid"}`` asks for new values, and for a
      :class:`~sqla_signals.Change` where one is given; other changes may be there as well. A
      function or lambda is asked whether it likes the value. What an instance holds is what it
      holds when the test asks; ``changes`` is what it was.
    """

    def __init__(self) -> None:
        self._capture = Capture()
        self._heard: list[Callable[[], object]] = []
        self._nothing_since = "the test began"
        self.has_told: bool = False
        """Whether everything sent is in the message of an expectation that has failed."""

    # -- asking ------------------------------------------------------------------------------------

    @property
    def lines(self) -> list[str]:
        """A line for each signal sent, in order: ``"post_save Order created on commit"``."""
        return [str(sent) for sent in self._capture.sent]

    @property
    def failures(self) -> list[Failure]:
        """The receivers that have failed where that is only logged; any left fails the test."""
        return self._capture.failures

    def sent(
        self,
        signal: Signal | None = None,
        sender: Any = None,
        *,
        on: Phase | None = None,
        receiver: Callable[..., Any] | str | None = None,
        **arguments: Any,
    ) -> list[Sent]:
        """Everything sent that the filters let through, in order."""
        wanted = Wanted(signal, sender, on, receiver, arguments)
        return [sent for sent in self._capture.sent if wanted.is_met_by(sent)]

    def expect(
        self,
        signal: Signal | None = None,
        sender: Any = None,
        *,
        times: int = 1,
        on: Phase | None = None,
        receiver: Callable[..., Any] | str | None = None,
        **arguments: Any,
    ) -> Sent:
        """Fail unless this was sent, once or so many ``times``; return the last of them."""
        __tracebackhide__ = True
        if times < 1:
            raise ReceiverOptionError("expect(times=...) counts from 1; for none, expect_nothing()")
        wanted = Wanted(signal, sender, on, receiver, arguments)
        found = [sent for sent in self._capture.sent if wanted.is_met_by(sent)]
        if len(found) != times:
            count = "once" if times == 1 else f"{times} times"
            got = f"it was sent {len(found)} times" if found else "it was not sent"
            hint = self._why_not(wanted) if not found else ""
            told = self._told(found, wanted)
            raise AssertionError(f"expected {count}: {wanted}\n{got}{hint}\n{told}")
        return found[-1]

    def expect_nothing(
        self,
        signal: Signal | None = None,
        sender: Any = None,
        *,
        on: Phase | None = None,
        receiver: Callable[..., Any] | str | None = None,
        **arguments: Any,
    ) -> None:
        """Fail if this was sent, or if nobody listens to it, because that would prove nothing."""
        __tracebackhide__ = True
        wanted = Wanted(signal, sender, on, receiver, arguments)
        found = [sent for sent in self._capture.sent if wanted.is_met_by(sent)]
        if found:
            raise AssertionError(f"expected not to be sent: {wanted}\n{self._told(found)}")
        if not wanted.has_listeners():
            raise AssertionError(
                f"expected not to be sent: {wanted}\nit was not, but that proves nothing"
                f"{self._why_not(wanted)}"
            )

    def expect_order(self, *expected: Expected) -> None:
        """Fail unless these were sent in this order; others may come in between.

        :param expected: for each a signal, ``(signal, sender)``, or ``(signal, sender, filters)``
            with a dictionary: ``(post_save, Order, {"on": "commit", "created": True})``.
        """
        __tracebackhide__ = True
        steps = [Wanted.of(one) for one in expected]
        rest: Iterator[Sent] = iter(self._capture.sent)
        found: list[Sent] = []
        for place, wanted in enumerate(steps):
            met = next((sent for sent in rest if wanted.is_met_by(sent)), None)
            if met is None:
                order = "\n".join(
                    f"  {'ok' if number < place else '->'} {step}"
                    for number, step in enumerate(steps[: place + 1])
                )
                later = [f"     {step}" for step in steps[place + 1 :]]
                hint = "" if self._was_sent(wanted) else self._why_not(wanted)
                missing = "the one at the arrow was not sent after those before it"
                text = "\n".join(["expected in this order:", order, *later, missing + hint])
                raise AssertionError(f"{text}\n{self._told(found, wanted)}")
            found.append(met)

    def clear(self) -> None:
        """Forget what was sent so far. Failures stay."""
        self._capture.sent.clear()
        self._nothing_since = "clear()"

    # -- telling -----------------------------------------------------------------------------------

    def listen(self, signal: Signal, sender: Any = None, **options: Any) -> None:
        """Listen for the rest of the test, where the test has no receiver.

        :param options: those of :meth:`Signal.connect`: ``on``, ``propagate``, ``fields``.
        """

        def listening(sender: Any, **arguments: Any) -> None:
            pass

        signal.connect(listening, sender, weak=False, name="signals.listen", **options)
        self._heard.append(lambda: signal.disconnect(listening))

    @block
    def expect_failure(
        self,
        exception: type[BaseException] | tuple[type[BaseException], ...] = Exception,
        receiver: Callable[..., Any] | str | None = None,
    ) -> Iterator[list[Failure]]:
        """Fail unless a receiver fails inside the block, in a way that is only logged.

        :param exception: the class of what it raises.
        :param receiver: the function or its name.
        :returns: for ``as``, a list of those failures, complete at the end of the block. They are
            no longer in :attr:`failures`.
        """
        __tracebackhide__ = True
        before = set(self.failures)
        found: list[Failure] = []
        try:
            yield found
        finally:
            for failure in [one for one in self.failures if one not in before]:
                if isinstance(failure.exception, exception) and (
                    receiver is None or receiver in (failure.receiver, failure.function)
                ):
                    self.failures.remove(failure)
                    found.append(failure)
        if not found:
            who = getattr(receiver, "__qualname__", receiver) or "a receiver"
            names = getattr(exception, "__name__", exception)
            raise AssertionError(
                f"expected {who} to fail with {names}, where that is only logged; it did not\n"
                f"{self._told()}"
            )

    def start(self) -> None:
        """Look on from now. The fixture does that."""
        observe.add(self._capture)

    def stop(self) -> None:
        """Look on no more, and disconnect what listens."""
        observe.remove(self._capture)
        for disconnect in self._heard:
            disconnect()

    def take_failures(self) -> str | None:
        """What to say of :attr:`failures`, which are empty then. The plugin fails a test by it."""
        failures = list(self.failures)
        self.failures.clear()
        if not failures:
            return None
        lines = [f"{failure}\n{failure.traceback()}" for failure in failures]
        return "\n".join(
            [
                "failed where that is only logged:",
                *lines,
                "If the test is about that: with signals.expect_failure(...)",
            ]
        )

    def report(self) -> str | None:
        """Everything sent so far, unless a failed expectation has told it."""
        return None if self.has_told else self._told()

    def _was_sent(self, wanted: Wanted) -> bool:
        return any(wanted.is_met_by(sent) for sent in self._capture.sent)

    def _told(self, found: Sequence[Sent] = (), wanted: Wanted | None = None) -> str:
        """Everything sent: ``*`` before what was found, and why what comes close is not it."""
        self.has_told = True
        sent = self._capture.sent
        if not sent:
            return f"nothing was sent since {self._nothing_since}"
        lines = []
        for number, one in enumerate(sent, start=1):
            lines.append(f"  {'*' if one in found else ' '}{number:3}. {one}{one.details()}")
            misses = wanted.misses(one) if wanted is not None and one not in found else []
            if misses and wanted is not None and wanted.comes_close(one):
                lines.append(f"        but not with {', '.join(misses)}")
        return "\n".join(["sent, in this order:", *lines])

    @staticmethod
    def _why_not(wanted: Wanted) -> str:
        if wanted.is_of_models() and not installations:
            return ": sqla_signals is not installed; call sqla_signals.install()"
        if not wanted.has_listeners():
            return (
                ": nobody listens to it, so it is not sent. Import the receivers, or listen in the "
                "test: signals.listen(post_save, Order)"
            )
        return ""
