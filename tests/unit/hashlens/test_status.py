"""Each error survives the trip to a status and back."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import status_pb2

from hashlens import errors
from hashlens.rpc.status import error_of, error_of_call, status_of

ALL = [
    errors.InvalidInputError("k is 0: ask for 1 or more", field="options.k"),
    errors.NotFoundError("no such collection"),
    errors.AlreadyExistsError("there already"),
    errors.PreconditionError("another model", field="query.embedding.model_id"),
    errors.PreconditionError("another epoch"),
    errors.UnauthenticatedError("no token"),
    errors.PermissionDeniedError("read only"),
    errors.OverloadedError("full", retry_after_s=0.25),
    errors.LimitError("disk full"),
    errors.UnavailableError("Redis is away"),
    errors.DeadlineError("too late"),
    errors.CancelledError("left"),
    errors.UnimplementedError("not yet"),
    errors.DataLossError("damaged"),
    errors.InternalError("a defect"),
]


def every_subclass(cls: type[errors.HashlensError]) -> set[type[errors.HashlensError]]:
    """Return the classes of the tree; a package's own refinements are not of the contract."""
    below = {sub for child in cls.__subclasses__() for sub in every_subclass(child)}
    return {cls} | {sub for sub in below if sub.__module__ == errors.__name__}


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
def test_round_trip(error: errors.HashlensError) -> None:
    status = status_pb2.Status.FromString(status_of(error).SerializeToString())
    back = error_of(status)
    assert type(back) is type(error)
    assert vars(back) == vars(error)


def test_every_error_of_the_tree_is_in_the_table() -> None:
    assert {type(error) for error in ALL} == every_subclass(errors.HashlensError) - {
        errors.HashlensError
    }


def test_what_is_not_ours_is_internal_and_not_explained() -> None:
    status = status_of(ValueError("/secret/path"))
    assert type(error_of(status)) is errors.InternalError
    assert "secret" not in status.message


def test_what_generated_code_raises_is_unimplemented() -> None:
    assert type(error_of(status_of(NotImplementedError()))) is errors.UnimplementedError


def test_the_tree_in_the_docstring_is_complete() -> None:
    assert errors.__doc__ is not None
    for cls in every_subclass(errors.HashlensError):
        assert cls.__name__ in errors.__doc__


def test_a_call_that_the_server_cancelled_may_be_repeated() -> None:
    class Ended(grpc.RpcError):
        def trailing_metadata(self) -> tuple[()]:
            return ()

        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.CANCELLED

        def details(self) -> str:
            return ""

    assert error_of_call(Ended()).retriable
