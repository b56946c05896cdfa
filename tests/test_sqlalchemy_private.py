"""Every private name of SQLAlchemy that the package relies on is there, and there alone.

When an upgrade of SQLAlchemy moves one, the test that fails has its name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import JSON, ForeignKey, String, create_engine, event, literal, select, update
from sqlalchemy import inspect as sa_inspect
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.asyncio import session as asyncio_session
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.ext.mutable import MutableBase, MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    LoaderCallableStatus,
    Mapped,
    PassiveFlag,
    Session,
    UOWTransaction,
    composite,
    dependency,
    mapped_column,
    relationship,
    sessionmaker,
    with_loader_criteria,
)
from sqlalchemy.sql import sqltypes

import sqla_signals
from sqla_signals._sqlalchemy import dry_run, events, instances, mappers, statements, types

# ``sqlalchemy.orm.mapper`` is also the name of a function.
mapper_module = importlib.import_module("sqlalchemy.orm.mapper")

PACKAGE = Path(sqla_signals.__file__).parent
WHERE = "sqla_signals/_sqlalchemy/ relies on it; settle the difference there"


class Base(DeclarativeBase):
    """The declarative base."""


class Parent(Base):
    """With a collection, a key that may change, and a post_update."""

    __tablename__ = "parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None]
    favorite_id: Mapped[int | None] = mapped_column(
        ForeignKey("children.id", use_alter=True, name="fk")
    )
    children: Mapped[list[Child]] = relationship(
        primaryjoin="Parent.id == Child.parent_id", back_populates="parent"
    )
    favorite: Mapped[Child | None] = relationship(
        primaryjoin="Parent.favorite_id == Child.id", post_update=True
    )


class Child(Base):
    """With a many-to-one."""

    __tablename__ = "children"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("parents.id"))
    parent: Mapped[Parent | None] = relationship(
        primaryjoin="Parent.id == Child.parent_id", back_populates="children", passive_updates=False
    )


@dataclass
class Place:
    """Two columns as one."""

    x: int | None
    y: int | None


class Spot(Base):
    """With a composite."""

    __tablename__ = "spots"
    id: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[Place] = composite(mapped_column("x"), mapped_column("y"))


class Flushed:
    """What one flush shows of SQLAlchemy's inside."""

    def __init__(self) -> None:
        engine = create_engine("sqlite://")
        Base.metadata.create_all(engine)
        self.contexts: list[UOWTransaction] = []
        with Session(engine) as session:
            event.listen(session, "after_flush", lambda _, context: self.contexts.append(context))
            child = Child()
            parent = Parent(name="a", children=[child], favorite=child)
            session.add(parent)
            session.flush()
            session.add(Parent())
            session.delete(child)
            parent.name = "b"
            self.session = session
            self.state = sa_inspect(parent)
            self.mapper = sa_inspect(Parent)
            self.manager = self.mapper.class_manager
            self.impl = self.manager["name"].impl
            self.pending = list(getattr(session, "_new", {}))
            self.deleted = list(getattr(session, "_deleted", {}))
            self.dirty = set(getattr(session, "_dirty_states", ()))
            session.flush()
        self.context = self.contexts[0]
        self.actions = list(self.context.presort_actions.values())
        engine.dispose()


@pytest.fixture(scope="module")
def flushed() -> Flushed:
    """One flush of everything."""
    return Flushed()


def require(owner: object, what: str, *names: str) -> None:
    """Fail with the full name of the first one that is missing."""
    for name in names:
        assert hasattr(owner, name), (
            f"SQLAlchemy {sqlalchemy.__version__} has no {what}.{name}: {WHERE}."
        )


