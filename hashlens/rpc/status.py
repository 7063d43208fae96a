"""The one table between `hashlens.errors` and gRPC status, with its rich details.

Read from left to right by the servers, from right to left by the clients.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from hashlens import errors
from hashlens.rpc import call

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries the `google.rpc.Status`."""

_MAX_MESSAGE_BYTES = 1024
"""Longest message. It travels three times, escaped, in trailing metadata, of which a client takes 8
KiB for sure: what is longer, quoting the caller for instance, would be RESOURCE_EXHAUSTED there."""

_CODES: dict[type[errors.HashlensError], grpc.StatusCode] = {
    errors.InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledError: grpc.StatusCode.CANCELLED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}
_REASONS = {
    cls: re.sub("(?<!^)(?=[A-Z])", "_", cls.__name__.removesuffix("Error")).lower()
    for cls in _CODES
}
# Overload is told from a used-up resource by its RetryInfo, so the plain code means LimitError.
_ERRORS = {code: cls for cls, code in _CODES.items()}


def status_of(error: BaseException) -> status_pb2.Status:
    """Return the `google.rpc.Status` of an error; what is not ours becomes INTERNAL."""
    if isinstance(error, NotImplementedError):  # What generated servicers raise by default.
        error = errors.UnimplementedError("the contract has this call, this server not yet")
    if not isinstance(error, errors.HashlensError):
        error = errors.InternalError("an internal error; the server's log has the details")
    code = next(
        (_CODES[cls] for cls in type(error).__mro__ if cls in _CODES), grpc.StatusCode.INTERNAL
    )
    message = _short(error.message)
    status = status_pb2.Status(code=code.value[0], message=message)
    if isinstance(error, errors.InvalidInputError) or (
        isinstance(error, errors.PreconditionError) and error.field
    ):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    elif isinstance(error, errors.OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _short(message: str) -> str:
    data = message.encode("utf-8", "replace")
    if len(data) <= _MAX_MESSAGE_BYTES:
        return message
    return data[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "..."


def reason_of(error: BaseException) -> str:
    """Return an error's kind as a label: ``overloaded``, ``invalid_input``; one of a few."""
    for cls in type(error).__mro__:
        if cls in _CODES:
            return _REASONS[cls]
    return "unimplemented" if isinstance(error, NotImplementedError) else "internal"


def error_of(status: status_pb2.Status) -> errors.HashlensError:
    """Return the error that a `google.rpc.Status` stands for."""
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    has_retry = False
    for detail in status.details:
        detail.Unpack(bad_request)
        has_retry = detail.Unpack(retry) or has_retry
    for code, cls in _ERRORS.items():
        if code.value[0] != status.code:
            continue
        if cls is errors.InvalidInputError or cls is errors.PreconditionError:
            violations = bad_request.field_violations
            return cls(status.message, field=violations[0].field if violations else "")
        if has_retry and code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.OverloadedError(
                status.message, retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9
            )
        return cls(status.message)
    return errors.InternalError(status.message or f"gRPC status {status.code}")


def error_of_call(failure: grpc.RpcError) -> errors.HashlensError:
    """Return the error behind a failed call, of the synchronous or the asynchronous API."""
    trailing = cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())
    for key, value in trailing:
        if key == DETAILS_KEY and isinstance(value, bytes):
            return error_of(status_pb2.Status.FromString(value))
    code: grpc.StatusCode = failure.code()
    if code is grpc.StatusCode.CANCELLED:
        # Not by us: cancelling a call of our own raises something else.
        return errors.UnavailableError(
            "the server ended the call: it is stopping, or waited too long for the request"
        )
    return error_of(status_pb2.Status(code=code.value[0], message=failure.details() or code.name))


async def abort(context: grpc.aio.ServicerContext[object, object], error: BaseException) -> None:
    """End the call with an error's status; never returns normally."""
    status = status_of(error)
    code = next(c for c in grpc.StatusCode if c.value[0] == status.code)
    trailing: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, status.SerializeToString()),)
    now = call.current()
    if now is not None:
        now.error = reason_of(error)
        trailing += ((call.REQUEST_ID, now.request_id),)
    if isinstance(error, errors.UnavailableError) and not error.elsewhere:
        # We have tried for as long as the deadline allowed: gRPC's own retry would only turn this
        # into DEADLINE_EXCEEDED. It still retries where no server answered at all.
        trailing += (("grpc-retry-pushback-ms", "-1"),)
    await context.abort(code, status.message, trailing)
