"""The parts of :func:`sqla_signals.trace`."""