# The names, by the object that has them. What begins with an underscore, or is not documented.
MAPPER_MODULE = ("_mapper_registries",)
MAPPERS = (
    "_delete_orphans",
    "_dependency_processors",
    "_props",
    "_ready_for_configure",
    "_equivalent_columns",
    "_is_orphan",
    "_identity_key_from_state",
    "get_property_by_column",
)
MANAGERS = ("is_mapped", "mapper", "new_instance", "dispatch", "original_init")
IMPLS = ("is_equal", "active_history", "get")
STATES = (
    "_deleted",
    "_instance_dict",
    "_load_expired",
    "callables",
    "committed_state",
    "dict",
    "expired_attributes",
    "get_history",
    "get_impl",
    "has_identity",
    "key",
    "manager",
    "modified",
    "parents",
    "session_id",
    "_orphaned_outside_of_session",
)
SESSIONS = (
    "_autobegin_t",
    "_autoflush",
    "_is_clean",
    "_new",
    "_deleted",
    "_dirty_states",
    "_contains_state",
    "_query_cls",
    "_register_altered",
    "_transaction",
    "_remove_newly_deleted",
    "_flushing",
    "connection_callable",
    "enable_baked_queries",
    "hash_key",
    "identity_map",
)
CONTEXTS = (
    "attributes",
    "get_attribute_history",
    "is_deleted",
    "mappers",
    "memo",
    "post_update_states",
    "presort_actions",
    "register_object",
    "session",
    "states",
)
ACTIONS = ("_mappers", "dependency_processor", "processed", "setup_flush_actions")
PROCESSORS = (
    "_passive_delete_flag",
    "_passive_update_flag",
    "_pks_changed",
    "cascade",
    "hasparent",
    "key",
    "mapper",
    "parent",
    "passive_deletes",
    "passive_updates",
    "post_update",
    "presort_deletes",
    "presort_saves",
    "prop",
    "prop_has_changes",
)
IDENTITY_MAPS = ("_dict", "_wr")
STATEMENTS = (
    "_annotations",
    "_generate",
    "_multi_values",
    "_post_values_clause",
    "_propagate_attrs",
    "_values",
    "_with_options",
    "is_dml",
    "select",
    "table",
)
RELATIONSHIPS = ("_init_args", "_reverse_property")
KEY_SWITCHES = ("_key_switchers",)
ASYNC_SESSIONS = ("_proxied", "_assign_proxied")
EVENTS = ("_EventKey", "_removed_from_collection", "_stored_in_collection")
ELSEWHERE = (
    "_managers",
    "_begin",
    "_clslevel",
    "_empty_listener_reg",
    "_current_fn",
    "_is_autocommit_isolation",
    "_connections",
    "_new_sessionid",
    "_parents",
    "_sa_class_manager",
    "_data",
    "_pending_mutations",
    "_trans_context_manager",
    "_Session__binds",
    "_ShardedSession__shards",
    "_OneToManyDP",
    "_BulkUDCompileState",
    "_sa_skip_events",
    "_sqla_signals_seen",
    "_expand_composites",
    "_expand_other_attrs",
    "_adjust_for_extra_criteria",
    "_events_todo",
    "_is_criteria_option",
    "_ordered_values",
    "_post_criteria_clause",
    "_prefixes",
    "_returning",
    "_where_criteria",
)


@pytest.mark.parametrize("name", MAPPER_MODULE)
def test_the_mapper_module_has(name: str):
    """Module level."""
    require(mapper_module, "orm.mapper", name)


@pytest.mark.parametrize("name", EVENTS)
def test_the_registry_of_listeners_has(name: str):
    """``event.registry``, and the keys by which ``event.contains`` finds a listener there."""
    require(events.event_registry, "event.registry", name)


def test_listeners_of_a_class_of_sessions_are_in_three_places():
    """Those of the class; of its instances without, and of those with listeners of their own."""

    class OwnSession(Session):
        """A class of sessions."""

    plain, own = OwnSession(), OwnSession()
    event.listen(own, "after_commit", lambda *_: None)
    for session in (plain, own):
        assert not session.dispatch.after_commit.parent_listeners
    listener: Callable[..., Any] = print
    events.listen_to_class(OwnSession, "after_commit", listener)
    assert event.contains(OwnSession, "after_commit", listener), WHERE
    of_classes = OwnSession.dispatch.after_commit._clslevel
    assert list(of_classes[OwnSession]) == [listener], WHERE
    of_instances = OwnSession.dispatch._empty_listener_reg
    assert list(of_instances[OwnSession]["after_commit"].parent_listeners) == [listener], WHERE
    for session in (plain, own, OwnSession()):
        assert list(session.dispatch.after_commit.parent_listeners) == [listener], WHERE
    events.unlisten_to_class(OwnSession, "after_commit", listener)
    assert not event.contains(OwnSession, "after_commit", listener), WHERE
    for session in (plain, own, OwnSession()):
        assert not session.dispatch.after_commit.parent_listeners, WHERE


