"""A shop in Flask, with Flask-SQLAlchemy 3: its mail waits for the commit of the request.

`app.py`, `database.py` and `mail.py` are an application without signals. `receivers.py` and two
lines of `main.py` add them.
"""
