"""Orders over HTTP: FastAPI, an AsyncSession, and e-mails that wait for the commit.

`app.py`, `database.py`, `models.py`, `router.py`, `payments.py` and `emails.py` are an application
without signals. `receivers.py` and two lines of `main.py` add them.
"""