def test_the_registries_in_use_and_their_managers_are_known_by_weak_references():
    """``_mapper_registries``, and ``_managers`` of each."""
    assert Base.registry in [ref() for ref in mapper_module._mapper_registries.keyrefs()], WHERE
    managers = [ref() for ref in Base.registry._managers.keyrefs()]
    mappers = [manager.__dict__["mapper"] for manager in managers]
    assert {mapper.class_ for mapper in mappers} == {Parent, Child, Spot}, WHERE


@pytest.mark.parametrize("name", MAPPERS)
def test_a_mapper_has(flushed: Flushed, name: str):
    """``Mapper``."""
    require(flushed.mapper, "orm.Mapper", name)


def test_a_mapped_class_has_its_manager_under_sa_class_manager():
    """``_sa_class_manager``, of exactly this class."""
    assert Parent.__dict__.get("_sa_class_manager") is sa_inspect(Parent).class_manager, (
        f"SQLAlchemy {sqlalchemy.__version__} has no _sa_class_manager in a mapped class: {WHERE}."
    )


def test_the_manager_of_a_mapped_class_is_found_by_the_class():
    """``orm.attributes.manager_of_class``."""
    manager = sa_inspect(Parent).class_manager
    assert mappers.manager_of_class(Parent) is manager, WHERE


def test_the_column_attributes_of_a_mapper_are_counted_in_their_data():
    """``ReadOnlyProperties._data``."""
    columns = sa_inspect(Parent).column_attrs
    assert len(columns._data) == len(columns) == 3, WHERE


def test_an_instance_keeps_its_state_among_its_values():
    """Under ``DEFAULT_STATE_ATTR``."""
    parent = Parent(name="x")
    assert parent.__dict__[instances.DEFAULT_STATE_ATTR] is sa_inspect(parent), WHERE


@pytest.mark.parametrize("name", MANAGERS)
def test_a_class_manager_has(flushed: Flushed, name: str):
    """``ClassManager``."""
    require(flushed.manager, "orm.ClassManager", name)


@pytest.mark.parametrize("name", IMPLS)
def test_an_attribute_impl_has(flushed: Flushed, name: str):
    """``AttributeImpl``, what ``manager[key].impl`` is."""
    require(flushed.impl, "orm.attributes.AttributeImpl", name)


@pytest.mark.parametrize("name", STATES)
def test_an_instance_state_has(flushed: Flushed, name: str):
    """``InstanceState``."""
    require(flushed.state, "orm.InstanceState", name)


@pytest.mark.parametrize("name", IDENTITY_MAPS)
def test_an_identity_map_has(name: str):
    """``WeakInstanceDict``: what is persistent, and the reference that its states keep to it."""
    require(Session().identity_map, "orm.identity.WeakInstanceDict", name)


def test_an_unloaded_attribute_is_asked_of_the_loader_under_callables():
    """``InstanceState.callables``: called with the state and what may be done."""
    child = Child()
    state = sa_inspect(child)
    called: list[tuple[Any, ...]] = []

    def loader(*arguments: Any) -> LoaderCallableStatus:
        called.append(arguments)
        state.dict["id"] = 7
        return LoaderCallableStatus.ATTR_WAS_SET

    state.callables = {"id": loader}
    assert child.id == 7
    assert called == [(state, PassiveFlag.PASSIVE_OFF)], (
        f"SQLAlchemy {sqlalchemy.__version__} calls InstanceState.callables otherwise: {WHERE}."
    )


def test_an_unloaded_collection_keeps_its_changes_under_pending_mutations():
    """``InstanceState._pending_mutations`` appears in ``__dict__`` with the first of them."""
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Parent(id=1))
        session.commit()
        parent = session.get(Parent, 1)
        state = sa_inspect(parent)
        assert "_pending_mutations" not in state.__dict__
        Child(parent=parent)
        assert "_pending_mutations" in state.__dict__, (
            f"SQLAlchemy {sqlalchemy.__version__} has no InstanceState._pending_mutations: {WHERE}."
        )
    engine.dispose()


