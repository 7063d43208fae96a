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
    try:
        # Without brackets, what is port and what is address is anybody's guess.
        if host.startswith("[") and host.endswith("]"):
            return ipaddress.IPv6Address(host[1:-1]).is_loopback
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
