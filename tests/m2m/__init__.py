"""Signals of many-to-many relationships."""
