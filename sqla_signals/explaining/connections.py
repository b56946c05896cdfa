"""``explain``: the receivers there are now, per sender, signal and phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import class_mapper

from .._sqlalchemy.mappers import configured_mappers, is_mapped, writes_rows
from ..bridge.flush.m2m import association_of
from ..errors import ReceiverOptionError
from ..receivers.dispatch import audible
from ..receivers.installations import installations, model_signals
from ..receivers.receiver import PHASES, Phase, Receiver, describe_sender, unwrapped
from ..signals.builtin import receiver_failed
from ..signals.kinds import AssociationSignal
from ..signals.signal import Signal, known_signals
from .explanation import Explanation
from .parts import Entry, Group, Step, place_of, printable
from .reasons import hears, is_meant, notices

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
    known, sent = known_signals(), [*model_signals, receiver_failed]
    signals = sorted((one for one in known if one in sent), key=sent.index)
    mappers = sorted(configured_mappers(), key=lambda mapper: _dotted(mapper.class_))
    asked: list[Mapper[Any]] = []
    others: list[Signal] = []  # may be sent by anything, installed or not
    if target is None:
        subject = "everything"
        others = [signal for signal in known if signal not in signals]
    elif isinstance(target, Signal):
        subject = target.name
        if target not in signals:
            mappers = []
            others = [target]
        signals = [target]
    elif isinstance(target, ModuleType):
        subject = target.__name__
        found = [(signal, r) for signal in signals for r in signal.table.receivers]
        own = [r for _, r in found if _is_in(target, _module_of(r))]
        others = [
            signal
            for signal in known
            if signal not in signals
            and any(_is_in(target, _module_of(r)) for r in signal.table.receivers)
        ]
        mappers = [
            mapper
            for mapper in mappers
            if _is_in(target, mapper.class_.__module__) or any(hears(r, mapper) for r in own)
        ]
    elif isinstance(target, type):
        subject = _dotted(target)
        if is_mapped(target):
            class_mapper(target)  # raises if it cannot be configured
        asked = [
            mapper
            for mapper in mappers
            if mapper.class_ is target
            or (not is_mapped(target) and issubclass(mapper.class_, target))
        ]
        if not asked:
            raise ReceiverOptionError(
                f"explain({target.__name__}): it is not mapped and no model inherits it"
            )
        mappers = asked
    else:
        raise ReceiverOptionError(
            f"explain({target!r}): give a mapped class, a base class or mixin of models, a signal, "
            f"a module, or nothing for every model"
        )
    groups = list(_merged(_groups(signals, mappers, asked)))
    more = list(_other_senders(signals if isinstance(target, Signal) else others, groups))
    return Explanation(
        subject,
        tuple(sorted(str(installation) for installation in installations)),
        target not in others if isinstance(target, Signal) else bool(groups or not more),
        (*groups, *more),
        tuple(
            notice
            for signal in signals
            for receiver in signal.table.receivers
            if target is None
            or isinstance(target, Signal)
            or (isinstance(target, ModuleType) and _is_in(target, _module_of(receiver)))
            or any(hears(receiver, mapper) or is_meant(receiver, mapper) for mapper in mappers)
            for notice in notices(signal, receiver)
        ),
    )


def _groups(
    signals: Iterable[Signal], mappers: Iterable[Mapper[Any]], asked: Iterable[Mapper[Any]]
) -> Iterator[Group]:
    for mapper in mappers:
        steps = tuple(step for signal in signals for step in _steps(signal, mapper))
        if steps or mapper in asked:
            yield Group((_dotted(mapper.class_),), steps)


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
    for call in PHASES:
        if phases[call]:
            yield _step(signal, call, phases[call], mapper.class_)


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
            for call in PHASES:
                called = [receiver for receiver in heard if receiver.phase == call]
                if called:
                    steps.setdefault(name, []).append(_step(signal, call, called, sender))
    for name, found in steps.items():
        yield Group((name,), tuple(found))


def _step(
    signal: Signal, call: Phase, receivers: Iterable[Receiver], sender: Any, through: str = ""
) -> Step:
    entries = tuple(_entry(signal, receiver, sender) for receiver in receivers)
    return Step(signal.name, call, through or None, entries)


def _entry(signal: Signal, receiver: Receiver, sender: Any) -> Entry:
    file, line = place_of(receiver.location)
    return Entry(
        printable(receiver.name),
        file,
        line,
        sender_name(receiver.sender),
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
    return _dotted(sender) if isinstance(sender, type) else describe_sender(sender)


def _dotted(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _module_of(receiver: Receiver) -> str:
    fn = receiver.fn
    return getattr(unwrapped(fn), "__module__", None) or "" if fn is not None else ""


def _is_in(module: ModuleType, name: str) -> bool:
    return f"{name}.".startswith(f"{module.__name__}.")
