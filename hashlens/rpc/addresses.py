"""Which addresses nobody else can reach."""

from __future__ import annotations

import ipaddress


def is_loopback(address: str) -> bool:
    """Tell whether ``host:port`` is surely reached from this machine only.

    True for numeric loopback addresses and ``localhost``. False for wildcards, for every other
    name, whatever it means today, and for what is no such address.
    """
    host = address.rpartition(":")[0]
    if host == "localhost":
        return True
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
