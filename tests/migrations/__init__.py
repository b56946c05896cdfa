"""Real Alembic commands on real databases, with the signals of their runs."""
