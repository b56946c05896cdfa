"""Users, and what their roles allow.

Revision ID: 2_users
Revises: 1_roles
"""

import sqlalchemy as sa
from alembic import op

revision = "2_users"
down_revision = "1_roles"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "roles",
        sa.Column("may_write", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("role_id", sa.Integer, sa.ForeignKey("roles.id"), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("users")
    op.drop_column("roles", "may_write")
