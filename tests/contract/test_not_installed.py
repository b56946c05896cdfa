"""A forgotten install is never silent."""

from __future__ import annotations

import warnings

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    configure_mappers,
    mapped_column,
)

import sqla_signals
from sqla_signals import SignalsNotInstalledWarning, post_save, receiver

from .models import Author, Base, Named
from .observing import rows


@pytest.fixture(autouse=True)
def no_warning_is_due(library: Engine) -> None:
    """Flush once: a warning that an earlier test had coming would make these pass by accident."""
    configure_mappers()
    with Session(library) as session:
        session.add(Author())
        session.flush()


def make_model() -> type:
    """A mapped class whose mapper is not configured yet."""

    class OwnBase(DeclarativeBase):
        pass

    class Ticket(OwnBase):
        __tablename__ = "tickets"
        id: Mapped[int] = mapped_column(primary_key=True)

    return Ticket


def test_receivers_connected_when_mappers_are_configured_give_a_warning_with_the_line_to_add():
    """The warning names the receiver and says ``sqla_signals.install()``."""
    ticket = make_model()

    @receiver(post_save, sender=ticket)
    def ticket_saved(sender, **kwargs): ...

    with pytest.warns(SignalsNotInstalledWarning, match=r"sqla_signals\.install\(\)") as caught:
        configure_mappers()
    assert len(caught) == 1
    assert "ticket_saved" in str(caught[0].message)
    assert __file__ in str(caught[0].message)


@pytest.mark.parametrize("sender", [Author, "Author", None, Base, Named], ids=repr)
def test_receivers_connected_after_mappers_were_configured_give_a_warning_at_the_next_flush(
    sender: object, library: Engine
):
    """Whatever the sender was; and the flush does its work."""

    @receiver(post_save, sender=sender)
    def author_saved(sender, **kwargs):
        pytest.fail("was called")

    with Session(library) as session:
        session.add(Author(name="a"))
        with pytest.warns(SignalsNotInstalledWarning, match=r"author_saved.*sqla_signals\.install"):
            session.commit()
    assert rows(library, Author.name) == ["a"]


def test_installing_before_mappers_are_configured_gives_no_warning():
    """The usual order: models, receivers, install, first use."""
    ticket = make_model()

    @receiver(post_save, sender=ticket)
    def ticket_saved(sender, **kwargs): ...

    installation = sqla_signals.install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_mappers()
    installation.remove()


def test_installing_before_the_next_flush_gives_no_warning(library: Engine):
    """The other usual order: receivers, then install, then work."""
    seen = []

    @receiver(post_save, sender=Author)
    def author_saved(sender, instance, **kwargs):
        seen.append(instance)

    installation = sqla_signals.install()
    author = Author(name="a")
    with Session(library) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        session.add(author)
        session.commit()
    installation.remove()
    assert seen == [author]


def test_a_signal_of_ones_own_needs_no_install():
    """Only the signals of models are sent by an installation."""
    paid = sqla_signals.Signal("paid")
    seen = []
    paid.connect(lambda sender, **kwargs: seen.append(sender), weak=False)
    make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_mappers()
        paid.send("an order")
    assert seen == ["an order"]


def test_no_receivers_give_no_warning(library: Engine):
    """An import of the package is not a promise to use it."""
    make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure_mappers()
        with Session(library) as session:
            session.add(Author(name="a"))
            session.commit()
    assert rows(library, Author.name) == ["a"]
