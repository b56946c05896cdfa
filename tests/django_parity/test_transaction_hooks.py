"""The behaviours of Django's ``tests/transaction_hooks``, and of ``captureOnCommitCallbacks``.

As in Django, rows are written along with the callbacks: both must come and go together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sqla_signals import SignalsError, on_commit, on_rollback, post_save, receiver
from sqla_signals.receivers.installations import installations

from ..contract.observing import rows
from .models import Thing


class ForcedError(Exception):
    """What goes wrong."""


class Work:
    """Rows, and the callbacks that tell of them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.notified: list[int] = []

    def do(self, num: int) -> None:
        """Write a row, and tell of it after the commit."""
        self.session.add(Thing(num=num))
        self.session.flush()
        on_commit(self.session, lambda: self.notified.append(num))

    def assert_done(self, *nums: int) -> None:
        """These were told of, in this order, and exactly these rows were committed."""
        assert self.notified == list(nums)
        bind = self.session.get_bind()
        source = bind if isinstance(bind, Engine) else self.session
        assert sorted(rows(source, Thing.num)) == sorted(nums)


@pytest.fixture
def work(session: Session) -> Work:
    """Work in the session."""
    return Work(session)


def fail() -> None:
    raise ForcedError("forced")


# -- TestConnectionOnCommit ------------------------------------------------------------------------


def test_without_a_transaction_a_callback_waits_for_the_next_commit(work: Work):
    """``test_executes_immediately_if_no_transaction`` differs: a session has no autocommit."""
    assert not work.session.in_transaction()
    on_commit(work.session, lambda: work.notified.append(1))
    assert work.notified == []
    work.session.add(Thing(num=1))
    work.session.commit()
    work.assert_done(1)


