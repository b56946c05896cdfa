"""Runnable examples, one folder each: `python -m examples.shop`.

Plain SQLAlchemy: `shop`. With a framework: `flask_shop`, `fastapi_orders`, `sqlmodel_notes`,
`optuna_watch`. With migrations: `migrated_app`. With a relay and Celery: `durable_shop`.
"""
