"""The error tree. Everything Hashlens raises on purpose is a `HashlensError`.

::

    HashlensError
    ├── InvalidInputError      the request is wrong: mend it (`field` says where)
    ├── NotFoundError          no such collection or id
    ├── AlreadyExistsError     a collection of that name is there, with another specification
    ├── PreconditionError      right request, wrong state: another model's embedding, say
    ├── UnauthenticatedError   who are you? A token that the server knows is missing
    ├── PermissionDeniedError  known, but not allowed to do this
    ├── OverloadedError        come back after `retry_after_s`
    ├── LimitError             a resource is used up: disk, memory
    ├── UnavailableError       a part that is needed is away: try again
    ├── DeadlineError          the time allowed was over first
    ├── CancelledError         the caller left before the work was done
    ├── UnimplementedError     the contract has it, this server does not yet
    ├── DataLossError          stored bytes are damaged
    └── InternalError          a defect of ours

Domain code raises these and never names a gRPC code; `hashlens.rpc.status` maps them both ways, so
a client catches the class that the server raised.
"""

from __future__ import annotations


class HashlensError(Exception):
    """Base of all errors.

    Parameters
    ----------
    message
        What went wrong and what to do about it, one sentence each.
    """

    retriable: bool = False
    """Whether the same call may succeed later, unchanged."""

    is_input_error: bool = False
    """Whether the caller must change the call."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidInputError(HashlensError):
    """The request itself is wrong.

    Parameters
    ----------
    message
        What is wrong and what to do.
    field
        Path of the offending field in the request message, such as ``items[3].embedding.code``;
        empty when the request as a whole is meant.
    """

    is_input_error = True

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def within(self, prefix: str) -> InvalidInputError:
        """Return the same error with `prefix` before the field path."""
        if not self.field:
            return InvalidInputError(self.message, field=prefix)
        joint = "" if self.field.startswith("[") else "."
        return InvalidInputError(self.message, field=f"{prefix}{joint}{self.field}")


class NotFoundError(HashlensError):
    """No such collection or id."""

    is_input_error = True


class AlreadyExistsError(HashlensError):
    """A collection of that name exists with another specification."""

    is_input_error = True


class PreconditionError(HashlensError):
    """The request is well formed but does not fit the state it meets.

    Parameters
    ----------
    message
        What does not fit and what to do.
    field
        Path of the field that does not fit, if it is one, as in `InvalidInputError`.
    """

    is_input_error = True

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnauthenticatedError(HashlensError):
    """The caller has not shown who it is."""

    is_input_error = True


class PermissionDeniedError(HashlensError):
    """The caller is known and may not do this."""

    is_input_error = True


class OverloadedError(HashlensError):
    """The server refuses work it could not finish in time.

    Parameters
    ----------
    message
        Which queue is full.
    retry_after_s
        When to come back, in seconds.
    """

    retriable = True

    def __init__(self, message: str, *, retry_after_s: float = 0.1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitError(HashlensError):
    """A resource is used up and will not come back by waiting a little."""


class UnavailableError(HashlensError):
    """A part that is needed is away for now.

    Parameters
    ----------
    message
        Which part.
    elsewhere
        Whether nothing was tried, and another server may answer at once: this one starts or stops.
    """

    retriable = True

    def __init__(self, message: str, *, elsewhere: bool = False) -> None:
        super().__init__(message)
        self.elsewhere = elsewhere


class DeadlineError(HashlensError):
    """The time allowed was over before the answer was there."""

    retriable = True


class CancelledError(HashlensError):
    """The caller left; the work was stopped."""


class UnimplementedError(HashlensError):
    """The contract has it, this server does not yet."""


class DataLossError(HashlensError):
    """Stored bytes are damaged or gone."""


class InternalError(HashlensError):
    """A defect of Hashlens."""
