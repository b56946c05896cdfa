"""The application with its signals: `flask --app examples.flask_shop.main run`."""

import sqla_signals
from examples.flask_shop import receivers as receivers  # connects them
from examples.flask_shop.app import create_app as create_app
from examples.flask_shop.database import db

sqla_signals.install(db)
