"""``autodiscover``: import the modules in which an application connects its receivers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from .errors import InstallError
from .signals.signal import logger


def autodiscover(*packages: str | ModuleType, module: str = "receivers") -> list[ModuleType]:
    """Import each module or package of one name in and below packages, and return them.

    Receivers are connected when their module is imported, so this is the line that an application
    needs in place of an import of each of them. Other modules are not imported, apart from the
    packages on the way. Where there is no such module, a warning is logged.

    :param packages: the application's packages, as names or as modules.
    :param module: what the modules are called.
    :returns: the modules, package by package, from the outside to the inside and then by name.
    :raises InstallError: what was given is a module that is not a package.
    """
    found: list[ModuleType] = []
    for given in packages:
        package = import_module(given) if isinstance(given, str) else given
        if not hasattr(package, "__path__"):
            raise InstallError(
                f"autodiscover({given!r}): {package.__name__} is a module, not a package, so there "
                f"is nothing below it. Give the package in which it is"
            )
        names = list(_names(package.__name__, package.__path__, module))
        if not names:
            logger.warning(
                "autodiscover(%r): there is no module named %r in %s or below it, so no receivers "
                "were connected",
                given,
                module,
                package.__name__,
            )
        found += map(import_module, names)
    return found


def _names(package: str, path: Iterable[str], module: str) -> Iterator[str]:
    """Find modules by their names, without importing the packages in which they may be."""
    inside: list[tuple[str, Any]] = []
    for finder, name, is_package in iter_modules(path):
        if name == module:
            yield f"{package}.{name}"
        elif is_package:
            inside.append((name, finder))
    for name, finder in inside:
        spec = finder.find_spec(name)
        yield from _names(f"{package}.{name}", spec.submodule_search_locations, module)
