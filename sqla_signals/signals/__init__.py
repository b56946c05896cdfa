"""Signals: the built-in ones, the kinds they are of, and ``@receiver``."""

from .builtin import (
    class_prepared,
    m2m_changed,
    post_bulk,
    post_delete,
    post_init,
    post_migrate,
    post_save,
    pre_bulk,
    pre_delete,
    pre_init,
    pre_migrate,
    pre_save,
    receiver_failed,
)

__all__ = [
    "class_prepared",
    "m2m_changed",
    "post_bulk",
    "post_delete",
    "post_init",
    "post_migrate",
    "post_save",
    "pre_bulk",
    "pre_delete",
    "pre_init",
    "pre_migrate",
    "pre_save",
    "receiver_failed",
]
