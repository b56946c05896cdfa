"""``explain``: the receivers there are now, per sender, signal and phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import class_mapper

from .._sqlalchemy.mappers import configured_mappers, is_mapped, writes_rows
from ..bridge.flush.m2m import association_of
from ..errors import ReceiverOptionError, printable
from ..receivers.dispatch import audible
from ..receivers.installations import installations, model_signals
from ..receivers.receiver import PHASES, Phase, Receiver, describe_sender, qualified_name, unwrapped
from ..signals.builtin import receiver_failed
from ..signals.kinds import AssociationSignal
from ..signals.signal import Signal, known_signals
from .explanation import Explanation
from .parts import Entry, Group, Step, place_of
from .reasons import hears, is_meant, notice_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Mapper


def explain(target: Any = None) -> Explanation:
    """Show which receivers are called, when and in which order, and which never can be.

    :param target: a mapped class; an unmapped base class or mixin, for the models that inherit it;
        a signal; a module or package, for its models and what its receivers listen to; ``None`` for
        everything that somebody listens to, signals of your own included.
    :returns: an :class:`~sqla_signals.explaining.Explanation`: ``print()`` it, or call
        ``to_json()``, ``to_mermaid()`` or ``to_dot()``.
    :raises ReceiverOptionError: ``target`` is nothing of that; or a receiver turns out to be
        connected with wrong options, because mappers are configured by this.

    It shows what is connected at this moment. What ``fields`` lets through, and whether a session
    is one that is listened to, is only known when something happens. Callbacks given to
    ``on_commit()`` and ``on_rollback()`` are not receivers.
    """
    built_in = [*model_signals, receiver_failed]
    asked_signals = [target] if isinstance(target, Signal) else known_signals()
    signals = [signal for signal in built_in if signal in asked_signals]
    subject, mappers, is_own = _scope(target, signals)
    groups = list(_merged(_groups(signals, mappers, with_empty=isinstance(target, type))))
    if isinstance(target, Signal):
        more = list(_other_senders([target], groups))
        needs_install = bool(signals)
    else:
        others = [
            signal
            for signal in asked_signals
            if signal not in built_in and any(map(is_own, signal.table.receivers))
        ]
        more = list(_other_senders(others, groups))
        needs_install = bool(groups or not more)
    return Explanation(
        subject,
        tuple(sorted(str(installation) for installation in installations)),
        needs_install,
        (*groups, *more),
        tuple(
            notice
            for signal in signals
            for receiver in signal.table.receivers
            if (
                is_own(receiver)
                or any(hears(receiver, mapper) or is_meant(receiver, mapper) for mapper in mappers)
            )
            and (notice := notice_of(signal, receiver)) is not None
        ),
    )


def _scope(
    target: Any, signals: Iterable[Signal]
) -> tuple[str, list[Mapper[Any]], Callable[[Receiver], bool]]:
    """Find out what is asked about.

    :param signals: those that an installation sends.
    :returns: how the target is named; the mappers to show; and whether a receiver is shown even if
        it listens to none of them.
    """
    mappers = sorted(configured_mappers(), key=lambda mapper: qualified_name(mapper.class_))
    if target is None:
        return "everything", mappers, lambda receiver: True
    if isinstance(target, Signal):
        return target.name, mappers if signals else [], lambda receiver: True
    if isinstance(target, ModuleType):

        def is_own(receiver: Receiver) -> bool:
            return _is_in(target, _module_of(receiver))

        own = [r for signal in signals for r in signal.table.receivers if is_own(r)]
        shown = [
            mapper
            for mapper in mappers
            if _is_in(target, mapper.class_.__module__) or any(hears(r, mapper) for r in own)
        ]
        return target.__name__, shown, is_own
    if isinstance(target, type):
        if is_mapped(target):
            class_mapper(target)  # raises if it cannot be configured
            shown = [mapper for mapper in mappers if mapper.class_ is target]
        else:
            shown = [mapper for mapper in mappers if issubclass(mapper.class_, target)]
        if not shown:
            raise ReceiverOptionError(
                f"explain({target.__name__}): it is not mapped and no model inherits it"
            )
        return qualified_name(target), shown, lambda receiver: False
    raise ReceiverOptionError(
        f"explain({target!r}): give a mapped class, a base class or mixin of models, a signal, "
        f"a module, or nothing for every model"
    )


def _groups(
    signals: Iterable[Signal], mappers: Iterable[Mapper[Any]], *, with_empty: bool
) -> Iterator[Group]:
    for mapper in mappers:
        steps = tuple(step for signal in signals for step in _steps(signal, mapper))
        if steps or with_empty:
            yield Group((qualified_name(mapper.class_),), steps)


def _merged(groups: Iterable[Group]) -> Iterator[Group]:
    """The groups, with one for all senders that the same receivers listen to."""
    senders: dict[tuple[Step, ...], tuple[str, ...]] = {}
    for group in groups:
        senders[group.steps] = senders.get(group.steps, ()) + group.senders
    for steps, names in senders.items():
        yield Group(names, steps)


def _steps(signal: Signal, mapper: Mapper[Any]) -> Iterator[Step]:
    if isinstance(signal, AssociationSignal):
        yield from _m2m_steps(signal, mapper)
        return
    phases = signal.table.phases(mapper.class_)
    for phase in PHASES:
        if phases[phase]:
            yield _step(signal, phase, phases[phase], mapper.class_)


def _m2m_steps(signal: Signal, mapper: Mapper[Any]) -> Iterator[Step]:
    for relationship in filter(writes_rows, mapper.relationships):
        association = association_of(relationship)
        heard = [r for r in signal.table.receivers if association.side_for(r.sender) is not None]
        if heard:
            yield _step(signal, "flush", heard, association.table, association.table.fullname)


def _other_senders(signals: Iterable[Signal], groups: Iterable[Group]) -> Iterator[Group]:
    """The receivers of signals that no group of models shows, by what they listen to."""
    shown = {
        (step.signal, entry.receiver, entry.sender)
        for group in groups
        for step in group.steps
        for entry in step.receivers
    }
    steps: dict[str, list[Step]] = {}
    for signal in signals:
        receivers = signal.table.receivers
        senders = {
            sender_name(receiver.sender): receiver.sender
            for receiver in receivers
            if (signal.name, printable(receiver.name), sender_name(receiver.sender)) not in shown
        }
        for name, sender in senders.items():
            heard = [r for r in receivers if r.sender is sender or r.matches(sender)]
            for phase in PHASES:
                called = [receiver for receiver in heard if receiver.phase == phase]
                if called:
                    steps.setdefault(name, []).append(_step(signal, phase, called, sender))
    for name, found in steps.items():
        yield Group((name,), tuple(found))


def _step(
    signal: Signal, phase: Phase, receivers: Iterable[Receiver], sender: Any, through: str = ""
) -> Step:
    entries = tuple(_entry(signal, receiver, sender) for receiver in receivers)
    return Step(signal.name, phase, through or None, entries)


def _entry(signal: Signal, receiver: Receiver, sender: Any) -> Entry:
    file, line = place_of(receiver.location)
    return Entry(
        printable(receiver.name),
        file,
        line,
        sender_name(receiver.sender),
        receiver.created,
        tuple(sorted(receiver.fields)) if receiver.fields is not None else None,
        receiver.propagate,
        receiver.durable,
        receiver.is_async,
        receiver.weak,
        not audible(signal, sender, (receiver,)),
        repr(receiver.dispatch_uid) if receiver.dispatch_uid is not None else None,
    )


def sender_name(sender: Any) -> str:
    """How a sender is named here: classes with their modules."""
    return qualified_name(sender) if isinstance(sender, type) else describe_sender(sender)


def _module_of(receiver: Receiver) -> str:
    fn = receiver.fn
    return getattr(unwrapped(fn), "__module__", None) or "" if fn is not None else ""


def _is_in(module: ModuleType, name: str) -> bool:
    return f"{name}.".startswith(f"{module.__name__}.")
