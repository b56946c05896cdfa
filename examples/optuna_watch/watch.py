"""Reports what Optuna writes, without touching its code.

Optuna keeps its studies in mapped classes and writes them in scoped sessions of its own, which
nobody else sees. `sqla_signals.install()` listens to every session of the process, those included.

What is heard and what is not, as of Optuna 5.0 (`optuna/storages/_rdb/storage.py`):

- Studies, trials, parameters, values, intermediate values and heartbeats are written by the ORM's
  unit of work: one signal for each row. To delete a study, the ORM loads all that belongs to it and
  deletes it row by row (`cascade="all, delete-orphan"`; no `ON DELETE` in the database), so that
  each of these rows has its signal too, and `origin` tells the study.
- `trial.set_user_attr`, and `set_system_attr` on a trial, are an upsert on SQLite, PostgreSQL and
  MySQL: `INSERT ... ON CONFLICT DO UPDATE`. Such a statement bypasses the unit of work and sends no
  `pre_save` and no `post_save`. The rows are first heard of when they are deleted.
- Migrations of Optuna's schema use bulk operations, and `alembic_version` is not mapped: silence.

These receivers run when Optuna flushes, inside its transaction: what they report may still be
rolled back, and an exception of theirs would be Optuna's.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from optuna.storages._rdb.models import BaseModel, StudyModel, TrialModel

from sqla_signals import UNSET, Change, post_delete, post_save, receiver

logger = logging.getLogger(__name__)

heard: Counter[tuple[str, str]] = Counter()
"""How many rows were created, updated and deleted, by table and action."""


@receiver(post_save, sender=BaseModel)
def count_save(sender: type[Any], created: bool, **kwargs: Any) -> None:
    """Count; a declarative base as the sender stands for every model that inherits it."""
    heard[sender.__tablename__, "created" if created else "updated"] += 1


@receiver(post_delete, sender=BaseModel)
def count_delete(sender: type[Any], **kwargs: Any) -> None:
    """Count."""
    heard[sender.__tablename__, "deleted"] += 1


@receiver(post_save, sender=StudyModel)
def study_saved(sender: type[Any], instance: Any, created: bool, **kwargs: Any) -> None:
    """Report a new study, and a renamed one."""
    logger.info("study %r %s", instance.study_name, "created" if created else "updated")


@receiver(post_save, sender=TrialModel, fields={"state"})
def trial_changed_state(
    sender: type[Any], instance: Any, created: bool, changes: Mapping[str, Change], **kwargs: Any
) -> None:
    """Report a new trial, and each change of a trial's state.

    Optuna numbers a trial in a second statement, so a new one is known by its primary key alone.
    The values were written in the same flush, and can be read.
    """
    if created:
        logger.info("trial id %s created as %s", instance.trial_id, instance.state.name)
        return
    old = changes["state"].old
    before = "?" if old is UNSET else old.name
    values = "".join(f", value {value.value}" for value in instance.values)
    logger.info("trial id %s %s → %s%s", instance.trial_id, before, instance.state.name, values)


@receiver(post_delete, sender=StudyModel)
def study_deleted(sender: type[Any], instance: Any, **kwargs: Any) -> None:
    """Report a deletion."""
    logger.info("study %r deleted", instance.study_name)


@receiver(post_delete, sender=TrialModel)
def trial_deleted(sender: type[Any], instance: Any, origin: Any, **kwargs: Any) -> None:
    """Report a deletion, and the study whose deletion took the trial along."""
    reason = "" if origin is None else f" with study {origin.study_name!r}"
    logger.info("trial id %s deleted%s", instance.trial_id, reason)
