"""The databases and the log of statements that the contract's tests have."""

from tests.contract.conftest import async_engine, statements

__all__ = ["async_engine", "statements"]
