"""Default rows, filled in by the migration that makes their table complete."""

from sqlalchemy import select

from examples.migrated_app.models import Base, Role
from sqla_signals import post_migrate, receiver

DEFAULT_ROLES = {"admin": True, "editor": True, "reader": False}


@receiver(post_migrate, sender=Base.metadata)
def add_default_roles(sender, direction, plan, heads, session, **kwargs):
    """Add what is missing, and leave alone what somebody has changed since."""
    # The models are those of the newest revision: at an older one the table is another.
    if direction != "upgrade" or heads != set(plan[-1].revision_map.heads):
        return
    known = set(session.scalars(select(Role.name)))
    session.add_all(
        Role(name=name, may_write=may_write)
        for name, may_write in DEFAULT_ROLES.items()
        if name not in known
    )
