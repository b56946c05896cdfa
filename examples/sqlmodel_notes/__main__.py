"""A note is written, rewritten and refused: `python -m examples.sqlmodel_notes`."""

from sqlmodel import Session, SQLModel, create_engine, select

import sqla_signals
from examples import show
from examples.sqlmodel_notes import receivers as receivers  # connects them
from examples.sqlmodel_notes.models import Note, OldText


def main(url: str) -> None:
    """Write notes into the empty database at `url`, and leave them there."""
    sqla_signals.install()
    engine = create_engine(url)
    SQLModel.metadata.create_all(engine)
    with Session(engine) as session:
        show.heading("A new note gets its slug")
        note = Note(title="Signals & SQLModel", text="First draft")
        session.add(note)
        session.commit()
        show.line(note.slug)

        show.heading("A new text keeps the old one")
        note.text = "Second draft"
        session.commit()
        show.table(["old text"], [[text] for text in session.exec(select(OldText.text))])

        show.heading("A note without a title is refused")
        session.add(Note(title=" "))
        try:
            session.commit()
        except ValueError as refusal:
            session.rollback()
            show.line(f"ValueError: {refusal}")
    engine.dispose()


if __name__ == "__main__":
    main("sqlite://")
