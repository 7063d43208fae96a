"""A Redis that lets in who has a login, and no command pass but those that the documents allow."""

from __future__ import annotations

import re
from pathlib import Path

import redis

from tests.support.redis_server import RedisServer

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"
PASSWORD = "hunter2-of-hashlens"
ADMIN_PASSWORD = "hunter2-of-the-admin"


def documented_rule() -> list[str]:
    """The ACL rule that docs/operations.md gives, without the user's name and password."""
    (rule,) = re.findall(
        r"^ACL SETUSER hashlens on '>PASSWORD' (.*)$", OPERATIONS.read_text(), re.M
    )
    return str(rule).split()


class GuardedRedis(RedisServer):
    """A server whose default user has a password, with the documented user beside."""

    def guard(self) -> None:
        with self.client() as client:
            rule = documented_rule()
            client.execute_command("ACL", "SETUSER", "hashlens", "on", f">{PASSWORD}", *rule)
            client.execute_command("CONFIG", "RESETSTAT")
            client.execute_command("ACL", "SETUSER", "default", "resetpass", f">{ADMIN_PASSWORD}")

    def admin(self) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.socket),
            password=ADMIN_PASSWORD,
            protocol=2,
            socket_timeout=10,
        )
