"""Notes in SQLModel, which get a slug and keep what they said before.

`models.py` is plain SQLModel; `receivers.py` has the rules.
"""
