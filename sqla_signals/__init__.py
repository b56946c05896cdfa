"""Django-style model signals for SQLAlchemy."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """Import SQLAlchemy when a name is first asked for, and not for the pytest plugin alone."""
        from importlib import import_module

        public = import_module(f"{__name__}.public")
        # While that module is being imported it has no __all__, and nothing is to be had from it.
        if name != "__all__" and name not in getattr(public, "__all__", ()):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(public, name)
        return found

    def __dir__() -> list[str]:
        """All that can be imported from here."""
        return sorted({*globals(), *__getattr__("__all__")})
