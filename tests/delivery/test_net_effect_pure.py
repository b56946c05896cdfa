"""What a transaction did to each row in the end. No database here."""

from __future__ import annotations

from typing import Any

import pytest

from sqla_signals import UNSET, Change
from sqla_signals.changes.effects import CREATED, DELETED, UPDATED, Effect, Frame, Kind, Source


def effect(kind: Kind, row: Any, name: str = "", /, *, was: Any = None, **changes: Any) -> Effect:
    """An effect on an instance that is nothing but a name."""
    return Effect(
        kind,
        row,
        name or f"{kind.value} {row}",
        was=was,
        changes={key: Change(*change) for key, change in changes.items()},
    )


def created(row: Any, name: str = "", /, **values: Any) -> Effect:
    return effect(CREATED, row, name, **{key: (UNSET, value) for key, value in values.items()})


def updated(row: Any, name: str = "", /, *, was: Any = None, **changes: Any) -> Effect:
    return effect(UPDATED, row, name, was=row if was is None else was, **changes)


def deleted(row: Any, name: str = "", /) -> Effect:
    return effect(DELETED, row, name, was=row)


def frame(*flushes: Effect | list[Effect]) -> Frame:
    """A frame to which each flush was added; a lone effect is a flush of its own."""
    frame = Frame()
    for flush in flushes:
        frame.add(flush if isinstance(flush, list) else [flush])
    return frame


def net(frame: Frame) -> list[tuple[Kind, Any, dict[str, Change]]]:
    return [(effect.kind, effect.row, dict(effect.changes)) for effect in frame.effects]


def merged(parent: Frame, child: Frame) -> Frame:
    parent.merge(child)
    return parent


# -- one row ---------------------------------------------------------------------------------------


def test_a_single_effect_is_the_net_effect():
    """Nothing is lost or added where a row was written once."""
    for one in (created(1, name="a"), updated(1, name=("a", "b")), deleted(1)):
        assert net(frame(one)) == [(one.kind, 1, dict(one.changes))]


def test_created_then_updated_is_created():
    """With the last values, and nothing as the old ones."""
    done = frame(created(1, name="a", age=1), updated(1, name=("a", "b")))
    assert net(done) == [(CREATED, 1, {"name": Change(UNSET, "b"), "age": Change(UNSET, 1)})]


def test_created_then_updated_back_is_created_with_that_value():
    """Of a created row every column is a change, also one that was changed and changed back."""
    done = frame(created(1, name="a"), updated(1, name=("a", "b")), updated(1, name=("b", "a")))
    assert net(done) == [(CREATED, 1, {"name": Change(UNSET, "a")})]


def test_created_then_deleted_is_nothing():
    """Nobody outside has ever seen the row."""
    done = frame(created(1, name="a"), deleted(1))
    assert net(done) == []
    assert not done


def test_created_then_updated_then_deleted_is_nothing():
    """However long it lived."""
    assert net(frame(created(1, name="a"), updated(1, name=("a", "b")), deleted(1))) == []


def test_updated_then_deleted_is_a_delete():
    """The changes are gone with the row."""
    assert net(frame(updated(1, name=("a", "b")), deleted(1))) == [(DELETED, 1, {})]


def test_changes_run_from_the_first_old_to_the_last_new_value():
    """Whatever was in between, across any number of flushes."""
    done = frame(*[updated(1, name=(str(n), str(n + 1))) for n in range(5)])
    assert net(done) == [(UPDATED, 1, {"name": Change("0", "5")})]


def test_changes_of_different_attributes_are_put_together():
    """In the order in which they were first written."""
    done = frame(updated(1, name=("a", "b")), updated(1, age=(1, 2)), updated(1, name=("b", "c")))
    (only,) = net(done)
    assert list(only[2].items()) == [("name", Change("a", "c")), ("age", Change(1, 2))]


def test_reverted_to_the_old_value_is_not_a_change():
    """It is left out, and what else was changed is there."""
    done = frame(updated(1, name=("a", "b"), age=(1, 2)), updated(1, name=("b", "a")))
    assert net(done) == [(UPDATED, 1, {"age": Change(1, 2)})]


