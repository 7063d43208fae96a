"""Hashlens: image retrieval by learned binary codes.

What both services and their users share. `Client` and `AsyncClient` are the way in::

    from hashlens import Client

    with Client() as client:
        for hit in client.search("photos", image=path.read_bytes(), k=20).hits:
            print(hit.id, hit.hamming_bits, hit.distance)
"""

from __future__ import annotations

__version__ = "0.1.0"
