"""Real certificates for tests, in files as an operator has them."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import trustme

from hashlens.rpc.channel import ChannelSecurity


@dataclass(frozen=True)
class Pair:
    """A certificate's file and its key's."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is the file of its own."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self.directory = directory
        self._authority = trustme.CA()
        self.ca = directory / f"{name}.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    @property
    def pem(self) -> bytes:
        return self._authority.cert_pem.bytes()

    def pair(self, name: str, *hosts: str, expired: bool = False) -> Pair:
        """Write a new certificate for localhost, or for other hosts, and its key."""
        now = datetime.datetime.now(datetime.UTC)
        issued = self._authority.issue_cert(
            *(hosts or ("localhost", "127.0.0.1")),
            not_before=now - datetime.timedelta(days=2),
            not_after=now + datetime.timedelta(days=-1 if expired else 1),
        )
        pair = Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        pair.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        pair.key.write_bytes(issued.private_key_pem.bytes())
        return pair

    def security(self, pair: Pair | None = None, **others: object) -> ChannelSecurity:
        """How a client knows servers of this authority."""
        return ChannelSecurity(
            tls_ca=self.ca,
            tls_cert=None if pair is None else pair.cert,
            tls_key=None if pair is None else pair.key,
            **others,  # type: ignore[arg-type]
        )


class Mount:
    """A pair in a directory as Kubernetes mounts a secret: behind a link that is swapped."""

    def __init__(self, directory: Path, first: Pair) -> None:
        self._directory = directory
        self._n = 0
        directory.mkdir()
        self.pair = Pair(directory / "tls.crt", directory / "tls.key")
        self.swap(first)
        for path in (self.pair.cert, self.pair.key):
            path.symlink_to(Path("..data", path.name))

    def swap(self, pair: Pair) -> None:
        """Let the names lead to another pair, in one step."""
        self._n += 1
        version = self._directory / f"..{self._n}"
        version.mkdir()
        shutil.copy(pair.cert, version / "tls.crt")
        shutil.copy(pair.key, version / "tls.key")
        link = self._directory / "..new"
        link.symlink_to(version.name)
        os.replace(link, self._directory / "..data")  # noqa: PTH105 - what the kubelet calls