@pytest.mark.parametrize("name", SESSIONS)
def test_a_session_has(flushed: Flushed, name: str):
    """``Session``."""
    require(flushed.session, "orm.Session", name)


def test_what_a_session_is_about_to_flush(flushed: Flushed):
    """Pending, deleted and modified states."""
    assert [state.class_ for state in flushed.pending] == [Parent]
    assert [state.class_ for state in flushed.deleted] == [Child]
    assert flushed.state in flushed.dirty


def test_a_session_is_clean_when_there_is_nothing_to_flush():
    """What ``commit()`` asks before each of its own flushes."""
    with Session() as session:
        assert session._is_clean()
        session.add(Parent())
        assert not session._is_clean()


def test_a_connection_tells_whether_each_statement_is_committed_at_once():
    """Said to the engine when it was made, to a copy of it, or to the connection."""
    engine = create_engine("sqlite://")
    always = create_engine("sqlite://", isolation_level="AUTOCOMMIT")
    for connection, expected in (
        (engine.connect(), False),
        (always.connect(), True),
        (always.connect().execution_options(isolation_level="SERIALIZABLE"), False),
        (engine.execution_options(isolation_level="AUTOCOMMIT").connect(), True),
        (engine.connect().execution_options(isolation_level="AUTOCOMMIT"), True),
    ):
        with connection:
            assert connection._is_autocommit_isolation() is expected
    engine.dispose()
    always.dispose()


def test_a_transaction_tells_whether_it_is_changing_its_state():
    """In ``before_commit``, which fires for a root and for a savepoint alike."""
    engine = create_engine("sqlite://")
    told = []
    with Session(engine) as session:

        @event.listens_for(session, "before_commit")
        def _before_commit(session: Session) -> None:
            told.append(getattr(session.get_transaction(), "_current_fn") is not None)  # noqa: B009

        session.begin_nested().commit()
        session.commit()
        root = session.begin()
        session.begin_nested()
        root.commit()
    engine.dispose()
    assert told == [False, True, True, True], WHERE


def test_a_transaction_tells_its_state_while_its_events_are_sent():
    """``SessionTransaction._state``, which the events of the session do not say."""
    engine = create_engine("sqlite://")
    told = []
    with Session(engine) as session:
        for name in ("after_commit", "after_rollback"):

            @event.listens_for(session, name)
            def listener(session: Session, name: str = name) -> None:
                told.append((name, session._transaction._state.name))

        with session.begin_nested():
            session.connection()
        session.commit()
        session.connection()
        session.begin_nested().rollback()
        session.rollback()
    engine.dispose()
    assert told == [
        ("after_commit", "COMMITTED"),
        ("after_commit", "COMMITTED"),
        ("after_rollback", "DEACTIVE"),
        ("after_rollback", "DEACTIVE"),
    ], WHERE


def test_a_transaction_tells_in_after_begin_whether_it_has_joined_that_of_a_connection():
    """``SessionTransaction._connections``: connection, transaction, should_commit, autoclose."""
    engine = create_engine("sqlite://")
    told = []
    with engine.connect() as connection, connection.begin(), Session(connection) as session:

        @event.listens_for(session, "after_begin")
        def listener(session: Session, transaction: Any, connection: Any) -> None:
            told.append(transaction._connections[connection][2])

        session.connection()
        session.begin_nested()
        session.connection()
    engine.dispose()
    assert told == [False, True], WHERE


def test_the_hash_keys_of_sessions_grow():
    """``orm.session._new_sessionid``, which each session takes one from."""
    session_module = importlib.import_module("sqlalchemy.orm.session")
    before = Session()
    serial = session_module._new_sessionid()
    assert before.hash_key < serial < Session().hash_key, WHERE


def test_a_mutable_value_keeps_its_parents_under_their_name():
    """``MutableBase._parents``, documented, and in the ``__dict__`` of the value."""
    value = MutableDict()
    assert "_parents" in vars(MutableBase)
    value._parents
    assert "_parents" in vars(value)


