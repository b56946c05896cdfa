"""The tables, in plain SQLModel: nothing here knows about signals."""

from sqlmodel import Field, Relationship, SQLModel


class Note(SQLModel, table=True):
    """A note; its slug is made from its first title and stays, so that links to it do."""

    id: int | None = Field(default=None, primary_key=True)
    title: str
    text: str = ""
    slug: str = Field(default="", unique=True)

    old_texts: list["OldText"] = Relationship(cascade_delete=True)


class OldText(SQLModel, table=True):
    """What a note said before."""

    id: int | None = Field(default=None, primary_key=True)
    note_id: int = Field(foreign_key="note.id")
    text: str
