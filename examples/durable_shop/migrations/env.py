"""Alembic's environment: the database is the application's, and so are the tables."""

from alembic import context

from examples.durable_shop.app import engine
from examples.durable_shop.models import Base

if context.is_offline_mode():
    context.configure(url=engine.url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()
