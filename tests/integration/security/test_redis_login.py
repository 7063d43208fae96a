"""A Redis that asks for a user, a password and certificates, and lets no command pass but ours."""

from __future__ import annotations

import logging
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from hashlens.errors import InvalidInputError, UnavailableError
from hashlens.types import CollectionSpec, FeatureDtype
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.backup.take import BackupConfig, take
from search_service.config import SearchConfig
from search_service.redis_config import RedisConfig
from search_service.storage import Record, Store, StoreConfig
from search_service.storage.connection import Caller, connect
from tests.integration.security.redis_guard import (
    ADMIN_PASSWORD,
    PASSWORD,
    GuardedRedis,
    documented_rule,
)
from tests.support.certificates import Authority, Pair
from tests.support.redis_server import server_binaries
from tests.support.replicas import replica
from tests.support.stores import DEADLINE_S, make_records, wait_until
from tests.support.tls_proxy import TlsProxy

SPEC = CollectionSpec("photos", "m", 64, 8, FeatureDtype.F16, 1000)


@pytest.fixture(params=server_binaries(), ids=lambda path: path.name)
def guarded(request: pytest.FixtureRequest) -> Iterator[GuardedRedis]:
    with GuardedRedis(request.param) as running:
        running.guard()
        yield running


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def _look(client: redis.Redis) -> Any:
    """Ask what the documented user may ask."""
    return client.exists("hl:collections")


def gets_in(config: RedisConfig) -> bool:
    url = config.store_url()
    assert url is not None
    with connect(url, 5.0) as client:
        return _look(client) == 0


def refused(config: RedisConfig, says: str = "") -> str:
    """What the service says of a Redis that does not let it in.

    Where that is to hold some words, a longer time is given if a busy machine needs it to tell.
    """
    url = config.store_url()
    assert url is not None
    for within_s in (0.5, 5.0, 20.0):
        caller = Caller(url, 5.0)
        with pytest.raises(UnavailableError) as caught:
            caller.run(_look, within_s)
        caller.close()
        assert "hunter2" not in str(caught.value)
        if says in caught.value.message:
            break
    assert says in caught.value.message
    return caught.value.message


def whole_life(config: StoreConfig, folder: Path) -> None:
    """Everything that the service asks of Redis."""
    quick = replace(
        config,
        expire_interval_s=0.05,
        hello_interval_s=0.1,
        discovery_interval_s=0.1,
        checkpoint_interval_s=0.2,
    )
    with replica(replace(quick, data_dir=folder / "a")) as first:
        collection = first.create(SPEC)
        records = make_records(SPEC, 60)
        collection.upsert(records, request_id="r", deadline_s=DEADLINE_S)
        collection.upsert(records, request_id="r", deadline_s=DEADLINE_S)
        collection.delete([records[0].id, "none"], request_id="d", deadline_s=DEADLINE_S)
        dying = Record(
            "dying", records[1].code, records[1].feature, b"", (), int(time.time() * 1e3)
        )
        collection.upsert([dying], request_id="", deadline_s=DEADLINE_S)
        wait_until(lambda: collection.info().n_items == 59, "the item expires")
        collection.checkpoint()
        with replica(replace(quick, data_dir=folder / "b")) as second:
            wait_until(lambda: second.find("photos") is not None, "the other one finds it")
            wait_until(lambda: second.get("photos").info().version >= 62, "it copies and follows")
            receipt = first.compact("photos", wait_for_replicas=True, deadline_s=60)
            assert receipt.redis_rewritten
            assert len(first.replicas("photos")) == 2
            assert {info.spec.name for info in first.list()} == {"photos"}
        assert not collection.verify(threading.Event()).differences
        collection.rebuild(threading.Event())
        wait_until(lambda: first.get("photos").info().durability == "always", "it may ask that")
        collection.checkpoint()
        saved = BackupConfig(data_dir=folder / "a", output=folder / "backup")
        take(saved, ["photos"], lambda line: None)
        first.drop("photos")
        with pytest.raises(Exception, match="photos"):
            first.get("photos")
    restored = RestoreConfig(data_dir=folder / "c", redis_url=config.redis_url)
    put_back(folder / "backup", restored, [], "restored", lambda line: None)
    with Store.open(replace(quick, data_dir=folder / "c")) as store:
        found = store.get("restored")
        wait_until(lambda: found.info().writable, "it can be written")
        assert found.info().n_items == 59


def test_the_documented_rule_is_what_the_service_needs_and_no_more(
    guarded: GuardedRedis, password_file: Path, tmp_path: Path
) -> None:
    login = RedisConfig(
        redis_url=guarded.url, redis_username="hashlens", redis_password_file=password_file
    )
    whole_life(StoreConfig(data_dir=tmp_path, redis_url=login.store_url()), tmp_path)
    with guarded.admin() as client:
        # redis-py introduces itself where it may, which no one needs.
        denied = {entry["object"] for entry in client.acl_log()} - {
            b"client|setinfo",
            "client|setinfo",
        }
        assert denied == set()
        used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
    granted = {word[1:] for word in documented_rule() if word.startswith("+")}
    assert granted <= used, f"granted and never used: {granted - used}"


def test_a_password_comes_from_a_file_and_may_change(
    guarded: GuardedRedis, password_file: Path
) -> None:
    login = RedisConfig(
        redis_url=guarded.url, redis_username="hashlens", redis_password_file=password_file
    )
    assert gets_in(login)
    url = login.store_url()
    assert url is not None
    assert PASSWORD not in url
    password_file.write_text("hunter2-is-wrong")
    refused(login, says="Redis is away")
    password_file.unlink()
    with pytest.raises(InvalidInputError, match="cannot be read"):
        login.store_url()
    caller = Caller(url, 1.0)
    with pytest.raises(UnavailableError, match="cannot be read"):
        caller.run(_look, 5.0)
    # A new one is used without a restart.
    with guarded.admin() as client:
        client.execute_command("ACL", "SETUSER", "hashlens", "resetpass", ">hunter2-the-new")
    password_file.write_text("hunter2-the-new")
    assert caller.run(_look, 5.0) == 0
    caller.close()


