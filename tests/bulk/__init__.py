"""Statements about many rows."""