def test_a_flush_that_fails_rolls_back_a_transaction_of_its_own_and_so_can_we():
    """``Session._autobegin_t()._begin().rollback(_capture_exception=True)``."""
    with Session() as session:
        with pytest.raises(LookupError), session.begin_nested() as savepoint:
            try:
                raise LookupError("no")
            except LookupError:
                session._autobegin_t()._begin().rollback(_capture_exception=True)
                assert not savepoint.is_active, WHERE
                raise
        assert session.is_active, WHERE
        try:
            raise LookupError("no")
        except LookupError:
            session._autobegin_t()._begin().rollback(_capture_exception=True)
        assert not session.is_active, WHERE


def test_a_session_keeps_its_binds_under_a_known_name():
    """``binds`` in 2.1, ``_Session__binds`` in 2.0."""
    engine = create_engine("sqlite://")
    session = Session(binds={Parent: engine})
    assert session.__dict__.get("binds") or session.__dict__.get("_Session__binds"), (
        f"SQLAlchemy {sqlalchemy.__version__} keeps the binds of a session elsewhere: {WHERE}."
    )


def test_a_sharded_session_keeps_its_shards_under_a_known_name():
    engine = create_engine("sqlite://")
    session = ShardedSession(
        shards={"one": engine},
        shard_chooser=lambda *_, **__: "one",
        identity_chooser=lambda *_, **__: ["one"],
        execute_chooser=lambda _: ["one"],
    )
    assert session.__dict__["_ShardedSession__shards"] == {"one": engine}, WHERE


def test_a_session_in_a_begin_block_of_a_sessionmaker_has_a_trans_context_manager():
    """``_trans_context_manager``, which a copy of a session must not share."""
    engine = create_engine("sqlite://")
    with sessionmaker(engine).begin() as session:
        assert "_trans_context_manager" in session.__dict__, (
            f"SQLAlchemy {sqlalchemy.__version__} has no _trans_context_manager: {WHERE}."
        )
    engine.dispose()


def test_the_listeners_of_one_session_can_be_given_to_another():
    """``dispatch._update``."""

    def listener(session): ...

    one, other = Session(), Session()
    event.listen(one, "after_commit", listener)
    require(one.dispatch, "orm.Session.dispatch", "_update")
    other.dispatch._update(one.dispatch, only_propagate=False)
    assert listener in list(other.dispatch.after_commit)


@pytest.mark.parametrize("name", ASYNC_SESSIONS)
def test_an_async_session_has(name: str):
    """``AsyncSession``."""
    require(AsyncSession(), "ext.asyncio.AsyncSession", name)


def test_the_asyncio_extension_finds_the_async_session_of_a_session():
    """``async_session()``."""
    session = AsyncSession()
    require(asyncio_session, "ext.asyncio.session", "async_session")
    assert asyncio_session.async_session(session.sync_session) is session


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_unit_of_work_has(flushed: Flushed, name: str):
    """``UOWTransaction``."""
    require(flushed.context, "orm.UOWTransaction", name)


def test_the_states_of_a_unit_of_work_are_pairs_of_is_delete_and_listonly(flushed: Flushed):
    """``UOWTransaction.states``."""
    assert flushed.context.states[flushed.state] == (False, False)


def test_the_post_update_states_are_pairs_of_states_and_columns(flushed: Flushed):
    """``UOWTransaction.post_update_states``."""
    ((states, columns),) = flushed.context.post_update_states.values()
    assert states == {flushed.state}
    assert columns == {Parent.__table__.c.favorite_id}


@pytest.mark.parametrize("name", ACTIONS)
def test_a_presort_action_has(flushed: Flushed, name: str):
    """``unitofwork.Preprocess``."""
    assert flushed.actions
    for action in flushed.actions:
        require(action, "orm.unitofwork.Preprocess", name)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_dependency_processor_has(flushed: Flushed, name: str):
    """``DependencyProcessor``, of every direction."""
    assert flushed.actions
    for action in flushed.actions:
        require(action.dependency_processor, "orm.dependency.DependencyProcessor", name)


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_about_many_rows_has(name: str):
    """``Insert``, of which ``Update`` has what concerns it."""
    require(postgresql.insert(Parent), "Insert", name)


