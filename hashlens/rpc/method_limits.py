"""How many calls of each method may be in the works: what a service says, and who runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from google.protobuf import descriptor_pool

from hashlens.errors import InvalidInputError


def parse(text: str) -> dict[str, int]:
    """Return the limits that a text such as ``Search=256,Encode=512`` sets, by method.

    Raises
    ------
    InvalidInputError
        It is not of that form, or a limit is below 1.
    """
    limits: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if not name or not number.isdecimal() or int(number) < 1:
            raise InvalidInputError(
                f"method_limits is Method=N,..., with N at least 1, not {part!r}",
                field="method_limits",
            )
        limits[name] = int(number)
    return limits


def resolve(
    services: Sequence[str], defaults: Mapping[str, int], overrides: Mapping[str, int]
) -> dict[str, int]:
    """Return the limit of each method of some services, by its full path.

    Parameters
    ----------
    services
        Their full names; the contract is known to protobuf.
    defaults
        By method, such as ``Search``; one for each of the services' methods.
    overrides
        Likewise, for some.

    Raises
    ------
    InvalidInputError
        There is no method of that name.
    """
    pool = descriptor_pool.Default()
    paths = {
        method.name: f"/{service}/{method.name}"
        for service in services
        for method in pool.FindServiceByName(service).methods
    }
    for name in overrides:
        if name not in paths:
            raise InvalidInputError(
                f"method_limits: there is no method {name} here, but {', '.join(sorted(paths))}",
                field="method_limits",
            )
    return {path: overrides.get(name, defaults[name]) for name, path in paths.items()}
