"""Files of tokens: what they may hold, what is found in them, and what happens when they change."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import pytest

from hashlens.errors import InvalidInputError
from hashlens.rpc import watched
from hashlens.rpc.scopes import SCOPES, Scope, is_open, scope_of
from hashlens.rpc.tokens import Tokens, checked_token, parse_tokens
from tests.support.secured import METHODS, path_of

READER = "a" * 32
WRITER = "b" * 32
HASH_OF_WRITER = hashlib.sha256(WRITER.encode()).hexdigest()


def test_every_method_has_a_scope_and_no_other_has_one() -> None:
    listed = {
        f"/{service}/{name}"
        for service, names in SCOPES.items()
        for name in names
        if service.startswith("hashlens.")
    }
    assert listed == {path_of(method) for method in METHODS}
    assert all(scope_of(path_of(method)) is not None for method in METHODS)


def test_the_documents_say_which_scope_a_method_needs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    documented = {
        (scope, method)
        for scope in Scope
        for row in re.findall(rf"^\| `{scope.name.lower()}` \| (.*) \|$", text, re.MULTILINE)
        for method in re.findall(r"`(\w+)`", row)
    }
    shared = {(s, m) for n, of in SCOPES.items() if "hashlens" in n for m, s in of.items()}
    between_replicas = {(Scope.ADMIN, "ListFiles"), (Scope.ADMIN, "ReadFile")}
    assert documented == shared - between_replicas


def test_what_is_not_in_the_table_has_no_scope() -> None:
    assert scope_of("/hashlens.v1.SearchService/Sear") is None
    assert scope_of("/hashlens.v1.SearchService/") is None
    assert scope_of("Search") is None
    assert scope_of("") is None


def test_only_health_is_open() -> None:
    assert is_open("/grpc.health.v1.Health/Check")
    assert not is_open("/grpc.health.v1.Healthy/Check")
    assert not is_open("/hashlens.v1.SearchService/grpc.health.v1.Health/Check")
    assert not any(is_open(path_of(method)) for method in METHODS)


def test_tokens_are_given_as_they_are_or_hashed(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(
        f"# who may what\n\nread {READER} web\r\n  write sha256:{HASH_OF_WRITER.upper()}\n"
    )
    tokens = Tokens(path)
    reader, writer = tokens.find(READER), tokens.find(WRITER)
    assert reader is not None
    assert (reader.scope, reader.name) == (Scope.READ, "web")
    assert writer is not None
    assert (writer.scope, writer.name) == (Scope.WRITE, "of line 4")
    for wrong in ("", "a", READER + "a", READER[:-1], f"sha256:{HASH_OF_WRITER}", HASH_OF_WRITER):
        assert tokens.find(wrong) is None
    assert tokens.find("\udcff") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no token"),
        (b"# nothing\n", "no token"),
        (b"read\n", "line 1 is not SCOPE TOKEN"),
        (b"\nread %s a b\n" % READER.encode(), "line 2 is not SCOPE TOKEN"),
        (b"reed %s\n" % READER.encode(), "read, write or admin; a line is SCOPE TOKEN"),
        (b"read short-secret\n", "fewer than 32"),
        (b"read sha256:abcd\n", "64 hex digits"),
        (b"read %s\xff\n" % READER.encode(), "not UTF-8"),
        (b"read %s,\n" % READER.encode(), "other characters"),
        (b"read %s\nwrite %s\n" % (READER.encode(), READER.encode()), "line 2.*there already"),
        (
            b"read %s\nwrite sha256:%s\n" % (WRITER.encode(), HASH_OF_WRITER.encode()),
            "there already",
        ),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_not_repeated(content: bytes, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as caught:
        parse_tokens(content)
    assert READER not in str(caught.value)
    assert "short-secret" not in str(caught.value)


def test_a_grant_does_not_show_its_token() -> None:
    (grant,) = parse_tokens(f"read {READER} web".encode())
    assert READER not in repr(grant)
    assert grant.digest.hex() not in repr(grant)
    assert repr(grant.digest) not in repr(grant)


def test_all_entries_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text("".join(f"read {letter * 32}\n" for letter in "abc"))
    tokens = Tokens(path)
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr("hashlens.rpc.tokens.hmac.compare_digest", compare)
    for token in ("a" * 32, "b" * 32, "c" * 32, "d" * 32):
        compared.clear()
        tokens.find(token)
        assert len(compared) == 3


def test_a_change_is_seen_and_a_broken_one_keeps_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.0)
    caplog.set_level(logging.INFO)
    path = tmp_path / "tokens"
    path.write_text(f"read {READER}\nread {WRITER}\n")
    tokens = Tokens(path)
    path.write_text(f"write {WRITER}\n")
    assert tokens.find(READER) is None
    grant = tokens.find(WRITER)
    assert grant is not None
    assert grant.scope is Scope.WRITE
    assert "read again" in caplog.text

    for broken in (b"", b"read hunter2\n", None):
        caplog.clear()
        path.unlink() if broken is None else path.write_bytes(broken)
        assert tokens.find(WRITER) == grant
        assert tokens.find(WRITER) == grant
        assert caplog.text.count("stays in use") == 1
        assert "hunter2" not in caplog.text
    path.write_text(f"admin {READER}\n")
    assert tokens.find(WRITER) is None


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"caf\xc3\xa9", b"a\nb", b"x\x00"])
def test_a_client_has_one_token(content: bytes) -> None:
    with pytest.raises(InvalidInputError):
        checked_token(content)
    assert checked_token(b"secret-Token_1~+/==\r\n") == "secret-Token_1~+/=="


def test_a_pipe_is_no_file_that_can_be_read_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="no regular file"):
        Tokens(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        Tokens(tmp_path / "none")


def test_what_is_being_written_waits_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watched, "LOOK_S", 0.0)
    path = tmp_path / "tokens"
    path.write_text(f"read {READER}\n")
    growing = iter(range(100))

    def parse(content: bytes) -> bytes:
        if b"growing" in content:
            path.write_bytes(content + b"%d" % next(growing))  # Somebody writes meanwhile.
            raise InvalidInputError("half of it")
        return content

    value = watched.Watched("the file", [path], parse)
    before = value.value
    path.write_text("growing")
    assert value.value == before
    assert caplog.text == ""
    path.write_text("whole")
    assert value.value == b"whole"
