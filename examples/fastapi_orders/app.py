"""The application, complete without signals."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from examples.fastapi_orders.database import open_database
from examples.fastapi_orders.router import router


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Keep the database open as long as the application runs."""
    async with open_database() as session_factory:
        app.state.session_factory = session_factory
        yield


def create_app() -> FastAPI:
    """Make the application; it opens its database when it starts."""
    app = FastAPI(title="Orders", lifespan=lifespan)
    app.include_router(router)
    return app
