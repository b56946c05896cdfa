"""The tables as Alembic and the database see them."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, create_engine, inspect
from sqlalchemy.schema import CreateTable

from sqla_signals import ReceiverOptionError, outbox_table

from .conftest import engine_for
from .models import Base, outbox

ENV = """
from alembic import context
from sqlalchemy import create_engine
from {models} import Base

engine = create_engine(context.config.get_main_option("sqlalchemy.url").replace("%%", "%"))
with engine.connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        include_object=lambda _, name, kind, *__: kind != "table" or "sqla_signals" in name,
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
"""

SCRIPT = '''
"""${message}"""
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

def upgrade():
    ${upgrades if upgrades else "pass"}

def downgrade():
    ${downgrades if downgrades else "pass"}
'''


@pytest.mark.parametrize("given", [Base, Base.registry])
def test_the_tables_are_added_to_a_metadata_and_the_error_says_which(given: object):
    """The base class is what one has at hand."""
    with pytest.raises(ReceiverOptionError, match=r"outbox_table\(Base\.metadata\)"):
        outbox_table(given)


def test_autogenerate_finds_no_difference_after_create_all(shop: Engine):
    """Types compared, server defaults too."""
    with shop.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        found = compare_metadata(context, Base.metadata)
    ours = (outbox.table.name, outbox.inbox.name, outbox.dead_letters.name)
    assert [
        difference for difference in found if any(name in str(difference) for name in ours)
    ] == []


def test_a_migration_that_autogenerate_wrote_creates_the_tables(url: str, tmp_path: Path):
    """And after it there is nothing left to migrate."""
    config = Config()
    config.set_main_option("script_location", str(tmp_path / "migrations"))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    (tmp_path / "migrations" / "versions").mkdir(parents=True)
    (tmp_path / "migrations" / "env.py").write_text(ENV.format(models=Base.__module__))
    (tmp_path / "migrations" / "script.py.mako").write_text(SCRIPT)
    command.revision(config, "outbox", autogenerate=True)
    command.upgrade(config, "head")
    command.check(config)
    engine = engine_for(url)
    assert {"sqla_signals_outbox", "sqla_signals_inbox", "sqla_signals_dead_letters"} <= set(
        inspect(engine).get_table_names()
    )
    engine.dispose()


@pytest.mark.parametrize(
    ("dialect", "types"),
    [
        ("postgresql+psycopg", ["BIGSERIAL", "UUID", "JSON", "TIMESTAMP WITH TIME ZONE"]),
        ("mysql+pymysql", ["BIGINT NOT NULL AUTO_INCREMENT", "JSON", "DATETIME(6)"]),
        ("sqlite", ["INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "JSON"]),
    ],
)
def test_the_columns_have_types_that_the_database_indexes_well(dialect: str, types: list[str]):
    """Native UUIDs, microseconds; JSON as it was written, which JSONB does not keep."""
    ddl = str(CreateTable(outbox.table).compile(dialect=create_engine(f"{dialect}://").dialect))
    for one in types:
        assert one in ddl