def test_the_default_user_has_a_password_only(guarded: GuardedRedis, tmp_path: Path) -> None:
    path = tmp_path / "admin"
    path.write_text(ADMIN_PASSWORD)
    assert gets_in(RedisConfig(redis_url=guarded.url, redis_password_file=path))
    refused(RedisConfig(redis_url=guarded.url), says="Authentication required")
    in_url = f"{guarded.url}?password={ADMIN_PASSWORD}"
    assert gets_in(RedisConfig(redis_url=in_url))
    with pytest.raises(InvalidInputError, match="one of them") as caught:
        gets_in(RedisConfig(redis_url=in_url, redis_password_file=path))
    assert "hunter2" not in str(caught.value)


def test_redis_is_known_by_its_certificate_and_knows_ours(
    guarded: GuardedRedis, authority: Authority, password_file: Path, tmp_path: Path
) -> None:
    client = authority.pair("client")
    stranger = Authority(tmp_path, "strangers").pair("stranger")
    login = RedisConfig(redis_username="hashlens", redis_password_file=password_file, redis_url="")

    def over_tls(url: str, ca: Path | None, pair: Pair | None) -> RedisConfig:
        return replace(
            login,
            redis_url=url,
            redis_tls_ca=ca,
            redis_tls_cert=pair and pair.cert,
            redis_tls_key=pair and pair.key,
        )

    with TlsProxy(guarded.socket, authority.pair("redis"), authority.ca) as proxy:
        assert gets_in(over_tls(proxy.url, authority.ca, client))
        refused(over_tls(proxy.url, None, client), says="CERTIFICATE_VERIFY_FAILED")
        assert refused(over_tls(proxy.url, authority.ca, None))
        assert refused(over_tls(proxy.url, authority.ca, stranger))
        assert refused(replace(login, redis_url=f"redis://127.0.0.1:{proxy.port}"))
        # The certificates are read at each connection.
        caller = Caller(over_tls(proxy.url, authority.ca, client).store_url() or "", 1.0)
        client.cert.write_bytes(stranger.cert.read_bytes())
        with pytest.raises(UnavailableError):
            caller.run(_look, 0.5)
        fresh = authority.pair("fresh")
        client.cert.write_bytes(fresh.cert.read_bytes())
        client.key.write_bytes(fresh.key.read_bytes())
        assert caller.run(_look, 5.0) == 0
        caller.close()
        assert proxy.versions <= {"TLSv1.2", "TLSv1.3"}
    with TlsProxy(guarded.socket, authority.pair("other", "redis.example")) as proxy:
        refused(over_tls(proxy.url, authority.ca, None), says="CERTIFICATE_VERIFY_FAILED")


def test_a_redis_with_tls_of_its_own(
    guarded: GuardedRedis, authority: Authority, password_file: Path
) -> None:
    # It ends at once, and says why: without TLS otherwise than without certificates.
    command = [guarded.binary, "--port", "0", "--tls-port", "1"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    if "configure TLS" not in said:
        pytest.skip(f"{guarded.binary.name} is built without TLS")
    pair, client = authority.pair("redis"), authority.pair("client")
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    settings = {
        "tls-cert-file": pair.cert,
        "tls-key-file": pair.key,
        "tls-ca-cert-file": authority.ca,
        "tls-port": port,
    }
    with guarded.admin() as admin:
        for name, value in settings.items():
            admin.config_set(name, str(value))
    login = RedisConfig(
        redis_url=f"rediss://localhost:{port}",
        redis_username="hashlens",
        redis_password_file=password_file,
        redis_tls_ca=authority.ca,
        redis_tls_cert=client.cert,
        redis_tls_key=client.key,
    )
    assert gets_in(login)
    assert refused(replace(login, redis_tls_cert=None, redis_tls_key=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"redis_username": "x"}, "give redis_url"),
        ({"redis_url": "redis://h", "redis_tls_ca": Path("/dev/null")}, "rediss://"),
        ({"redis_url": "rediss://h", "redis_tls_cert": Path("/dev/null")}, "go together"),
        ({"redis_url": "redis://h", "redis_password_file": Path("/none")}, "cannot be read"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        RedisConfig(**options).store_url()


def test_a_password_that_travels_in_the_open_is_warned_of(
    password_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for url in ("redis://127.0.0.1", "redis://[::1]", "rediss://r.example", "unix:///s"):
        RedisConfig(redis_url=url, redis_password_file=password_file).store_url()
    assert caplog.text == ""
    RedisConfig(redis_url="redis://r.example", redis_password_file=password_file).store_url()
    assert "travels unencrypted" in caplog.text
    caplog.clear()
    RedisConfig(redis_url="redis://:hunter2@r.example").store_url()
    assert "travels unencrypted" in caplog.text
    assert "hunter2" not in caplog.text


def test_no_configuration_shows_a_password(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = "redis://user:hunter2@127.0.0.1:1"
    for shown in (
        repr(SearchConfig(redis_url=url)),
        repr(RestoreConfig(redis_url=url)),
        repr(StoreConfig(data_dir=Path(), redis_url=url)),
        repr(connect(url, 1.0)),
        refused(RedisConfig(redis_url=url)),
        caplog.text,
    ):
        assert "hunter2" not in shown
