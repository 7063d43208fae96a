"""Bearer tokens: the file that says which there are, and who has shown one.

A line of the file is ``SCOPE TOKEN [NAME]``: what the token allows (`Scope`), the token itself or
``sha256:`` and the 64 hex digits of its SHA-256, and a name for messages. Blank lines and those
that begin with ``#`` are skipped.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hashlens.errors import InvalidInputError
from hashlens.rpc.scopes import Scope
from hashlens.rpc.watched import Watched

MIN_TOKEN_CHARACTERS: Final = 32
"""Shorter tokens are refused: one of 32 hex digits has 128 bits that nobody guesses."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750, section 2.1
_MAX_TOKEN_CHARACTERS: Final = 4096
_HASHED: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_ADVICE: Final = "`openssl rand -hex 32` makes a good one"
_FORM: Final = "a line is SCOPE TOKEN [NAME]"
_HASH: Final = "`sha256sum` prints them, of the token without a line break"


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token allows."""

    scope: Scope
    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the token."""


def checked_token(content: bytes) -> str:
    """Return the one token that a client's file holds.

    Raises
    ------
    InvalidInputError
        It holds something else. The message does not repeat it.
    """
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not _TOKEN.fullmatch(token) or len(token) > _MAX_TOKEN_CHARACTERS:
        raise InvalidInputError(
            "the token file must hold one token and nothing else: letters, digits and -._~+/= .",
            field="token_file",
        )
    return token


def parse_tokens(content: bytes) -> tuple[Grant, ...]:
    """Read a server's file of tokens.

    Raises
    ------
    InvalidInputError
        A line cannot be read, or no token is there. The message has the line's number, and nothing
        of what it holds.
    """
    grants: list[Grant] = []
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            words = raw.decode("utf-8").split()
        except UnicodeDecodeError:
            raise _bad_line(number, "is not UTF-8") from None
        if not words or words[0].startswith("#"):
            continue
        grant = _grant_of(number, words)
        if any(hmac.compare_digest(grant.digest, other.digest) for other in grants):
            raise _bad_line(number, "has a token that is there already")
        grants.append(grant)
    if not grants:
        raise InvalidInputError(
            "there is no token in it, so nobody could call. A line is SCOPE TOKEN [NAME].",
            field="tokens",
        )
    return tuple(grants)


class Tokens:
    """The tokens that a server accepts, as its file says. Thread-safe.

    Raises
    ------
    InvalidInputError
        The file cannot be read or used. Later on that is logged, and the tokens stay as they were.
    """

    def __init__(self, path: Path) -> None:
        self._grants = Watched(f"the tokens in {path}", [path], parse_tokens)

    def find(self, token: str) -> Grant | None:
        """Return what a token allows; None if it is none of ours.

        How long it takes does not depend on what is right about the token: hashes are compared, in
        constant time, and always all of them.
        """
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for grant in self._grants.value:
            if hmac.compare_digest(grant.digest, digest):
                found = grant
        return found


def _grant_of(number: int, words: list[str]) -> Grant:
    if not 2 <= len(words) <= 3:
        raise _bad_line(number, "is not SCOPE TOKEN [NAME]", "a scope is read, write or admin")
    try:
        scope = Scope[words[0].upper()]
    except KeyError:
        raise _bad_line(number, "does not begin with read, write or admin", _FORM) from None
    name = words[2] if len(words) == 3 else f"of line {number}"
    if words[1].startswith("sha256:"):
        hashed = _HASHED.fullmatch(words[1])
        if hashed is None:
            raise _bad_line(number, "has a sha256: without 64 hex digits", _HASH)
        return Grant(scope, name, bytes.fromhex(hashed[1]))
    if not _TOKEN.fullmatch(words[1]):
        raise _bad_line(number, "has a token of other characters than letters, digits and -._~+/=")
    if not MIN_TOKEN_CHARACTERS <= len(words[1]) <= _MAX_TOKEN_CHARACTERS:
        raise _bad_line(
            number, f"has a token of fewer than {MIN_TOKEN_CHARACTERS} characters or too many"
        )
    return Grant(scope, name, hashlib.sha256(words[1].encode()).digest())


def _bad_line(number: int, what: str, advice: str = _ADVICE) -> InvalidInputError:
    return InvalidInputError(f"line {number} {what}; {advice}.", field="tokens")
