"""SQLAlchemy's events in, our signals out."""
