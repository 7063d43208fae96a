"""Other replicas' files, over gRPC: a `search_service.storage.peers.Peers`."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator

import grpc

from hashlens.errors import UnavailableError
from hashlens.rpc.channel import CallMetadata, ChannelSecurity, connect
from hashlens.rpc.status import error_of_call
from hashlens.v1 import replica_service_pb2 as rpb
from hashlens.v1 import replica_service_pb2_grpc as rpb_grpc
from search_service.storage.peers import Listing


class GrpcPeers:
    """Asks other replicas. Thread-safe; for a thread that may wait, not for the event loop.

    Parameters
    ----------
    max_message_bytes
        Largest reply.
    security
        How other replicas are known, and what is shown to them.
    list_s
        Time for a list of files, the peer's checkpoint included, in seconds.
    read_s
        Time for one call that reads a file, in seconds. A longer file takes several.
    """

    def __init__(
        self,
        max_message_bytes: int,
        security: ChannelSecurity,
        *,
        list_s: float = 30.0,
        read_s: float = 20.0,
    ) -> None:
        self._security = security
        self._metadata = CallMetadata(security)
        self._options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.enable_retries", 0),
        ]
        self._list_s = list_s
        self._read_s = read_s
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}
        self._closed = False

    def list_files(self, address: str, collection: str, epoch: str, min_version: int) -> Listing:
        """See `Peers.list_files`."""
        request = rpb.ListFilesRequest(collection=collection, epoch=epoch, min_version=min_version)
        try:
            reply = self._stub(address).ListFiles(
                request, timeout=self._list_s, metadata=self._metadata()
            )
        except grpc.RpcError as failure:
            raise error_of_call(failure) from None
        except ValueError:  # The channel was closed meanwhile.
            raise _closing() from None
        return Listing(reply.manifest, reply.lease)

    def read_file(self, address: str, lease: str, name: str, offset: int) -> Iterator[bytes]:
        """See `Peers.read_file`."""
        request = rpb.ReadFileRequest(lease=lease, name=name, offset=offset)
        try:
            call = self._stub(address).ReadFile(
                request, timeout=self._read_s, metadata=self._metadata()
            )
        except ValueError:
            raise _closing() from None
        try:
            for part in call:
                data = part.data
                if zlib.crc32(data) != part.crc32:
                    raise UnavailableError(f"A part of {name} was damaged on the way.")
                yield data
        except grpc.RpcError as failure:
            raise error_of_call(failure) from None
        finally:
            call.cancel()

    def close(self) -> None:
        """End all calls at once."""
        with self._lock:
            self._closed = True
            channels = list(self._channels.values())
        for channel in channels:
            channel.close()

    def _stub(self, address: str) -> rpb_grpc.ReplicaServiceStub:
        with self._lock:
            if self._closed:
                raise _closing()
            channel = self._channels.get(address)
            if channel is None:
                channel = connect(address, self._options, self._security)
                self._channels[address] = channel
        return rpb_grpc.ReplicaServiceStub(channel)


def _closing() -> UnavailableError:
    return UnavailableError("This replica is stopping.")
