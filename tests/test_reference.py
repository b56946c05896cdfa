"""The reference has every public name, and no other says it has."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
PUBLIC = [
    "sqla_signals",
    "sqla_signals.alembic",
    "sqla_signals.celery",
    "sqla_signals.durable",
    "sqla_signals.opentelemetry",
    "sqla_signals.pytest_plugin",
    "sqla_signals.testing",
]


def described() -> set[str]:
    """The full names that a directive in a page of the reference has."""
    names = set()
    for page in REFERENCE.glob("*.md"):
        module = ""
        for kind, name in re.findall(r"^\.\. (\w+):: ([\w.]+)", page.read_text("utf-8"), re.M):
            if kind == "currentmodule":
                module = name
            else:
                names.add(name if name.startswith("sqla_signals.") else f"{module}.{name}")
    return names


def public_names(module: ModuleType) -> set[str]:
    """What `__all__` lists; without it, what the module itself defines and does not hide."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return set(listed)
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith(("_", "pytest_"))  # pytest calls its hooks, nobody else
        and getattr(value, "__module__", "") == module.__name__
    }


def found(full_name: str) -> object:
    """What a user gets who imports it."""
    module, _, name = full_name.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(name: str) -> None:
    """If not under that name, then under another that it can be imported by."""
    objects = {id(found(full_name)) for full_name in described()}
    names = {f"{name}.{public}" for public in public_names(import_module(name))}
    assert names
    missing = {
        full_name for full_name in names - described() if id(found(full_name)) not in objects
    }
    assert missing == set()


def test_what_the_reference_describes_is_there_to_import() -> None:
    """A name that was renamed or dropped leaves no description behind."""
    for full_name in described():
        found(full_name)


def test_an_exception_or_warning_of_the_core_is_a_public_name() -> None:
    """So that whoever meets it can catch or filter it by importing the package."""
    import sqla_signals
    from sqla_signals import errors

    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    defined = {name for name in defined if getattr(errors, name).__module__ == errors.__name__}
    assert defined - set(sqla_signals.__all__) == set()