@pytest.mark.parametrize("callback", [fail, partial(fail)], ids=["function", "partial"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_callback_that_fails_is_logged_and_the_others_are_called(
    begun: bool, callback: Any, work: Work, caplog: pytest.LogCaptureFixture
):
    """``test_robust_if_no_transaction``, ``test_robust_transaction``: here always.

    Also ``test_robust_if_no_transaction_with_callback_as_partial`` and
    ``test_robust_transaction_with_callback_as_partial``, of 6.1.
    """
    if begun:
        work.session.begin()
    on_commit(work.session, callback)
    work.do(1)
    with caplog.at_level(logging.ERROR, "sqla_signals"):
        work.session.commit()
    work.assert_done(1)
    (record,) = caplog.records
    assert "fail" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ForcedError)


def test_a_callback_waits_for_the_commit(work: Work):
    """``test_delays_execution_until_after_transaction_commit``."""
    with work.session.begin():
        work.do(1)
        assert work.notified == []
    work.assert_done(1)


def test_a_rollback_discards_the_callbacks(work: Work):
    """``test_does_not_execute_if_transaction_rolled_back``."""
    with suppress(ForcedError), work.session.begin():
        work.do(1)
        raise ForcedError
    work.assert_done()


def test_a_callback_waits_for_the_outermost_commit(work: Work):
    """``test_executes_only_after_final_transaction_committed``."""
    with work.session.begin():
        with work.session.begin_nested():
            work.do(1)
            assert work.notified == []
        assert work.notified == []
    work.assert_done(1)


def test_a_savepoint_that_is_rolled_back_takes_its_callbacks_along(work: Work):
    """``test_discards_hooks_from_rolled_back_savepoint``."""
    with work.session.begin():
        with work.session.begin_nested():
            work.do(1)
        with suppress(ForcedError), work.session.begin_nested():
            work.do(2)
            raise ForcedError
        with work.session.begin_nested():
            work.do(3)
    work.assert_done(1, 3)


def test_a_failed_transaction_discards_those_of_its_savepoints(work: Work):
    """``test_no_hooks_run_from_failed_transaction``."""
    with suppress(ForcedError), work.session.begin():
        with work.session.begin_nested():
            work.do(1)
        raise ForcedError
    work.assert_done()


def test_a_savepoint_inside_another_is_rolled_back_with_it(work: Work):
    """``test_inner_savepoint_rolled_back_with_outer``."""
    with work.session.begin():
        with suppress(ForcedError), work.session.begin_nested():
            with work.session.begin_nested():
                work.do(1)
            raise ForcedError
        work.do(2)
    work.assert_done(2)


def test_a_flush_that_fails_without_a_savepoint_leaves_nothing(work: Work):
    """``test_no_savepoints_atomic_merged_with_outer``: what fails inside, fails the whole.

    SQLAlchemy has no ``atomic(savepoint=False)``; without a savepoint it is a failed flush that
    ends the transaction, whoever catches the exception.
    """
    with suppress(SignalsError, Exception), work.session.begin():
        work.do(1)
        with suppress(IntegrityError):
            work.session.add(Thing(id=1, num=None))
            work.session.flush()
    work.assert_done()


def test_an_exception_that_is_caught_without_a_savepoint_changes_nothing(work: Work):
    """``test_no_savepoints_atomic_merged_with_outer`` differs: only the database decides."""
    with work.session.begin():
        work.do(1)
        with suppress(ForcedError):
            raise ForcedError
    work.assert_done(1)


def test_a_savepoint_that_is_rolled_back_leaves_the_callbacks_around_it(work: Work):
    """``test_inner_savepoint_does_not_affect_outer``."""
    with work.session.begin():
        with work.session.begin_nested():
            work.do(1)
            with suppress(ForcedError), work.session.begin_nested():
                raise ForcedError
    work.assert_done(1)


def test_callbacks_are_called_in_the_order_of_registration(work: Work):
    """``test_runs_hooks_in_order_registered``."""
    with work.session.begin():
        work.do(1)
        with work.session.begin_nested():
            work.do(2)
        work.do(3)
    work.assert_done(1, 2, 3)


def test_a_commit_clears_the_callbacks(work: Work):
    """``test_hooks_cleared_after_successful_commit``."""
    with work.session.begin():
        work.do(1)
    with work.session.begin():
        work.do(2)
    work.assert_done(1, 2)


def test_a_rollback_clears_the_callbacks(work: Work):
    """``test_hooks_cleared_after_rollback``."""
    with suppress(ForcedError), work.session.begin():
        work.do(1)
        raise ForcedError
    with work.session.begin():
        work.do(2)
    work.assert_done(2)


@pytest.mark.parametrize("end", [Session.close, Session.invalidate], ids=lambda end: end.__name__)
def test_closing_clears_the_callbacks(end: Callable[[Session], None], work: Work):
    """``test_hooks_cleared_on_reconnect``."""
    work.do(1)
    end(work.session)
    with work.session.begin():
        work.do(2)
    work.assert_done(2)


def test_a_callback_that_fails_is_not_called_again(work: Work, caplog: pytest.LogCaptureFixture):
    """``test_error_in_hook_doesnt_prevent_clearing_hooks``; and the commit does not raise."""
    on_commit(work.session, fail)
    work.session.commit()
    work.do(1)
    work.session.commit()
    work.assert_done(1)
    assert len(caplog.records) == 1


def test_a_callback_may_query(work: Work):
    """``test_db_query_in_hook``, with a session of its own."""

    def query() -> None:
        with Session(work.session.get_bind()) as session:
            work.notified.extend(thing.num for thing in session.query(Thing))

    with work.session.begin():
        work.session.add(Thing(num=1))
        on_commit(work.session, query)
    work.assert_done(1)


def test_a_callback_may_have_a_transaction(work: Work):
    """``test_transaction_in_hook``."""

    def write() -> None:
        with Session(work.session.get_bind()) as session, session.begin():
            session.add(Thing(num=1))
        work.notified.append(1)

    with work.session.begin():
        on_commit(work.session, write)
    work.assert_done(1)


def test_what_a_callback_registers_comes_behind_what_was_registered(work: Work):
    """``test_hook_in_hook`` differs: queued, not nested; Django's order is 1, 11, 2, 12."""

    def write(num: int, again: bool) -> None:
        with Session(work.session.get_bind()) as session, session.begin():
            if again:
                on_commit(session, lambda: write(num + 10, False))
            session.add(Thing(num=num))
            work.notified.append(num)

    with work.session.begin():
        on_commit(work.session, lambda: write(1, True))
        on_commit(work.session, lambda: write(2, True))
    work.assert_done(1, 2, 11, 12)


def test_a_session_that_nobody_listens_to_is_refused(work: Work):
    """``test_raises_exception_non_autocommit_mode``: what would never be called, is an error."""
    for installation in list(installations):
        installation.remove()
    with pytest.raises(SignalsError, match=r"install\(\)"):
        on_commit(work.session, fail)


@pytest.mark.parametrize("register", [on_commit, on_rollback])
def test_what_is_not_callable_is_refused(register: Callable[..., None], session: Session):
    """``test_raises_exception_non_callable``."""
    with pytest.raises(SignalsError, match="take a function, not None"):
        register(session, None)


# -- captureOnCommitCallbacks ----------------------------------------------------------------------


@pytest.fixture
def test_case(database: Engine, installed):
    """What a ``TestCase`` does: everything in one transaction that is rolled back at the end.

    A session that joins it commits its part, and has its callbacks called: nothing is there to
    capture. (Of Django's ``tests/test_utils``: ``test_execute``, ``test_execute_recursive``,
    ``test_pre_callback``, ``test_with_rolled_back_savepoint``.)
    """
    with database.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield Work(session)
        transaction.rollback()
    assert rows(database, Thing.num) == []


def test_callbacks_are_called_inside_a_test_that_is_rolled_back(test_case: Work):
    """``test_execute``, ``test_no_arguments``: and not before their commit."""
    test_case.do(1)
    assert test_case.notified == []
    test_case.session.commit()
    test_case.assert_done(1)


def test_each_commit_inside_a_test_calls_its_own_callbacks(test_case: Work):
    """``test_pre_callback``: not those that were there before."""
    test_case.do(1)
    test_case.session.commit()
    test_case.notified.clear()
    test_case.do(2)
    test_case.session.commit()
    assert test_case.notified == [2]


def test_a_commit_calls_the_callbacks_of_its_own_session(test_case: Work, session: Session):
    """``test_using``, ``test_different_using``."""
    heard = []
    on_commit(session, lambda: heard.append("other"))
    test_case.session.commit()
    assert heard == []
    session.commit()
    assert heard == ["other"]


def test_a_savepoint_inside_a_test_discards_its_callbacks(test_case: Work):
    """``test_with_rolled_back_savepoint``."""
    with suppress(ForcedError), test_case.session.begin_nested():
        test_case.do(1)
        raise ForcedError
    test_case.session.commit()
    test_case.assert_done()


def test_what_callbacks_cause_inside_a_test_is_called_as_well(test_case: Work):
    """``test_execute_recursive``, ``test_execute_tree``."""
    heard: list[Any] = []

    def branch(name: str, depth: int) -> None:
        heard.append(name)
        if depth:
            with test_case.session.begin():
                test_case.session.add(Thing(num=depth))
                for side in "lr":
                    on_commit(
                        test_case.session,
                        lambda side=side: branch(name + side, depth - 1),
                    )

    on_commit(test_case.session, lambda: branch("", 2))
    test_case.session.commit()
    assert heard == ["", "l", "r", "ll", "lr", "rl", "rr"]


def test_a_failing_callback_inside_a_test_does_not_fail_the_commit(
    test_case: Work, caplog: pytest.LogCaptureFixture
):
    """``test_execute_robust``."""
    on_commit(test_case.session, fail)
    test_case.do(1)
    test_case.session.commit()
    test_case.assert_done(1)
    assert len(caplog.records) == 1


def test_commit_receivers_are_called_inside_a_test(test_case: Work):
    """What Django's would have to be registered as, is called as well."""
    heard = []

    @receiver(post_save, sender=Thing, on="commit")
    def saved(sender, instance, **kwargs):
        heard.append(instance.num)

    test_case.do(1)
    test_case.session.commit()
    assert heard == [1]
    test_case.assert_done(1)