def test_what_an_update_sets_and_asks_for():
    """``Update``: values in a dictionary, conditions in a tuple."""
    statement = update(Parent).values(name="a").where(Parent.id == 1)
    require(statement, "Update", "_where_criteria", "_values")
    assert [(column.key, value.value) for column, value in statement._values.items()] == [
        ("name", "a")
    ]
    assert statement.table._annotations["parententity"] is sa_inspect(Parent)
    assert "parententity" not in update(Parent.__table__).where(Parent.id == 1).table._annotations


def test_what_stands_before_and_behind_a_statement():
    """``_prefixes``, and from SQLAlchemy 2.1 on ``_post_criteria_clause``."""
    statement = update(Parent).prefix_with("OR REPLACE")
    assert [str(text) for text, _ in statement._prefixes] == ["OR REPLACE"]
    assert statements.is_replacing(statement)
    assert not statements.is_replacing(update(Parent).prefix_with("OR IGNORE"))
    if hasattr(mysql, "limit"):
        assert statements.is_extended(update(Parent).ext(mysql.limit(1)))
    assert not statements.is_extended(update(Parent))


def test_what_a_statement_returned_can_be_fetched_and_given_out_later():
    """``CursorResult.cursor_strategy``, and the one that has its rows already."""
    assert update(Parent)._returning == ()
    engine = create_engine("sqlite://")
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add_all([Parent(id=1, name="a"), Parent(id=2, name="b")])
        session.flush()
        statement = update(Parent).values(name="c").returning(Parent)
        assert statement._returning
        result: Any = session.execute(statement)
        assert statements.fetched(result) == 2
        assert [parent.name for parent in result.scalars()] == ["c", "c"]
    engine.dispose()


def test_a_listener_for_statements_can_be_added_as_the_last_one():
    """``ORMExecuteState._events_todo``, of which ``invoke_statement()`` calls what remains."""
    called: list[str] = []
    engine = create_engine("sqlite://")
    with Session(engine) as session:

        @event.listens_for(session, "do_orm_execute")
        def first(state: Any) -> Any:
            called.append("first")
            if "again" in state.execution_options:
                return None
            state.update_execution_options(again=True)
            return statements.execute_last(state, last)

        @event.listens_for(session, "do_orm_execute")
        def second(state: Any) -> None:
            called.append("second")

        def last(state: Any) -> Any:
            called.append("last")
            return state.invoke_statement(bind_arguments={"bind": session.get_bind()})

        assert session.execute(select(literal(1))).scalar_one() == 1
    assert called == ["first", "second", "last"], WHERE
    engine.dispose()


def test_the_conditions_that_options_and_inheritance_add():
    """``_BulkUDCompileState``, without the underscore in 2.0, and what an option knows."""
    option = with_loader_criteria(Parent, Parent.name == "a")
    require(option, "orm.with_loader_criteria()", "_is_criteria_option", "get_global_criteria")
    criteria: dict[Any, Any] = {}
    option.get_global_criteria(criteria)
    found = statements._BulkUDCompileState._adjust_for_extra_criteria(criteria, sa_inspect(Parent))
    assert [str(one) for one in found] == ["parents.name = :name_1"], WHERE


def test_a_list_of_values_is_taken_apart_by_columns_in_place():
    """``bulk_persistence._expand_other_attrs``; ``_expand_composites`` in 2.0."""
    values = [{"id": 1, "place": Place(2, 3)}]
    statements._expand(sa_inspect(Spot), values)
    assert values == [{"id": 1, "x": 2, "y": 3}]


def test_ordered_values_are_kept_in_either_of_two_places():
    """``_ordered_values`` in 2.0, ``_values`` in 2.1."""
    statement = update(Parent).ordered_values((Parent.name, "a"))
    values = dict(getattr(statement, "_ordered_values", None) or statement._values)
    assert [column.key for column in values] == ["name"]


