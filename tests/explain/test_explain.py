"""``explain`` says what happens; a flush shows that it does."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import sqla_signals
from sqla_signals import (
    ReceiverOptionError,
    Signal,
    explain,
    m2m_changed,
    mute,
    post_delete,
    post_migrate,
    post_save,
    pre_save,
    receiver,
    receiver_failed,
)

from . import clinic
from .clinic import Doctor, Forgotten, Named, Patient, Person

FORMATS = ["json", "mermaid", "dot"]

pytestmark = pytest.mark.filterwarnings("ignore::sqla_signals.SignalsNotInstalledWarning")


def names(explanation: Any) -> dict[str, list[str]]:
    """The receivers of the only group, by signal and phase."""
    (group,) = explanation.groups
    return {step.title: [entry.receiver for entry in step.receivers] for step in group.steps}


def names_of_models(explanation: Any) -> dict[str, list[str]]:
    """The same of the first group, the only one of models."""
    return names(replace(explanation, groups=explanation.groups[:1]))


def notices(target: Any = None) -> list[str]:
    return [notice.text for notice in explain(target).notices]


def never() -> list[str]:
    return [notice.receiver for notice in explain().notices]


def connect(*signals: Signal, name: str, fn: Any = None, **options: Any) -> Any:
    def hear(sender, **kwargs):
        pass

    return receiver(list(signals), name=name, **options)(fn or hear)


def test_receivers_are_listed_in_the_order_in_which_a_transaction_calls_them(installed):
    """Per signal and phase, whatever they were connected to."""
    called = []

    def note(name: str) -> Any:
        return lambda sender, **kwargs: called.append(name)

    connect(post_save, name="third", fn=note("third"), sender=Patient, on="commit")
    connect(post_save, name="first", fn=note("first"), sender=Named)
    connect(pre_save, name="zeroth", fn=note("zeroth"), sender="Patient")
    connect(post_save, name="second", fn=note("second"))
    connect(post_save, name="fourth", fn=note("fourth"), sender=[Patient, Doctor], on="commit")

    expected = {
        'pre_save on="flush"': ["zeroth"],
        'post_save on="flush"': ["first", "second"],
        'post_save on="commit"': ["third", "fourth"],
    }
    assert names(explain(Patient)) == expected
    engine = create_engine("sqlite://")
    clinic.Patient.__table__.create(engine)
    with Session(engine) as session:
        session.add(Patient(name="Ada", weight=80))
        session.commit()
    engine.dispose()
    assert called == [name for step in expected.values() for name in step]


def test_an_entry_says_where_a_receiver_is_and_how_it_was_connected(installed):
    """File and line, and each option that is not the default."""

    async def hear(sender, **kwargs):
        pass

    post_save.connect(
        hear, Person, propagate=True, fields={"name"}, name="x", dispatch_uid="u", on="rollback"
    )
    (group,) = explain(Doctor).groups
    ((entry,),) = [step.receivers for step in group.steps]
    assert entry.file == "tests/explain/test_explain.py"
    assert entry.line == hear.__code__.co_firstlineno
    assert entry.options == ["fields={'name'}", "dispatch_uid='u'", "propagate", "async", "weak"]
    assert entry.sender.endswith("clinic.Person")
    assert not entry.durable


def test_a_durable_receiver_is_in_a_phase_of_its_own(installed):
    """A worker calls it."""
    from ..durable.models import Order

    connect(post_save, name="durable.one", sender=Order, durable=True)
    explanation = explain(Order)
    assert names(explanation) == {"post_save durable=True": ["durable.one"]}
    assert explanation.groups[0].steps[0].receivers[0].durable


def test_m2m_changed_is_shown_for_both_classes_and_names_the_table(installed):
    """Whichever relationship it was connected to."""
    connect(m2m_changed, name="hear", sender=Patient.doctors)
    expected = {'m2m_changed on="flush" through treats': ["hear"]}
    assert names(explain(Patient)) == names(explain(Doctor)) == expected
    assert notices() == []


def test_a_class_that_nobody_listens_to_says_so(installed):
    """Rather than nothing at all."""
    assert str(explain(Patient)).splitlines()[1].endswith("Patient  nobody listens")


def test_everything_shows_each_model_that_is_listened_to_once(installed):
    """Those with the same receivers share a group."""
    connect(post_save, name="hear", sender=Named)
    group, *_ = explain().groups
    senders = [sender.rpartition(".")[2] for sender in group.senders]
    assert senders == ["Doctor", "Patient", "Person"]


def test_an_unmapped_base_stands_for_its_models(installed):
    """As it does as a sender."""
    assert len(explain(Named).groups[0].senders) == 3
    with pytest.raises(ReceiverOptionError, match="Forgotten"):
        explain(Forgotten)


def test_a_module_shows_its_models_and_what_its_receivers_listen_to(installed):
    """Not the rest."""
    hear = connect(post_save, name="hear", sender=Patient)
    assert explain(clinic).groups == explain(Patient).groups
    assert explain(sys.modules[hear.__module__]).groups == explain(Patient).groups
    assert explain(ModuleType("elsewhere")).groups == ()


def test_a_signal_shows_its_senders_only(installed):
    """Also a signal of one's own, whose senders are any objects."""
    connect(post_save, post_delete, name="hear", sender=Patient)
    assert names(explain(post_delete)) == {'post_delete on="flush"': ["hear"]}
    paid = Signal("paid")
    connect(paid, name="to anybody")
    connect(paid, name="to one", sender="till 1")
    assert [(group.senders, len(group.steps[0].receivers)) for group in explain(paid).groups] == [
        (("any sender",), 1),
        (("'till 1'",), 2),
    ]
    connect(receiver_failed, name="alarm", sender=Patient)
    assert names(explain(receiver_failed)) == {'receiver_failed on="flush"': ["alarm"]}
    paid._clear_state()


