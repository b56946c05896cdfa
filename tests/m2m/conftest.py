"""The databases and the log of statements that the tests of the flush have."""

from tests.contract.conftest import async_engine, statements

__all__ = ["async_engine", "statements"]
