"""A small shop: plain SQLAlchemy models, and the receivers that keep its rules."""
