"""Every error isthmus raises on purpose, as one tree.

    IsthmusError
    ├── RecipeError          the recipe is malformed or asks for the impossible
    ├── ModelError           a model folder is missing, incomplete or unusable
    │   ├── CutError         the cut does not fit the model
    │   └── MismatchError    the two ends do not hold the same base model
    ├── DataError            a data file is missing, empty or unreadable
    ├── RunError             a run directory is missing, incomplete or taken
    │   ├── DiskFullError    the disk has no room for what the run must write
    │   └── LedgerError      a ledger was truncated, edited, or holds what cannot be accounted
    │       ├── LedgerTakenError  another silo holds the ledger
    │       └── ClockError        the clock is behind the ledger's last entry
    ├── BudgetExhausted      a release would cost a record, or the silo, more privacy than the recipe allows
    ├── IdentityError        a certificate is absent, expired, foreign or not entitled
    ├── AttackError          an attack that this adversary cannot make, or that the rows do not allow
    ├── FrameError           a peer sent something malformed
    │   └── FrameSizeError   a frame is larger than the federation allows
    ├── ProtocolError        a well-formed frame at the wrong moment
    │   ├── UnknownStepError     no such training step is open
    │   ├── OutOfOrderError      a step number that is not the next one
    │   ├── RoundLostError       the round under way is another (the trunk started again, or the silo was too late)
    │   ├── UnknownSessionError  no such inference session (evicted, expired, trunk restarted)
    │   └── UnknownExampleError  no example is kept under this number (evicted, or never sent)
    ├── PeerGoneError        the other side cannot be reached any more
    └── QuorumError          fewer silos than the recipe's minimum, or than its rule needs, are left

Each class has a stable ``code``, which crosses the wire, and a gRPC status. Each error says what happened
and, in ``remedy``, what its reader can do about it.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class IsthmusError(Exception):
    """Base of the tree.

    Args:
        message: what happened, in one sentence.
        remedy: what the reader can do about it, in one sentence.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

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
    code = "recipe"
    status = grpc.StatusCode.INVALID_ARGUMENT


class ModelError(IsthmusError):
    code = "model"
    status = grpc.StatusCode.FAILED_PRECONDITION


class CutError(ModelError):
    code = "cut"


class MismatchError(ModelError):
    code = "mismatch"


class DataError(IsthmusError):
    code = "data"
    status = grpc.StatusCode.INVALID_ARGUMENT


class RunError(IsthmusError):
    code = "run"
    status = grpc.StatusCode.FAILED_PRECONDITION


class DiskFullError(RunError):
    code = "disk-full"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class LedgerError(RunError):
    code = "ledger"


class LedgerTakenError(LedgerError):
    code = "ledger-taken"


class ClockError(LedgerError):
    code = "clock"


class BudgetExhausted(IsthmusError):  # noqa: N818 (no failure: what was agreed)
    code = "budget"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class IdentityError(IsthmusError):
    code = "identity"
    status = grpc.StatusCode.UNAUTHENTICATED


class AttackError(IsthmusError):
    code = "attack"
    status = grpc.StatusCode.INVALID_ARGUMENT


class FrameError(IsthmusError):
    code = "frame"
    status = grpc.StatusCode.INVALID_ARGUMENT


class FrameSizeError(FrameError):
    code = "frame-size"
    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class ProtocolError(IsthmusError):
    code = "protocol"
    status = grpc.StatusCode.FAILED_PRECONDITION


class UnknownStepError(ProtocolError):
    code = "unknown-step"


class OutOfOrderError(ProtocolError):
    code = "out-of-order"


class RoundLostError(ProtocolError):
    code = "round-lost"


class UnknownSessionError(ProtocolError):
    code = "unknown-session"


class UnknownExampleError(ProtocolError):
    code = "unknown-example"


class PeerGoneError(IsthmusError):
    code = "peer-gone"
    status = grpc.StatusCode.UNAVAILABLE


class QuorumError(IsthmusError):
    code = "quorum"
    status = grpc.StatusCode.ABORTED


def by_code(code: str) -> type[IsthmusError]:
    """The class with this stable code; ``IsthmusError`` itself for a code this version does not know."""
    return _CODES.get(code, IsthmusError)


def _tree(root: type[IsthmusError]) -> list[type[IsthmusError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_CODES = {kind.code: kind for kind in _tree(IsthmusError)}
