"""Files of collections between replicas, over gRPC.

The store decides what is copied and when (`search_service.storage.resync`), and checks what comes;
this package only carries it: `servicer` out, `client` in.
"""