def test_signals_that_models_do_not_send_are_shown_below_these(installed):
    """Those of Alembic, and of one's own; a module shows them where it listens to them."""
    paid = Signal("paid")
    connect(paid, post_migrate, name="hear")
    connect(post_save, name="model", sender=Patient)
    for target in (None, sys.modules[__name__]):
        # Signals of other tests may be there as well, until they are collected.
        shown = {group.senders: group for group in explain(target).groups}["any sender",]
        steps = [(step.signal, [r.receiver for r in step.receivers]) for step in shown.steps]
        assert ("paid", ["hear"]) in steps
        assert ("post_migrate", ["hear"]) in steps
        assert names_of_models(explain(target)) == {'post_save on="flush"': ["model"]}
    assert len(explain(Patient).groups) == len(explain(clinic).groups) == 1
    paid._clear_state()


def test_what_cannot_be_explained_is_refused():
    """With what can be."""
    with pytest.raises(ReceiverOptionError, match="give a mapped class"):
        explain(42)


# -- what can never fire ---------------------------------------------------------------------------


def test_a_forgotten_install_is_the_first_thing_to_be_said():
    """And nothing is said of single receivers, which are right."""
    connect(post_save, name="hear", sender=Patient)
    explanation = explain(Patient)
    assert explanation.installed == ()
    assert "sqla_signals.install()" in str(explanation)
    sqla_signals.install()
    assert explain(Patient).installed == ("every Session",)


def test_what_needs_no_install_does_not_miss_it():
    """A signal of one's own is sent by whoever sends it, and Alembic's by ``env.py``."""
    paid = Signal("paid")
    connect(paid, post_migrate, name="hear")
    for signal in (paid, post_migrate):
        explanation = explain(signal)
        for shown in (str(explanation), *(getattr(explanation, f"to_{f}")() for f in FORMATS)):
            assert "hear" in shown
            assert "not installed" not in shown
    assert "not installed" in str(explain(post_save))
    assert "not installed" in str(explain(clinic))
    paid._clear_state()


class MySession(Session):
    """A class of one's own."""


def test_it_says_for_which_sessions_something_is_installed():
    """As they were given, not what SQLAlchemy makes of them."""
    sqla_signals.install(sessionmaker())
    sqla_signals.install(scoped_session(sessionmaker()))
    sqla_signals.install(MySession)
    with MySession() as session:
        sqla_signals.install(session)
        assert explain(Patient).installed == (
            "a MySession",
            "a scoped_session",
            "a sessionmaker",
            f"{__name__}.MySession",
        )
    sqla_signals.install(Session)
    assert "every Session" in explain(Patient).installed


def test_a_misspelt_sender_is_found_with_what_was_meant(installed):
    """Also where the class is asked for that it should have been."""
    connect(post_save, name="hear", sender="Patiend")
    for target in (None, Patient, clinic, post_save):
        assert notices(target) == ["no mapped class is called 'Patiend'. Did you mean 'Patient'?"]
    assert notices(Doctor) == []
    assert never() == ["hear"]


def test_a_sender_that_no_model_inherits_is_found(installed):
    """Its models may not have been imported."""
    connect(post_save, name="hear", sender=Forgotten)
    assert never() == ["hear"]
    assert "no model inherits it" in notices()[0]