def test_an_update_that_is_reverted_as_a_whole_is_nothing():
    """The row is what it was."""
    done = frame(updated(1, name=("a", "b")), updated(1, name=("b", "a")))
    assert net(done) == []
    assert not done


def test_an_update_after_a_reverted_one_begins_anew():
    """Its old value is what the row had, its place is that of the second update."""
    done = frame(
        updated(1, name=("a", "b")),
        updated(2, name=("x", "y")),
        updated(1, name=("b", "a")),
        updated(1, name=("a", "c")),
    )
    assert net(done) == [
        (UPDATED, 2, {"name": Change("x", "y")}),
        (UPDATED, 1, {"name": Change("a", "c")}),
    ]


def test_a_change_from_or_to_an_unknown_value_is_never_taken_for_reverted():
    """``UNSET`` stands for any value: two of them are not known to be the same."""
    unknown_old = frame(updated(1, name=(UNSET, "b")), updated(1, name=("b", "a")))
    unknown_new = frame(updated(1, name=("a", UNSET)))
    both = frame(updated(1, name=(UNSET, "b")), updated(1, name=("b", UNSET)))
    assert net(unknown_old) == [(UPDATED, 1, {"name": Change(UNSET, "a")})]
    assert net(unknown_new) == [(UPDATED, 1, {"name": Change("a", UNSET)})]
    assert net(both) == [(UPDATED, 1, {"name": Change(UNSET, UNSET)})]


def test_whether_two_values_are_the_same_is_for_the_column_type_to_say():
    """Its comparison is used for "reverted", not Python's."""
    first, second = updated(1, name=("A", "b")), updated(1, name=("b", "a"))
    blind = Source(equal=lambda key, old, new: old.lower() == new.lower())
    first.source = second.source = blind
    assert net(frame(first, second)) == []


def test_a_reverted_update_that_wrote_a_version_along_is_still_an_update():
    """The row differs from what it was, by its version."""
    first, second = updated(1, name=("a", "b")), updated(1, name=("b", "a"))
    first.along = second.along = frozenset({"version"})
    done = frame(first, second)
    assert net(done) == [(UPDATED, 1, {})]
    assert [one.along for one in done.effects] == [frozenset({"version"})]


def test_a_key_deleted_and_added_again_is_a_delete_and_a_created_save():
    """They are two rows that have the key one after the other."""
    expected = [(DELETED, 1, {}), (CREATED, 1, {"name": Change(UNSET, "b")})]
    assert net(frame(deleted(1), created(1, name="b"))) == expected
    assert net(frame([deleted(1), created(1, name="b")])) == expected


def test_a_key_deleted_added_and_deleted_again_is_a_delete():
    """The second row has never been; the first one is gone."""
    assert net(frame(deleted(1), created(1, name="b"), deleted(1))) == [(DELETED, 1, {})]
    assert net(frame([deleted(1), created(1, name="b")], deleted(1))) == [(DELETED, 1, {})]


def test_a_key_deleted_and_added_any_number_of_times_is_one_delete_and_one_created_save():
    """Only the first row and the last one count."""
    done = frame(
        updated(1, name=("a", "b")),
        deleted(1),
        created(1, name="c"),
        [deleted(1), created(1, name="d")],
        updated(1, name=("d", "e")),
    )
    assert net(done) == [(DELETED, 1, {}), (CREATED, 1, {"name": Change(UNSET, "e")})]


def test_a_key_created_deleted_and_added_again_is_one_created_save():
    """The first row was nothing."""
    expected = [(CREATED, 1, {"name": Change(UNSET, "b")})]
    assert net(frame(created(1, name="a"), deleted(1), created(1, name="b"))) == expected
    assert net(frame(created(1, name="a"), [deleted(1), created(1, name="b")])) == expected


def test_the_last_instance_stands_for_the_row():
    """It is the one with the values that were committed."""
    done = frame(created(1, "first"), updated(1, "second", name=("a", "b")))
    assert [one.instance for one in done.effects] == ["second"]


