"""Receivers for an application that somebody else wrote: Optuna."""
