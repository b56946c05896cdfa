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
        from importlib.util import find_spec

        # `from . import mapping` asks for the attribute first: importlib._bootstrap,
        # _handle_fromlist(). All the rest may import that module, so it is not imported for it.
        if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        public = import_module(f"{__name__}.public")
        if name != "__all__" and name not in public.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(public, name)
        return found

    def __dir__() -> list[str]:
        """All that can be imported from here."""
        return sorted({*globals(), *__getattr__("__all__")})
