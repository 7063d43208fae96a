"""Which optional part of the installation a command needs, and what to say if it is missing."""

from __future__ import annotations

from importlib.util import find_spec

from hashlens.errors import PreconditionError

EXTRAS = {
    "encoder": ("torch", "torchvision", "PIL", "safetensors"),
    "search": ("numba", "redis"),
    "arrow": ("pyarrow",),
}
"""Extra of the distribution -> top-level modules that it brings."""


def require(*extras: str, purpose: str) -> None:
    """Raise PreconditionError unless the modules of the named extras are installed.

    Nothing is imported: torch alone takes seconds.

    Parameters
    ----------
    *extras
        Keys of `EXTRAS`.
    purpose
        What needs them, as the beginning of the message.
    """
    lacking = {
        extra: missing
        for extra in extras
        if (missing := [module for module in EXTRAS[extra] if find_spec(module) is None])
    }
    if lacking:
        modules = ", ".join(module for missing in lacking.values() for module in missing)
        raise PreconditionError(
            f"{purpose} needs {modules}: pip install 'hashlens[{','.join(lacking)}]'"
        )


def advice_for(error: ImportError) -> str:
    """Return what to install for an import that failed."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return f"needs {module}: pip install 'hashlens[{extra}]'"
    return f"cannot be imported: {error}"
