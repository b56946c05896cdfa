"""The migrated application: its own migrations, run as its users run them."""

from __future__ import annotations

from pathlib import Path

import alembic
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Engine, update

from examples.migrated_app.models import Role
from examples.migrated_app.receivers import DEFAULT_ROLES
from tests.contract.observing import rows
from tests.examples.running import connect_receivers, run_python

HERE = Path(__file__).parents[2] / "examples" / "migrated_app"
DEFAULTS = sorted(DEFAULT_ROLES.items())


@pytest.fixture
def config(engine: Engine) -> Config:
    """The application on an empty database."""
    connect_receivers("examples.migrated_app.receivers")
    config = Config()
    config.set_main_option("script_location", str(HERE / "migrations"))
    url = engine.url.render_as_string(hide_password=False)
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def test_the_newest_revision_brings_the_default_rows(config: Config, engine: Engine):
    """Not an older one, whose table is not what the models say."""
    command.upgrade(config, "1_roles")
    assert rows(engine, Role.name) == []
    command.upgrade(config, "head")
    assert rows(engine, Role.name, Role.may_write) == DEFAULTS


def test_what_somebody_has_changed_stays(config: Config, engine: Engine):
    """Downgrading and upgrading again adds only what is missing."""
    command.upgrade(config, "head")
    with engine.begin() as connection:
        connection.execute(update(Role).where(Role.name == "reader").values(name="guest"))
    command.downgrade(config, "1_roles")
    assert rows(engine, Role.name) == ["admin", "editor", "guest"]
    command.upgrade(config, "head")
    assert rows(engine, Role.name) == ["admin", "editor", "guest", "reader"]


def test_its_env_py_is_a_template_of_alembic_plus_the_line():
    """With the imports and the metadata that every application fills in."""
    ours = (HERE / "migrations" / "env.py").read_text().splitlines()
    template = Path(alembic.__file__).parent / "templates" / "generic" / "env.py"
    theirs = template.read_text().splitlines()
    added = [line.strip() for line in ours if line not in theirs]
    assert added == [
        "from examples.migrated_app import receivers  # connects them",
        "from examples.migrated_app.models import Base",
        "from sqla_signals.alembic import migration_signals",
        "target_metadata = Base.metadata",
        "with migration_signals(context):",
        "context.run_migrations()",
    ]


def test_the_demonstration_shows_the_default_rows():
    """``python -m examples.migrated_app``; in it, Alembic logs nothing but warnings."""
    printed = run_python("-m", "examples.migrated_app")
    assert all(name in printed for name in DEFAULT_ROLES)