@pytest.mark.parametrize("dialect", [sqlite, postgresql], ids=["sqlite", "postgresql"])
def test_an_upsert_says_what_it_does(dialect: Any):
    """``inferred_target_elements`` and ``update_values_to_set``."""
    statement = dialect.insert(Parent).on_conflict_do_update(
        index_elements=["id"], set_={"name": "a"}
    )
    clause = statement._post_values_clause
    assert list(clause.inferred_target_elements) == ["id"]
    assert [getattr(key, "key", key) for key in dict(clause.update_values_to_set)] == ["name"]
    assert not hasattr(dialect.insert(Parent).on_conflict_do_nothing(), "update_values_to_set")


@pytest.mark.parametrize("name", RELATIONSHIPS)
def test_a_relationship_has(flushed: Flushed, name: str):
    """``RelationshipProperty``."""
    require(flushed.mapper.relationships["children"], "orm.RelationshipProperty", name)


def test_a_relationship_knows_its_secondary_before_it_is_configured():
    """``_init_args.secondary.argument``, which may be a name."""
    assert relationship("Child", secondary="links")._init_args.secondary.argument == "links"
    assert relationship("Child")._init_args.secondary.argument is None


def test_histories_can_include_what_was_done_to_an_unloaded_collection():
    """``PassiveFlag.INCLUDE_PENDING_MUTATIONS``."""
    require(PassiveFlag, "orm.PassiveFlag", "INCLUDE_PENDING_MUTATIONS")


@pytest.mark.parametrize("name", ["OneToManyDP", "ManyToOneDP", "ManyToManyDP", "DetectKeySwitch"])
def test_the_dependency_module_has(name: str):
    """With an underscore from 2.1 on."""
    assert hasattr(dependency, name) or hasattr(dependency, f"_{name}"), (
        f"SQLAlchemy {sqlalchemy.__version__} has no orm.dependency.{name}: {WHERE}."
    )


@pytest.mark.parametrize("name", KEY_SWITCHES)
def test_detect_key_switch_has(name: str):
    """``DetectKeySwitch``."""
    require(dry_run.DetectKeySwitch, "orm.dependency.DetectKeySwitch", name)