# -- keys ------------------------------------------------------------------------------------------


def test_a_row_is_followed_through_changes_of_its_key():
    """It is one row, under its last key and known by its first."""
    done = frame(
        updated(2, was=1, id=(1, 2)), updated(2, name=("a", "b")), updated(3, was=2, id=(2, 3))
    )
    assert net(done) == [(UPDATED, 3, {"id": Change(1, 3), "name": Change("a", "b")})]
    assert [one.was for one in done.effects] == [1]


def test_a_row_whose_key_was_changed_and_deleted_is_a_delete_of_its_first_key():
    """That is the key by which others know it."""
    done = frame(updated(2, was=1, id=(1, 2)), deleted(2))
    assert [(one.kind, one.was) for one in done.effects] == [(DELETED, 1)]


def test_a_created_row_whose_key_was_changed_is_created_under_its_last_key():
    """Nobody has seen the first one."""
    done = frame(created(1, id=1), updated(2, was=1, id=(1, 2)))
    assert net(done) == [(CREATED, 2, {"id": Change(UNSET, 2)})]


def test_two_rows_that_swap_their_keys_in_one_flush_stay_apart():
    """Each is followed to the other's key."""
    done = frame(
        [updated(2, "a", was=1, id=(1, 2)), updated(1, "b", was=2, id=(2, 1))],
        [updated(2, "a", name=("a", "A"))],
    )
    assert net(done) == [
        (UPDATED, 2, {"id": Change(1, 2), "name": Change("a", "A")}),
        (UPDATED, 1, {"id": Change(2, 1)}),
    ]


def test_a_row_that_takes_the_key_of_a_deleted_one_is_not_that_one():
    """Whether the key became free before or in the same flush."""
    later = updated(2, name=("a", "b"))
    expected = [
        (DELETED, 2, {}),
        (UPDATED, 2, {"id": Change(1, 2), "name": Change("a", "b")}),
    ]
    assert net(frame(deleted(2), updated(2, was=1, id=(1, 2)), later)) == expected
    together = frame([updated(2, was=1, id=(1, 2)), deleted(2)], later)
    assert sorted(net(together), key=repr) == sorted(expected, key=repr)


def test_a_new_row_under_the_old_key_of_another_is_a_new_row():
    """The other one has moved away."""
    done = frame(
        updated(2, was=1, id=(1, 2)), created(1, name="n"), updated(2, name=("a", "b")), deleted(1)
    )
    assert net(done) == [(UPDATED, 2, {"id": Change(1, 2), "name": Change("a", "b")})]


# -- order and savepoints --------------------------------------------------------------------------


def test_the_order_is_that_of_first_occurrence():
    """A later change of a row does not move it."""
    done = frame([created(1), created(2)], updated(3, n=(1, 2)), updated(1, n=(1, 2)), deleted(2))
    assert [one.row for one in done.effects] == [1, 3]


def test_a_frame_with_nothing_in_it_is_false():
    """With an effect or a callback it is true."""
    assert not Frame()
    assert frame(deleted(1))
    for name in ("on_commit", "on_rollback"):
        with_callback = Frame()
        getattr(with_callback, name).append(print)
        assert with_callback


def test_a_released_savepoint_continues_what_its_parent_has_begun():
    """As if there had been no savepoint."""
    flushes = [
        [created(1, name="a"), updated(2, name=("x", "y")), updated(3, name=("p", "q"))],
        [
            updated(1, name=("a", "b")),
            updated(2, name=("y", "x")),
            deleted(3),
            created(3, name="r"),
        ],
        [updated(1, name=("b", "c")), created(4, name="n")],
    ]
    for split in (1, 2, 3):
        parent, child = frame(*flushes[:split]), frame(*flushes[split:])
        assert net(merged(parent, child)) == net(frame(*flushes))


