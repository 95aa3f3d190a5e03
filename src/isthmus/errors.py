"""The exception tree: every error that isthmus raises on purpose.

    IsthmusError
    ├── RecipeError          the recipe is malformed or asks for the impossible
    ├── ModelError           a model folder is missing, incomplete or unusable
    │   ├── CutError         the cut does not fit the model
    │   └── MismatchError    silo and trunk do not hold the same base model
    │       └── CutMovedError  two parties of a run whose cut moves have different cuts
    ├── NotSupportedError    a caller asks the split model for what it does not offer
    ├── DataError            a data file is missing, empty or unreadable
    ├── RunError             a run directory is missing, incomplete or in use
    │   ├── DiskFullError    the disk is full
    │   └── LedgerError      a ledger was truncated or edited, or holds an event that cannot be accounted
    │       └── LedgerTakenError  another process has the ledger open
    ├── BudgetExhausted      a release would exceed the privacy budget of a record or of the silo
    ├── IdentityError        a certificate is missing, expired, of another authority, or not authorized
    ├── AttackError          this adversary, or these rows, do not allow the attack
    ├── FrameError           a peer sent a malformed frame
    │   └── FrameSizeError   a frame is larger than the federation allows
    ├── ProtocolError        a well-formed frame came at the wrong time
    │   ├── UnknownStepError     no training step with this number is open
    │   ├── OutOfOrderError      the step's number is not the next one
    │   ├── RoundLostError       the silo's round is not running (the trunk restarted, or the silo was too late)
    │   ├── UnknownSessionError  no inference session with this number (evicted, expired, trunk restarted)
    │   └── UnknownExampleError  no example with this number is kept (evicted, or never sent)
    ├── PeerGoneError        the peer cannot be reached
    ├── RankLostError        a process that holds blocks of the trunk is gone
    ├── BusyError            a server has as many requests as it takes
    └── QuorumError          fewer silos are left than the recipe or its aggregation rule needs

Each class has a stable ``code``, which crosses the wire, and a gRPC status. Each error has a ``message``, which says
what happened, and a ``remedy``, which says what its reader can do about it.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class IsthmusError(Exception):
    """The base class of all errors.

    Args:
        message: what happened, in one sentence.
        remedy: what the reader can do about it, in one sentence.
    """

    code: ClassVar[str] = "internal"
    """Stable name of the class on the wire."""
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    """The gRPC status with which a stream ends on this error."""

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.remedy)


def _rebuild(kind: type[IsthmusError], message: str, remedy: str) -> IsthmusError:
    return kind(message, remedy=remedy)


class RecipeError(IsthmusError):
    """The recipe is malformed or asks for the impossible."""

    code = "recipe"
    status = grpc.StatusCode.INVALID_ARGUMENT


class ModelError(IsthmusError):
    """A model folder is missing, incomplete or unusable."""

    code = "model"
    status = grpc.StatusCode.FAILED_PRECONDITION


class CutError(ModelError):
    """The cut does not fit the model."""

    code = "cut"


class MismatchError(ModelError):
    """Silo and trunk do not hold the same base model."""

    code = "mismatch"


class CutMovedError(MismatchError):
    """Two parties of a run whose cut moves have different cuts: one of them has not made the last move yet."""

    code = "cut-moved"


class NotSupportedError(IsthmusError):
    """A caller asks the split model for what it does not offer."""

    code = "not-supported"
    status = grpc.StatusCode.UNIMPLEMENTED


class DataError(IsthmusError):
    """A data file is missing, empty or unreadable."""

    code = "data"
    status = grpc.StatusCode.INVALID_ARGUMENT


class RunError(IsthmusError):
    """A run directory is missing, incomplete or in use."""

    code = "run"
    status = grpc.StatusCode.FAILED_PRECONDITION


class DiskFullError(RunError):
    """The disk is full."""

    code = "disk-full"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class LedgerError(RunError):
    """A ledger was truncated or edited, or holds an event that cannot be accounted."""

    code = "ledger"


class LedgerTakenError(LedgerError):
    """Another process has the ledger open."""

    code = "ledger-taken"


class BudgetExhausted(IsthmusError):  # noqa: N818 (not a failure, but an agreed limit)
    """A release would exceed the privacy budget of a record or of the silo."""

    code = "budget"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class IdentityError(IsthmusError):
    """A certificate is missing, expired, of another authority, or not authorized."""

    code = "identity"
    status = grpc.StatusCode.UNAUTHENTICATED


class AttackError(IsthmusError):
    """This adversary, or these rows, do not allow the attack."""

    code = "attack"
    status = grpc.StatusCode.INVALID_ARGUMENT


class FrameError(IsthmusError):
    """A peer sent a malformed frame."""

    code = "frame"
    status = grpc.StatusCode.INVALID_ARGUMENT


class FrameSizeError(FrameError):
    """A frame is larger than the federation allows."""

    code = "frame-size"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class ProtocolError(IsthmusError):
    """A well-formed frame came at the wrong time."""

    code = "protocol"
    status = grpc.StatusCode.FAILED_PRECONDITION


class UnknownStepError(ProtocolError):
    """No training step with this number is open."""

    code = "unknown-step"


class OutOfOrderError(ProtocolError):
    """The step's number is not the next one."""

    code = "out-of-order"


class RoundLostError(ProtocolError):
    """The silo's round is not running (the trunk restarted, or the silo was too late)."""

    code = "round-lost"


class UnknownSessionError(ProtocolError):
    """No inference session with this number (evicted, expired, trunk restarted)."""

    code = "unknown-session"


class UnknownExampleError(ProtocolError):
    """No example with this number is kept (evicted, or never sent)."""

    code = "unknown-example"


class PeerGoneError(IsthmusError):
    """The peer cannot be reached."""

    code = "peer-gone"
    status = grpc.StatusCode.UNAVAILABLE


class RankLostError(IsthmusError):
    """A process that holds blocks of the trunk is gone."""

    code = "rank-lost"
    status = grpc.StatusCode.UNAVAILABLE


class BusyError(IsthmusError):
    """A server has as many requests as it takes."""

    code = "busy"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class QuorumError(IsthmusError):
    """Fewer silos are left than the recipe or its aggregation rule needs."""

    code = "quorum"
    status = grpc.StatusCode.ABORTED


def by_code(code: str) -> type[IsthmusError]:
    """The error class with this code; ``IsthmusError`` for a code that this version does not know."""
    return _CODES.get(code, IsthmusError)


def _tree(root: type[IsthmusError]) -> list[type[IsthmusError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_CODES = {kind.code: kind for kind in _tree(IsthmusError)}
