"""The migrations of an application, run and shown: `python -m examples.migrated_app`."""

import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from examples import show
from examples.migrated_app.models import Role

HERE = Path(__file__).parent


def roles(url: str) -> list[tuple[str, bool]]:
    engine = create_engine(url)
    with Session(engine) as session:
        found = session.execute(select(Role.name, Role.may_write).order_by(Role.name)).all()
    engine.dispose()
    return [tuple(row) for row in found]


def main() -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        url = f"sqlite:///{directory}/migrated_app.db"
        config = Config()  # of alembic.ini, only the logging is left out
        config.set_main_option("script_location", str(HERE / "migrations"))
        config.set_main_option("sqlalchemy.url", url)
        show.heading("alembic upgrade 1_roles: the table is not what the models say yet")
        command.upgrade(config, "1_roles")
        show.line("no default rows")
        show.heading("alembic upgrade head: post_migrate fills in the default rows")
        command.upgrade(config, "head")
        show.table(["role", "may write"], roles(url))
        show.heading("alembic upgrade head: nothing to migrate, so nothing is sent")
        command.upgrade(config, "head")


if __name__ == "__main__":
    main()