def test_a_released_savepoint_that_swapped_keys_stays_apart_from_its_parent_rows():
    """Each row of the parent is followed to its new key."""
    parent = frame(updated(1, "a", name=("a", "A")), updated(2, "b", name=("b", "B")))
    child = frame([updated(2, "a", was=1, id=(1, 2)), updated(1, "b", was=2, id=(2, 1))])
    assert net(merged(parent, child)) == [
        (UPDATED, 2, {"name": Change("a", "A"), "id": Change(1, 2)}),
        (UPDATED, 1, {"name": Change("b", "B"), "id": Change(2, 1)}),
    ]


def test_a_key_that_passed_from_a_deleted_row_to_another_in_a_savepoint_is_the_others():
    """Also where the other one was written first: what is known last of the key is who has it."""
    child = frame(updated(1, name=("a", "b")), deleted(2), updated(2, was=1, id=(1, 2)))
    done = merged(Frame(), child)
    done.add([updated(2, name=("b", "c"))])
    assert net(done) == [
        (UPDATED, 2, {"name": Change("a", "c"), "id": Change(1, 2)}),
        (DELETED, 2, {}),
    ]


def test_a_key_that_passed_around_in_a_savepoint_is_not_mixed_up():
    """One row moves on before another takes its key; the parent knows both."""
    parent = frame(updated(1, "a", n=(0, 1)), updated(2, "b", n=(0, 2)))
    child = frame(
        updated(1, "a", n=(1, 3)),
        updated(3, "b", was=2, id=(2, 3)),
        updated(2, "a", was=1, id=(1, 2)),
        created(1, "c", n=9),
    )
    done = merged(parent, child)
    done.add([updated(2, "a", n=(3, 4)), updated(3, "b", n=(2, 5)), updated(1, "c", n=(9, 10))])
    assert net(done) == [
        (UPDATED, 2, {"n": Change(0, 4), "id": Change(1, 2)}),
        (UPDATED, 3, {"n": Change(0, 5), "id": Change(2, 3)}),
        (CREATED, 1, {"n": Change(UNSET, 10)}),
    ]


def test_callbacks_of_a_released_savepoint_join_those_of_its_parent_in_order():
    """First in, first out, across savepoints."""
    parent, child = Frame(), Frame()
    parent.on_commit += ["first"]
    child.on_commit += ["second"]
    child.on_rollback += ["undone"]
    parent.merge(child)
    parent.on_commit += ["third"]
    assert parent.on_commit == ["first", "second", "third"]
    assert parent.on_rollback == ["undone"]


def test_what_two_flushes_were_muted_by_is_kept_apart():
    """A receiver that heard of one of them is told of the row."""
    quiet, loud = updated(1, name=("a", "b")), updated(1, name=("b", "c"))
    quiet.source = Source(mutes=(("muted",),))
    (both,) = frame(quiet, loud).effects
    assert both.mutes == (("muted",), ())


@pytest.mark.parametrize("raw", [(True, True), (True, False), (False, True), (False, False)])
def test_a_row_is_raw_if_everything_that_was_written_to_it_was(raw):
    """One ordinary change makes it an ordinary row."""
    first, second = created(1, name="a"), updated(1, name=("a", "b"))
    first.source, second.source = (Source(raw=one) for one in raw)
    (both,) = frame(first, second).effects
    assert both.raw is all(raw)


def test_adding_and_merging_leave_the_effects_of_others_alone():
    """They are values: folding makes new ones."""
    first, second = updated(1, name=("a", "b")), updated(1, name=("b", "c"))
    frame(first, second)
    merged(frame(first), frame(second))
    assert dict(first.changes) == {"name": Change("a", "b")}
    assert dict(second.changes) == {"name": Change("b", "c")}


def test_a_row_changed_before_and_in_a_savepoint_and_deleted_there_held_what_was_first():
    """What was committed, of each attribute that was changed on either side."""
    inner = frame(updated(1, x=(2, 1), y=(5, 6)), deleted(1))
    both = merged(frame(updated(1, name=(None, "a"), y=(4, 5))), inner)
    (only,) = both.effects
    assert only.kind is DELETED
    assert only.before == {"name": None, "x": 2, "y": 4}
