"""The application with its signals: `uvicorn examples.fastapi_orders.main:app`."""

import sqla_signals
from examples.fastapi_orders import receivers as receivers  # connects them
from examples.fastapi_orders.app import create_app

sqla_signals.install()
app = create_app()
