"""A project that Alembic migrates: its own template for ``env.py``, plus the one line."""

from __future__ import annotations

import re
import textwrap
from io import StringIO
from pathlib import Path
from typing import Any

import alembic
from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, inspect, make_url, text

TEMPLATES = Path(alembic.__file__).parent / "templates"
THE_LINE = "with migration_signals(context):"


class Project:
    """A directory with an ``env.py`` and revisions, and the commands to migrate its database.

    :param template: ``"generic"``, ``"async"`` or ``"multidb"``.
    :param urls: of the databases; more than one for ``"multidb"``.
    """

    def __init__(self, path: Path, template: str, *urls: URL) -> None:
        self.path = path
        (path / "versions").mkdir(parents=True)
        env = (TEMPLATES / template / "env.py").read_text()
        env, places = re.subn(
            r"^( *)(context\.run_migrations\(.*\))$", rf"\1{THE_LINE}\n\1    \2", env, flags=re.M
        )
        assert places == 2, "offline and online"
        env, places = re.subn(
            r"^(from alembic import context)$",
            r"\1\nfrom sqla_signals.alembic import migration_signals",
            env,
            flags=re.M,
        )
        assert places == 1
        (path / "env.py").write_text(env)
        self.config = Config(output_buffer=StringIO(), stdout=StringIO())
        self.config.set_main_option("script_location", str(path))
        strings = [url.render_as_string(hide_password=False).replace("%", "%%") for url in urls]
        if template == "multidb":
            names = [f"engine{number}" for number in range(1, len(urls) + 1)]
            self.config.set_main_option("databases", ", ".join(names))
            for name, string in zip(names, strings, strict=True):
                self.config.set_section_option(name, "sqlalchemy.url", string)
        else:
            self.config.set_main_option("sqlalchemy.url", strings[0])

    def edit_env(self, old: str, new: str) -> None:
        """Replace something in ``env.py``, everywhere."""
        env = (self.path / "env.py").read_text()
        assert old in env
        (self.path / "env.py").write_text(env.replace(old, new))

    def revision(
        self,
        name: str,
        down: str | tuple[str, ...] | None,
        upgrade: str = "",
        downgrade: str = "",
        **more: Any,
    ) -> None:
        """Write a revision; the bodies are SQL, or Python that begins with ``python:``."""
        arguments = more.pop("arguments", "")
        lines = [f"revision = {name!r}", f"down_revision = {down!r}"]
        lines += [f"{key} = {value!r}" for key, value in more.items()]
        script = "from alembic import op\n\n" + "\n".join(lines) + "\n"
        for function, body in (("upgrade", upgrade), ("downgrade", downgrade)):
            python = body.removeprefix("python:") if body.startswith("python:") else ""
            python = python or (f"op.execute({body!r})" if body else "pass")
            script += f"\n\ndef {function}({arguments}):\n{textwrap.indent(python, '    ')}\n"
        (self.path / "versions" / f"{name}.py").write_text(script)

    def __getattr__(self, name: str) -> Any:
        """A command of Alembic: ``project.upgrade("head")``; returns what it printed."""
        run = getattr(command, name)

        def call(*args: Any, **kwargs: Any) -> str:
            for buffer in (self.config.output_buffer, self.config.stdout):
                buffer.seek(0)
                buffer.truncate()
            run(self.config, *args, **kwargs)
            return self.config.output_buffer.getvalue() + self.config.stdout.getvalue()

        return call


def versions(engine: Engine) -> set[str]:
    """The revisions that were committed."""
    if not inspect(engine).has_table("alembic_version"):
        return set()
    with engine.connect() as connection:
        return set(connection.scalars(text("SELECT version_num FROM alembic_version")))


def names(source: Engine | Connection) -> list[str]:
    """The names of the roles, as an engine or a connection sees them."""
    query = text("SELECT name FROM roles ORDER BY name")
    if isinstance(source, Connection):
        return list(source.scalars(query))
    with source.connect() as connection:
        return list(connection.scalars(query))


def has_table(engine: Engine, table: str) -> bool:
    """Whether it was committed."""
    return inspect(engine).has_table(table)


def async_url(engine: Engine) -> URL:
    """The same database for an asynchronous driver."""
    driver = "sqlite+aiosqlite" if engine.dialect.name == "sqlite" else "postgresql+asyncpg"
    return make_url(engine.url).set(drivername=driver)
