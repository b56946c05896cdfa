"""Runnable examples: `python -m examples.shop`, `examples.optuna_watch`, `examples.fastapi_orders`.

They are written for SQLAlchemy 2.0.22 or newer.
"""
