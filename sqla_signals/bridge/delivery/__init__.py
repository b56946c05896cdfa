"""Calls after the end of a transaction."""
