"""Roles.

Revision ID: 1_roles
Revises:
"""

import sqlalchemy as sa
from alembic import op

revision = "1_roles"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "roles",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False, unique=True),
    )


def downgrade() -> None:
    op.drop_table("roles")
