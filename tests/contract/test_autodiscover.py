"""``autodiscover``: an application's receivers are connected by one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sqla_signals import InstallError, autodiscover, post_save

CONNECT = """
from sqla_signals import post_save, receiver


@receiver(post_save, name=__name__)
def connected(sender, **kwargs): ...
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of an application, in which some modules have receivers."""
    files = {
        "__init__.py": "",
        "models.py": "raise AssertionError('nobody asked for this module')",
        "receivers.py": CONNECT,
        "orders/__init__.py": "",
        "orders/receivers/__init__.py": CONNECT,
        "orders/receivers/other.py": "raise AssertionError('nor for this one')",
        "stock/__init__.py": "raise AssertionError('nor for a package without receivers')",
        "stock/levels/__init__.py": "",
        "users/__init__.py": "",
        "users/accounts/__init__.py": "",
        "users/accounts/receivers.py": CONNECT,
        "users/accounts/hooks.py": CONNECT,
    }
    for name, text in files.items():
        path = tmp_path / "found_shop" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "found_shop"
    for name in [name for name in sys.modules if name.split(".")[0] == "found_shop"]:
        del sys.modules[name]


def connected() -> list[str]:
    """The receivers that there are, by the names that they were given."""
    return [one.name for one in post_save.table.receivers]


EVERYWHERE = [
    "found_shop.receivers",
    "found_shop.orders.receivers",
    "found_shop.users.accounts.receivers",
]


@pytest.mark.parametrize("as_module", [False, True])
def test_autodiscover_imports_each_module_of_that_name_and_nothing_else(
    shop: Path, as_module: bool
):
    """In the package and below it, at any depth, as modules or as packages."""
    given: Any = __import__("found_shop") if as_module else "found_shop"
    found = autodiscover(given)
    assert [module.__name__ for module in found] == EVERYWHERE
    assert all(isinstance(module, ModuleType) for module in found)
    assert connected() == EVERYWHERE
    assert autodiscover(given) == found  # imported once, so connected once
    assert connected() == EVERYWHERE


def test_autodiscover_takes_another_name_and_several_packages(shop: Path):
    """In the order in which they are given."""
    found = autodiscover("found_shop.users", "found_shop.orders", module="hooks")
    assert [module.__name__ for module in found] == ["found_shop.users.accounts.hooks"]
    found = autodiscover("found_shop.users", "found_shop.orders")
    assert [module.__name__ for module in found] == EVERYWHERE[:0:-1]


def test_autodiscover_warns_where_there_is_nothing(shop: Path, caplog: pytest.LogCaptureFixture):
    """A misspelt module is not passed over in silence."""
    with caplog.at_level(logging.WARNING, "sqla_signals"):
        assert autodiscover("found_shop", module="recievers") == []
    assert "no module named 'recievers' in found_shop" in caplog.text


def test_autodiscover_refuses_a_module_that_is_no_package(shop: Path):
    """There is nothing below it."""
    with pytest.raises(InstallError, match=r"found_shop\.receivers is a module, not a package"):
        autodiscover("found_shop.receivers")


def test_an_error_in_a_module_that_autodiscover_imports_is_raised(shop: Path):
    """As by an import."""
    (shop / "orders" / "receivers" / "__init__.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        autodiscover("found_shop")
