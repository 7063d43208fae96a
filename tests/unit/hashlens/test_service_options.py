"""What an operator mistypes is refused with one line; what is secret is not repeated."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from encoder_service.__main__ import main as encoder_main
from hashlens.errors import InvalidInputError
from search_service.__main__ import main as search_main
from search_service.storage.connection import connect


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-queue", "0"], "at least 1"),
        (["--max-queue", "many"], "not a valid integer"),
        (["--n-threads", "-1"], "0 or more"),
        (["--listen", "localhost"], "host:port"),
        (["--listen", "localhost:port"], "host:port"),
        (["--log-level", "loud"], "loud"),
        (["--max-message-bytes", "0"], "above 0"),
        (["--grace-s", "-1"], "0 or more"),
        (["--listen", "0.0.0.0:1"], "say --insecure"),
        (["--listen", "search.example:1"], "Give --tls-cert and --tls-key"),
        (["--tls-cert", "tls.crt"], "go together"),
        (["--tls-client-ca", "ca.crt"], "needs tls_cert"),
        (["--log-level", "nope"], "debug, info, warning, error or critical"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_is_one_line(arguments: list[str], words: str) -> None:
    for command in (encoder_main, search_main):
        result = CliRunner().invoke(command, arguments)
        assert result.exit_code == 2
        assert words in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize("value", ["abc", "g" * 64, "a" * 63, "sha256:" + "a" * 64])
def test_a_checkpoint_is_pinned_by_64_hex_digits(value: str) -> None:
    result = CliRunner().invoke(encoder_main, ["--checkpoint-sha256", value])
    assert result.exit_code == 2
    assert "64 hex digits" in result.output


def test_a_bad_redis_url_is_not_repeated() -> None:
    with pytest.raises(InvalidInputError) as caught:
        connect("foo://:hunter2@host", 1.0)
    assert "hunter2" not in str(caught.value)
