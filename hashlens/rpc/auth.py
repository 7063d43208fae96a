"""Callers are known by a bearer token, and allowed what its scope says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import grpc

from hashlens.errors import PermissionDeniedError, UnauthenticatedError
from hashlens.rpc.refusal import Handler, refusing
from hashlens.rpc.scopes import Scope, is_open, scope_of
from hashlens.rpc.tokens import Grant, Tokens

_SCHEME: Final = "bearer "


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses who is not known or not allowed, before anything of the request is read.

    Parameters
    ----------
    tokens
        Who is known.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Pass the call on, or refuse it."""
        method = handler_call_details.method
        if is_open(method):
            return await continuation(handler_call_details)
        found = self._grant(handler_call_details)
        if isinstance(found, UnauthenticatedError):
            return refusing(lambda: found)
        needed = scope_of(method)
        if needed is None:
            # UNIMPLEMENTED, as a rule; else something that nobody has thought about here.
            handler = await continuation(handler_call_details)
            if handler is None or found.scope >= Scope.ADMIN:
                return handler
            needed = Scope.ADMIN
        if found.scope < needed:
            return refusing(lambda: _denied(method, needed, found))
        return await continuation(handler_call_details)

    def _grant(self, call: grpc.HandlerCallDetails) -> Grant | UnauthenticatedError:
        """Return what the caller's token allows, or why there is none."""
        given = [value for key, value in call.invocation_metadata or () if key == "authorization"]
        if not given:
            return UnauthenticatedError(
                "this server wants to know who calls: send a token (token_file of the clients, "
                "--token-file of the commands, else `authorization: Bearer TOKEN`)"
            )
        value = given[0]
        if len(given) > 1 or not isinstance(value, str) or not value.lower().startswith(_SCHEME):
            return UnauthenticatedError("authorization must be given once, as `Bearer TOKEN`")
        grant = self._tokens.find(value[len(_SCHEME) :].strip())
        if grant is None:
            return UnauthenticatedError("the token is none of this server's: ask for a new one")
        return grant


def _denied(method: str, needed: Scope, grant: Grant) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"{method} needs a token with the scope {needed.name.lower()}; the token {grant.name} has "
        f"{grant.scope.name.lower()}"
    )


def access(tokens: Path | None) -> list[grpc.aio.ServerInterceptor]:
    """Return the interceptors that ask callers for one of the tokens of a file; None for no file.

    Raises
    ------
    InvalidInputError
        The file cannot be used.
    """
    return [] if tokens is None else [AuthInterceptor(Tokens(tokens))]