def test_an_abstract_parent_without_propagate_is_found(installed):
    """Every instance is of a subclass."""
    connect(post_save, name="mistaken", sender=Person)
    connect(post_save, name="right", sender=Person, propagate=True)
    assert never() == ["mistaken"]
    assert "propagate=True" in notices()[0]


def test_fields_that_no_class_has_are_found(installed):
    """Without a class by name nothing is an error, because others are passed over."""
    connect(post_save, name="mistaken", fields={"wieght"})
    connect(post_save, name="right", fields={"wieght", "weight"})
    assert never() == ["mistaken"]
    assert notices()[0].endswith("has a column attribute 'wieght'. Mend fields=")


def test_an_association_table_of_no_relationship_is_found(installed):
    """Nothing writes to it but statements, which send nothing."""
    connect(m2m_changed, name="mistaken", sender=clinic.unused)
    connect(m2m_changed, name="right", sender=clinic.treats)
    assert never() == ["mistaken"]


def test_a_muted_receiver_is_marked_and_found(installed):
    """In the block, and only there."""
    connect(post_save, name="hear", sender=Patient)
    with mute(sender=Patient):
        assert explain(Patient).groups[0].steps[0].receivers[0].muted
        assert never() == ["hear"]
    assert not explain(Patient).groups[0].steps[0].receivers[0].muted
    assert never() == []


def test_an_async_receiver_without_async_sessions_is_found(installed, monkeypatch):
    """A durable one may be awaited elsewhere."""

    async def hear(sender, **kwargs):
        pass

    connect(post_save, name="hear", sender=Patient, fn=hear)
    importlib.import_module("sqlalchemy.ext.asyncio")
    assert never() == []
    monkeypatch.delitem(sys.modules, "sqlalchemy.ext.asyncio")
    assert never() == ["hear"]


def test_explaining_changes_nothing(installed):
    """It is asked in production as well."""
    connect(post_save, name="hear", sender=Patient)
    # Not the table itself: a receiver that another test has left may be collected at any moment.
    in_order, receivers = post_save.table.receivers, dict(post_save.receivers)
    explain()
    assert post_save.table.receivers == in_order
    assert dict(post_save.receivers) == receivers


# -- formats ---------------------------------------------------------------------------------------


def test_the_text_is_a_tree(installed):
    """One line for each receiver."""
    hear = connect(post_save, name="hear", sender=Named, fields={"name"})
    line = hear.__code__.co_firstlineno
    model = f"{Patient.__module__}.Patient"
    assert str(explain(Patient)) == (
        f"{model}  installed for every Session\n"
        f'└── post_save on="flush"\n'
        f"    └── 1. hear  tests/explain/test_explain.py:{line}  "
        f"sender={Named.__module__}.Named, fields={{'name'}}"
    )


def test_rich_shows_the_same_tree(installed):
    """Nothing of the text is taken for markup."""
    from rich.console import Console

    connect(post_save, name="[red]hear", sender=Named)
    connect(post_save, name="lost", sender="Patiend")
    explanation = explain(Patient)
    console = Console(width=300)
    with console.capture() as capture:
        console.print(explanation)
    shown = [line.rstrip() for line in capture.get().splitlines()]
    assert shown == str(explanation).splitlines()


def test_json_has_everything(installed):
    """And is plain JSON."""
    connect(post_save, name="hear", sender=Patient, fields={"name"}, on="commit")
    (group,) = json.loads(explain(Patient).to_json())["groups"]
    assert group["steps"][0]["phase"] == "commit"
    assert group["steps"][0]["receivers"][0]["fields"] == ["name"]


@pytest.fixture
def awkward(installed) -> Any:
    """Names with everything that a format could take for its own."""
    connect(post_save, name='a"<b>&#;c\\d', sender=Patient, dispatch_uid="</svg>%{x}|]")
    connect(post_save, name="\x00\x1b[31m\ud800", sender=Patient)
    connect(post_save, name="second", sender=Patient, on="commit")
    connect(post_save, name="lost", sender="Patiend")
    return explain()


def test_mermaid_is_a_flowchart_of_quoted_labels(awkward):
    """In which nothing ends a label but its own quote."""
    first, *lines = awkward.to_mermaid().splitlines()
    assert first == "flowchart LR"
    for line in lines:
        assert line.count('"') in (0, 2)
    assert any('g0s0 --> g0s0r1["1. a#quot;#lt;b#gt;#amp;#35;;c\\d<br>' in line for line in lines)


def test_dot_is_a_digraph_of_quoted_labels(awkward):
    """With quotes and backslashes escaped."""
    dot = awkward.to_dot()
    assert dot.startswith("digraph signals {")
    assert 'label="1. a\\"<b>&#;c\\\\d\\n' in dot
    assert "g0 -> g0s0;" in dot
