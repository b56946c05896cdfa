"""The state machine: rules that write one line of a program each and run it."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sqlalchemy import JSON, Column, Integer, inspect
from sqlalchemy.orm import RelationshipProperty
from sqlalchemy.orm.collections import collection_adapter

from .meddling import ACTIONS, SIGNALS
from .models import CLUSTERS, Base
from .program import Mismatch, Program, Tally
from .recorder import ControlSession, Database, SignallingSession

T = TypeVar("T")

picks = st.integers(0, 11)
"""A choice among what there is, modulo its number, so that it shrinks to the first."""

DATACLASSES = ("Polygon", "Corner")


class SessionPrograms(RuleBasedStateMachine):
    """Random programs over one or two clusters of classes. Subclasses set the databases."""

    database: ClassVar[Database]
    control_database: ClassVar[Database | None] = None
    """Where the same program runs without the library; what it writes must not differ."""
    tally: ClassVar[Tally]
    meddling: ClassVar[bool] = False

    @initialize(
        clusters=st.lists(st.sampled_from(range(len(CLUSTERS))), min_size=1, max_size=2),
        population=st.lists(st.tuples(picks, picks, picks), max_size=8),
        autoflush=st.booleans(),
        expire_on_commit=st.booleans(),
        order=picks,
    )
    def begin(
        self,
        clusters: list[int],
        population: list[tuple[int, int, int]],
        autoflush: bool,
        expire_on_commit: bool,
        order: int,
    ) -> None:
        self.classes: list[type[Base]] = [c for n in dict.fromkeys(clusters) for c in CLUSTERS[n]]
        self.options = {"autoflush": autoflush, "expire_on_commit": expire_on_commit}
        self.order = order
        self.start(self.tally)
        self.tally.programs += 1
        for cls, value, parent in population:
            self.new(cls, value, parent)

    def start(self, tally: Tally) -> None:
        """Begin a program, and its twin."""
        options = {"order": self.order, **self.options}
        self.program = Program(
            self.database, SignallingSession, tally, meddling=self.meddling, **options
        )
        self.control: Program | None = None
        if self.control_database is not None and not self.meddling:
            self.control = Program(self.control_database, ControlSession, Tally(), **options)

    def teardown(self) -> None:
        if hasattr(self, "program"):
            self.program.end()
            if self.control is not None:
                self.control.end()
        gc.collect()

    # Making and linking instances.

    @rule(cls=picks, value=picks, parent=picks, add=picks)
    def new(self, cls: int, value: int, parent: int, add: int = 0) -> None:
        chosen = pick(self.classes, cls)
        name = self.program.new_name(chosen)
        self.run(f"{name} = {chosen.__name__}({self.arguments(chosen, value, parent)})")
        if add < 9:
            self.run(f"session.add({name})")

    @rule(child=picks, value=picks, parent=picks, relation=picks)
    def new_in_collection(self, child: int, value: int, parent: int, relation: int) -> None:
        found = self.relation(parent, relation, uselist=True)
        if found is None:
            return
        name, prop = found
        chosen = pick([m.class_ for m in prop.mapper.self_and_descendants], child)
        new_name = self.program.new_name(chosen)
        self.run(f"{new_name} = {chosen.__name__}({self.arguments(chosen, value, None)})")
        self.run(f"{name}.{prop.key}.{adder(prop)}({new_name})")

    @rule(instance=picks)
    def add(self, instance: int) -> None:
        if name := self.variable(instance, Base, "transient", "detached"):
            self.run(f"session.add({name})")

    @rule(instance=picks, relation=picks, other=picks)
    def link(self, instance: int, relation: int, other: int) -> None:
        found = self.relation(instance, relation)
        target_name = found and self.variable(other, found[1].mapper.class_)
        if not found or not target_name:
            return
        name, prop = found
        if prop.uselist:
            self.run(f"{name}.{prop.key}.{adder(prop)}({target_name})")
        else:
            self.run(f"{name}.{prop.key} = {target_name}")

    @rule(instance=picks, relation=picks)
    def unlink(self, instance: int, relation: int) -> None:
        if found := self.relation(instance, relation, uselist=False):
            self.run(f"{found[0]}.{found[1].key} = None")

    @rule(instance=picks, relation=picks, other=picks)
    def remove(self, instance: int, relation: int, other: int) -> None:
        found = self.relation(instance, relation, uselist=True)
        if found is None:
            return
        name, prop = found
        loaded = inspect(self.program.variables[name]).dict.get(prop.key)
        members = list(collection_adapter(loaded)) if hasattr(loaded, "_sa_adapter") else []
        member_names = [
            n for n, v in self.program.variables.items() if any(v is m for m in members)
        ]
        if member_names:
            self.run(f"{name}.{prop.key}.remove({pick(member_names, other)})")
        elif prop.lazy in ("write_only", "dynamic"):
            if target_name := self.variable(other, prop.mapper.class_):
                self.run(f"{name}.{prop.key}.remove({target_name})")
        else:
            self.run(f"{name}.{prop.key}.pop()")

    @rule(instance=picks, relation=picks, others=st.lists(picks, max_size=3))
    def replace_collection(self, instance: int, relation: int, others: list[int]) -> None:
        found = self.relation(instance, relation, uselist=True)
        if found is None:
            return
        name, prop = found
        members = [self.variable(other, prop.mapper.class_) for other in others]
        listed = ", ".join(dict.fromkeys(member for member in members if member))
        if prop.collection_class is set:
            self.run(f"{name}.{prop.key} = set([{listed}])")
        else:
            self.run(f"{name}.{prop.key} = [{listed}]")

    @rule(instance=picks, column=picks, other=picks)
    def set_foreign_key(self, instance: int, column: int, other: int) -> None:
        name = self.variable(instance, Base, "pending", "persistent")
        if name is None:
            return
        mapper = inspect(self.program.variables[name]).mapper
        columns = [
            (attr.key, next(iter(attr.columns[0].foreign_keys)).column.table)
            for attr in mapper.column_attrs
            if len(attr.columns) == 1
            and isinstance(attr.columns[0], Column)
            and attr.columns[0].foreign_keys
        ]
        if not columns:
            return
        attribute, table = pick(columns, column)
        rows = [
            variable
            for variable, value in self.program.variables.items()
            if inspect(value).identity and inspect(value).mapper.base_mapper.local_table is table
        ]
        value = f"inspect({pick(rows, other)}).identity[0]" if rows and other else "None"
        self.run(f"{name}.{attribute} = {value}")

    # Changing columns.

    @rule(instance=picks, column=picks, value=picks)
    def set_column(self, instance: int, column: int, value: int) -> None:
        name = self.variable(instance, Base, "pending", "persistent")
        columns = name and plain_columns(type(self.program.variables[name]))
        if columns:
            attribute, sql_column = pick(columns, column)
            self.run(f"{name}.{attribute} = {literal(sql_column, value)}")

    @rule(instance=picks, column=picks)
    def set_expression(self, instance: int, column: int) -> None:
        name = self.variable(instance, Base, "pending", "persistent")
        if name is None:
            return
        cls = type(self.program.variables[name])
        numbers = [key for key, c in plain_columns(cls) if isinstance(c.type, Integer)]
        if numbers:
            attribute = pick(numbers, column)
            is_new = inspect(self.program.variables[name]).pending
            expression = "func.length('abc')" if is_new else f"{cls.__name__}.{attribute} + 1"
            self.run(f"{name}.{attribute} = {expression}")

    @precondition(lambda self: any(cls.__name__ == "Config" for cls in self.classes))
    @rule(instance=picks, value=picks)
    def change_in_place(self, instance: int, value: int) -> None:
        names = [n for n, v in self.program.variables.items() if type(v).__name__ == "Config"]
        if names:
            self.run(f"{pick(names, instance)}.options[{'ab'[value % 2]!r}] = {value}")

    @precondition(lambda self: any(hasattr(cls, "code") for cls in self.classes))
    @rule(instance=picks, value=picks)
    def change_key(self, instance: int, value: int) -> None:
        names = [n for n, v in self.program.variables.items() if hasattr(type(v), "code")]
        if names:
            self.run(f"{pick(names, instance)}.code = 'k{value % 6}'")

    @rule(instance=picks, relation=picks)
    def touch(self, instance: int, relation: int) -> None:
        if found := self.relation(instance, relation):
            self.run(f"{found[0]}.{found[1].key}")

    # Deleting.

    @rule(instance=picks)
    def delete(self, instance: int) -> None:
        if name := self.variable(instance, Base, "persistent"):
            self.run(f"session.delete({name})")

    @rule(instance=picks, value=picks, parent=picks)
    def delete_and_add_again(self, instance: int, value: int, parent: int) -> None:
        name = self.variable(instance, Base, "persistent")
        if name is None or inspect(self.program.variables[name]).identity is None:
            return
        mapper = inspect(self.program.variables[name]).mapper
        keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        new_name = self.program.new_name(mapper.class_)
        arguments = self.arguments(mapper.class_, value, parent, skip=keys)
        self.run(f"session.delete({name})")
        self.run(f"{new_name} = {mapper.class_.__name__}({arguments})")
        self.run(f"{', '.join(f'{new_name}.{k}' for k in keys)}, = inspect({name}).identity")
        self.run(f"session.add({new_name})")

    # The session.

    @rule()
    def flush(self) -> None:
        self.run("session.flush()")

    @rule(instances=st.lists(picks, min_size=1, max_size=2))
    def flush_some(self, instances: list[int]) -> None:
        states = "pending", "persistent"
        names = dict.fromkeys(name for n in instances if (name := self.variable(n, Base, *states)))
        if names:
            self.run(f"session.flush([{', '.join(names)}])")

    @rule(cls=picks, row=picks)
    def load(self, cls: int, row: int) -> None:
        chosen = pick(self.classes, cls)
        self.run(f"{self.program.new_name(chosen)} = {one_row(chosen, row)}")

    @rule(cls=picks)
    def query(self, cls: int) -> None:
        self.run(f"session.scalars(select({pick(self.classes, cls).__name__})).all()")

    @rule(instance=picks, relation=st.none() | picks)
    def expire(self, instance: int, relation: int | None) -> None:
        found = None if relation is None else self.relation(instance, relation)
        if found:
            self.run(f"session.expire({found[0]}, [{found[1].key!r}])")
        elif name := self.variable(instance, Base, "persistent"):
            self.run(f"session.expire({name})")

    @rule(instance=picks)
    def refresh(self, instance: int) -> None:
        if name := self.variable(instance, Base, "persistent"):
            self.run(f"session.refresh({name})")

    @rule(instance=picks)
    def expunge(self, instance: int) -> None:
        if name := self.variable(instance, Base, "pending", "persistent"):
            self.run(f"session.expunge({name})")

    @rule(instance=picks)
    def merge(self, instance: int) -> None:
        name = self.variable(instance, Base, "transient", "pending", "persistent", "detached")
        if name:
            cls = type(self.program.variables[name])
            self.run(f"{self.program.new_name(cls)} = session.merge({name})")

    @rule(instance=picks, value=picks)
    def merge_new(self, instance: int, value: int) -> None:
        name = self.variable(instance)
        if name is None or inspect(self.program.variables[name]).identity is None:
            return
        mapper = inspect(self.program.variables[name]).mapper
        keys = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
        new_name = self.program.new_name(mapper.class_)
        arguments = self.arguments(mapper.class_, value, None, skip=keys)
        self.run(f"{new_name} = {mapper.class_.__name__}({arguments})")
        self.run(f"{', '.join(f'{new_name}.{k}' for k in keys)}, = inspect({name}).identity")
        self.run(f"{new_name} = session.merge({new_name})")

    @rule()
    def begin_savepoint(self) -> None:
        self.run("savepoints.append(session.begin_nested())")

    @rule()
    def release_savepoint(self) -> None:
        if self.program.namespace["savepoints"]:
            self.run("savepoints.pop().commit()")

    @rule()
    def roll_back_savepoint(self) -> None:
        if self.program.namespace["savepoints"]:
            self.run("savepoints.pop().rollback()")

    @rule(how=picks)
    def end(self, how: int) -> None:
        if how < 7:
            self.run("savepoints.clear(); session.commit()")
        elif how < 10:
            self.roll_back()
        else:
            self.run("savepoints.clear(); session.close(); session = new_session()")

    def roll_back(self) -> None:
        self.run("savepoints.clear(); session.rollback()")

    @rule(instance=picks, collect=st.booleans())
    def forget(self, instance: int, collect: bool) -> None:
        if name := self.variable(instance):
            self.run(f"del {name}; gc.collect()" if collect else f"del {name}")

    # Receivers that act.

    @precondition(lambda self: self.meddling)
    @rule(signal=picks, cls=picks, action=picks, other=picks)
    def meddle(self, signal: int, cls: int, action: int, other: int) -> None:
        if len(self.program.recorder.meddlers) < 4:
            sender, target = pick(self.classes, cls), pick(self.classes, other)
            self.run(
                f"meddle({pick(SIGNALS, signal)!r}, {sender.__name__}, "
                f"{pick(ACTIONS, action)!r}, {target.__name__})"
            )

    # How rules choose.

    def run(self, line: str) -> None:
        """Run the line, and its twin; roll back where that is all that is left to do."""
        self.tally.steps += 1
        try:
            error = self.program.run(line)
            if self.control is not None:
                self.compare_with_control(error, self.control.run(line))
        except Mismatch as mismatch:
            raise self.minimal(mismatch) from None
        if self.program.must_roll_back or (self.control and self.control.must_roll_back):
            self.roll_back()

    def compare_with_control(self, error: object, control_error: object) -> None:
        """Signals must not change what is written, nor whether a line fails.

        Where a flush fails, it may fail earlier with signals: before its first statement.
        """
        assert self.control is not None
        statements, twins = self.program.statements, self.control.statements
        if (error is None) != (control_error is None) or (error is None and statements != twins):
            raise Mismatch(
                ["the program runs otherwise without signals"],
                self.program.lines,
                f"with:    {error!r}, {statements}\nwithout: {control_error!r}, {twins}",
            )

    def minimal(self, mismatch: Mismatch) -> Mismatch:
        """The same mismatch in a program as short as can be.

        The example is rejected where SQLAlchemy itself does not always do the same, because the
        order is that of a set: a row switch within a cycle of mappers, for one, sets the foreign
        keys of children to NULL or does not.
        """
        lines = [line.partition("  # ")[0] for line in self.program.lines]
        self.teardown()
        if not self.is_decided(lines):
            self.tally.undecided += 1
            reject()
        found = self.replay(lines)
        if found is None or found.kind != mismatch.kind:
            return mismatch
        size = len(lines) // 2
        while size:
            at = 0
            while at < len(lines):
                fewer = lines[:at] + lines[at + size :]
                again = self.replay(fewer)
                if again is not None and again.kind == mismatch.kind and self.is_decided(fewer):
                    lines, found = fewer, again
                else:
                    at += size
            size //= 2
        return found

    def replay(self, lines: Sequence[str]) -> Mismatch | None:
        """Run a program again, and return what it ends with."""
        try:
            self.start(Tally(self.tally.tolerated))
            for line in lines:
                error = self.program.run(line)
                if self.control is not None:
                    self.compare_with_control(error, self.control.run(line))
        except Mismatch as mismatch:
            return mismatch
        finally:
            self.teardown()
        return None

    def is_decided(self, lines: Sequence[str]) -> bool:
        """Whether the control does the same with the program in every order."""
        if self.control_database is None or self.meddling:
            return True
        outcomes = set()
        for order in range(8):
            twin = Program(
                self.control_database, ControlSession, Tally(), order=order, **self.options
            )
            done = []
            for line in lines:
                error = twin.run(line)
                done.append((type(error), str(twin.statements)))
            outcomes.add(str(done))
            twin.end()
        return len(outcomes) == 1

    def variable(self, n: int, cls: type = Base, *states: str) -> str | None:
        """The name of an instance of `cls` that is in one of the states, if one is."""
        names = [
            name
            for name, instance in self.program.variables.items()
            if isinstance(instance, cls)
            and (not states or any(getattr(inspect(instance), state) for state in states))
        ]
        return pick(names, n) if names else None

    def relation(
        self, instance: int, relation: int, uselist: bool | None = None
    ) -> tuple[str, RelationshipProperty[Any]] | None:
        """The name of an instance and one of its relationships."""
        found = [
            (name, [r for r in inspect(value).mapper.relationships if uselist in (None, r.uselist)])
            for name, value in self.program.variables.items()
            if not inspect(value).deleted and not inspect(value).detached
        ]
        found = [(name, relations) for name, relations in found if relations]
        if not found:
            return None
        name, relations = pick(found, instance)
        return name, pick(relations, relation)

    def arguments(
        self, cls: type[Base], value: int, parent: int | None, skip: Sequence[str] = ()
    ) -> str:
        """What to construct an instance with: a column or two, and perhaps its parents."""
        given = []
        if hasattr(cls, "code") and "code" not in skip:
            given.append(f"code='k{value % 6}'")
        columns = plain_columns(cls)
        if columns and value:
            key, column = pick(columns, value)
            given.append(f"{key}={literal(column, value)}")
        for relation in inspect(cls).relationships:
            if relation.uselist or not parent or cls.__name__ in DATACLASSES:
                continue
            if name := self.variable(parent - 1, relation.mapper.class_):
                given.append(f"{relation.key}={name}")
        return ", ".join(given)


def pick(choices: Sequence[T], n: int) -> T:
    """One of the choices."""
    return choices[n % len(choices)]


_PLAIN: dict[type, list[tuple[str, Column[Any]]]] = {}


def plain_columns(cls: type[Base]) -> list[tuple[str, Column[Any]]]:
    """The columns that a program may assign values to, by attribute."""
    if cls not in _PLAIN:
        mapper = inspect(cls)
        _PLAIN[cls] = [
            (attr.key, column)
            for attr in mapper.column_attrs
            for column in attr.columns[:1]
            if isinstance(column, Column)
            and not (column.primary_key or column.foreign_keys or column.computed is not None)
            and column is not mapper.polymorphic_on
            and column is not mapper.version_id_col
        ]
    return _PLAIN[cls]


def literal(column: Column[Any], n: int) -> str:
    """A value for the column, as source."""
    if isinstance(column.type, JSON):
        return repr([None, {}, {"a": 1}, {"b": 2}][n % 4])
    if isinstance(column.type, Integer):
        return repr([0, 1, 2, None][n % 4])
    return repr(["a", "b", "c", None][n % 4])


def adder(prop: RelationshipProperty[Any]) -> str:
    """The method that adds to the collection."""
    return "add" if prop.collection_class is set or prop.lazy == "write_only" else "append"


def one_row(cls: type[Base], n: int) -> str:
    """Source that loads one of the rows of `cls`."""
    name = cls.__name__
    keys = ", ".join(f"{name}.{c.key}" for c in inspect(cls).primary_key)
    statement = f"select({name}).order_by({keys}).offset({n % 4}).limit(1)"
    return f"session.scalars({statement}).first()"
