"""The rules of the notes; importing this module connects them."""

import re
from collections.abc import Mapping
from typing import Any

from sqlmodel import Session, select

from examples.sqlmodel_notes.models import Note, OldText
from sqla_signals import UNSET, Change, pre_save, receiver


@receiver(pre_save, sender=Note)
def give_slug(sender: type[Note], instance: Note, created: bool, **kwargs: Any) -> None:
    """Make the slug of a new note; a note without a title is refused, and nothing is written."""
    if not instance.title.strip():
        raise ValueError("a note needs a title")
    if created and not instance.slug:
        instance.slug = re.sub(r"\W+", "-", instance.title.lower()).strip("-")


@receiver(pre_save, sender=Note, fields={"text"})
def keep_old_text(
    sender: type[Note],
    instance: Note,
    created: bool,
    changes: Mapping[str, Change],
    session: Session,
    **kwargs: Any,
) -> None:
    """Keep what the note said before; in the same flush, so both are committed or neither."""
    if created:
        return
    old = changes["text"].old
    if old is UNSET:  # assigned without having been loaded; the row still says it
        old = session.exec(select(Note.text).where(Note.id == instance.id)).one()
    session.add(OldText(note_id=instance.id, text=old))