def test_the_directions_of_a_relationship_have_their_processors(flushed: Flushed):
    """``OneToManyDP`` and ``ManyToOneDP`` are what they say."""
    kinds = {type(action.dependency_processor) for action in flushed.actions}
    assert {dry_run.OneToManyDP, dry_run.ManyToOneDP} <= kinds


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (UOWTransaction.__init__, ["self", "session"]),
        (
            UOWTransaction.register_object,
            ["self", "state", "isdelete", "listonly", "cancel_delete", "operation", "prop"],
        ),
        (UOWTransaction.get_attribute_history, ["self", "state", "key", "passive"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_overridden_or_called_by_position_takes(
    method: Callable[..., Any], parameters: list[str]
):
    """The parameters that it took when we wrote this."""
    found = list(inspect.signature(method).parameters)
    assert found == parameters, f"{method.__qualname__} of SQLAlchemy has changed: {WHERE}."


def test_the_listeners_of_a_mapper_are_a_sequence_with_the_last_one_last():
    """``dispatch.<event>.listeners``."""

    def first(mapper, connection, target): ...

    def last(mapper, connection, target): ...

    mapper = sa_inspect(Child)
    for fn in (first, last):
        event.listen(mapper, "before_update", fn, raw=True, retval=True)
    try:
        assert list(mapper.dispatch.before_update.listeners)[-2:] == [first, last]
        assert events.is_last_listener(mapper, "before_update", last)
        assert not events.is_last_listener(mapper, "before_update", first)
    finally:
        for fn in (first, last):
            event.remove(mapper, "before_update", fn)


def test_what_a_class_manager_has_as_original_init_is_called_by_the_outermost_constructor():
    """Once, with the instance; what it is when the instance is made counts."""
    made = []
    mapper = sa_inspect(Child)

    def wrap(init):
        def construct(*args, **kwargs):
            made.append((args, kwargs))
            init(*args, **kwargs)

        return construct

    before = mapper.class_manager.original_init
    events.wrap_init(mapper, wrap)
    try:
        child = Child(id=1)
    finally:
        events.unwrap_init(mapper)
    assert made == [((child,), {"id": 1})]
    assert child.id == 1
    assert mapper.class_manager.original_init is before


def test_a_class_manager_dispatches_load():
    """To the listeners that were there when the query began."""
    manager = sa_inspect(Child).class_manager
    loaded = []

    def on_load(state, context):
        loaded.append((state, context))

    events.listen_to(manager, "load", on_load, first=False)
    try:
        child = instances.detached_copy(manager.mapper, (Child, (1,), None), {"id": 1})
    finally:
        events.unlisten(manager, "load", on_load)
    assert loaded == [(instances.state_of(child), None)]
    assert not manager.dispatch.load


# -- nothing else --------------------------------------------------------------------------------


TYPES = {
    "_AbstractInterval",
    "_Binary",
    "_has_bind_expression",
    "_has_column_expression",
    "_json_deserializer",
    "_json_serializer",
    "_native_inet_types",
}


def test_a_type_of_json_asks_its_dialect_for_a_serializer():
    """One that has none serializes as the standard library does."""
    dialect = types.PlainDialect()
    kind = JSON().dialect_impl(dialect)
    write, read = kind.bind_processor(dialect), kind.result_processor(dialect, None)
    assert write is not None
    assert read is not None
    assert read(write({"a": (1, 2)})) == {"a": [1, 2]}


def test_a_dialect_knows_the_functions_of_its_engine_for_json():
    """One that has none uses the standard library."""
    assert {"_json_serializer", "_json_deserializer"} <= vars(sqlite.dialect()).keys()
    write, read = types.json_functions(sqlite.dialect())
    assert read(write({"a": (1, 2)})) == {"a": [1, 2]}


def test_a_dialect_of_postgresql_knows_what_addresses_are_loaded_as():
    """Unless that is turned off, as objects of ipaddress."""
    assert "_native_inet_types" in vars(postgresql.dialect())
    assert types.loads_addresses(postgresql.psycopg.dialect())
    assert not types.loads_addresses(postgresql.psycopg.dialect(native_inet_types=False))


def test_types_have_bases_and_say_whether_they_put_sql_around_values():
    """Bytes and intervals of every database have one base each."""
    assert issubclass(mysql.LONGBLOB, sqltypes._Binary)
    assert issubclass(postgresql.INTERVAL, sqltypes._AbstractInterval)
    kind = String()
    assert not kind._has_bind_expression
    assert not kind._has_column_expression


def sources() -> list[Path]:
    """The modules of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def is_for_them(path: Path) -> bool:
    """Whether a module is there for the private names of SQLAlchemy."""
    return path.parent.name == "_sqlalchemy"


@cache
def own_names() -> set[str]:
    """The private names that the package itself defines."""
    names: set[str] = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    names.add(node.attr)
            elif isinstance(node, ast.Dict):
                names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return names


def private_names(path: Path) -> set[str]:
    """The private names of others that a module uses: attributes, imports, and in strings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sqlalchemy"):
            found.update(alias.name for alias in node.names)
            found.update((node.module or "").split("."))
        elif isinstance(node, ast.Constant) and str(node.value).isidentifier():
            found.add(str(node.value))
    private = {name for name in found if name.startswith("_") and not name.endswith("_")}
    return private - own_names() - OF_OTHERS


OF_OTHERS = {"_async_wrapper", "_sync_wrapper", "_mapping", "_replace", "_migrations_fn"}
"""What blinker and Alembic call private, and the public names of named tuples."""


def test_every_private_name_in_the_modules_for_them_is_asserted_above():
    """A new one must be added here."""
    asserted = {
        *MAPPER_MODULE,
        *MAPPERS,
        *STATES,
        *SESSIONS,
        *ACTIONS,
        *PROCESSORS,
        *KEY_SWITCHES,
        *RELATIONSHIPS,
        *STATEMENTS,
        *IDENTITY_MAPS,
    }
    asserted |= {*ASYNC_SESSIONS, *EVENTS, *ELSEWHERE, *TYPES}
    used = set().union(*(private_names(path) for path in sources() if is_for_them(path)))
    assert used <= asserted


@pytest.mark.parametrize(
    "path",
    [path for path in sources() if not is_for_them(path)],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_other_module_uses_a_private_name_of_sqlalchemy(path: Path):
    """They go through ``_sqlalchemy/``."""
    assert private_names(path) == set()
