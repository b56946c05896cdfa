"""Runnable examples: `python -m examples.shop` and `python -m examples.optuna_watch`.

They are written for SQLAlchemy 2.0.22 or newer.
"""
