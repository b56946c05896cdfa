"""What ``sqla-signals explain`` imports in a process of its own."""

from __future__ import annotations

import sqla_signals
from sqla_signals import post_save, pre_save, receiver

from .clinic import Patient

installation = sqla_signals.install()


@receiver(pre_save, sender=Patient, name="clinic.weigh")
def weigh(sender, instance, **kwargs):
    pass


@receiver(post_save, sender="Patiend", on="commit", name="clinic.write")
def write(sender, instance, **kwargs):
    pass


models = __import__(Patient.__module__, fromlist=["Patient"])
