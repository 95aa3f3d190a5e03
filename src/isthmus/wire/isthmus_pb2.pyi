from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("id", "acked", "chunk", "left", "hello", "welcome", "failure", "ping", "pong", "begin", "begun", "forward", "hidden", "backward", "gradient", "commit", "stepped", "keep", "kept", "end", "ended", "move", "moved", "decode", "close", "closed", "ready", "plan", "update", "accepted", "deal", "dealt", "survivors", "reveal", "current", "adapters", "agree", "agreed", "enroll", "enrolled", "withdrawals", "withdrawn", "listing", "listed", "fetch", "fetched")
    ID_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    STEPPED_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DEAL_FIELD_NUMBER: _ClassVar[int]
    DEALT_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    REVEAL_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    AGREE_FIELD_NUMBER: _ClassVar[int]
    AGREED_FIELD_NUMBER: _ClassVar[int]
    ENROLL_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWALS_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    LISTING_FIELD_NUMBER: _ClassVar[int]
    LISTED_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    id: int
    acked: int
    chunk: bytes
    left: int
    hello: Hello
    welcome: Welcome
    failure: Failure
    ping: Ping
    pong: Pong
    begin: Begin
    begun: Begun
    forward: Forward
    hidden: Hidden
    backward: Backward
    gradient: Gradient
    commit: Commit
    stepped: Stepped
    keep: Keep
    kept: Kept
    end: End
    ended: Ended
    move: Move
    moved: Moved
    decode: Decode
    close: Close
    closed: Closed
    ready: Ready
    plan: Plan
    update: Update
    accepted: Accepted
    deal: Deal
    dealt: Dealt
    survivors: Survivors
    reveal: Reveal
    current: Current
    adapters: Adapters
    agree: Agree
    agreed: Agreed
    enroll: Enroll
    enrolled: Enrolled
    withdrawals: Withdrawals
    withdrawn: Withdrawn
    listing: Listing
    listed: Listed
    fetch: Fetch
    fetched: Fetched
    def __init__(self, id: _Optional[int] = ..., acked: _Optional[int] = ..., chunk: _Optional[bytes] = ..., left: _Optional[int] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., begun: _Optional[_Union[Begun, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., hidden: _Optional[_Union[Hidden, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., gradient: _Optional[_Union[Gradient, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., stepped: _Optional[_Union[Stepped, _Mapping]] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ..., kept: _Optional[_Union[Kept, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., move: _Optional[_Union[Move, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., decode: _Optional[_Union[Decode, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., plan: _Optional[_Union[Plan, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., deal: _Optional[_Union[Deal, _Mapping]] = ..., dealt: _Optional[_Union[Dealt, _Mapping]] = ..., survivors: _Optional[_Union[Survivors, _Mapping]] = ..., reveal: _Optional[_Union[Reveal, _Mapping]] = ..., current: _Optional[_Union[Current, _Mapping]] = ..., adapters: _Optional[_Union[Adapters, _Mapping]] = ..., agree: _Optional[_Union[Agree, _Mapping]] = ..., agreed: _Optional[_Union[Agreed, _Mapping]] = ..., enroll: _Optional[_Union[Enroll, _Mapping]] = ..., enrolled: _Optional[_Union[Enrolled, _Mapping]] = ..., withdrawals: _Optional[_Union[Withdrawals, _Mapping]] = ..., withdrawn: _Optional[_Union[Withdrawn, _Mapping]] = ..., listing: _Optional[_Union[Listing, _Mapping]] = ..., listed: _Optional[_Union[Listed, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ...) -> None: ...

class Matrix(_message.Message):
    __slots__ = ("codec", "rows", "width", "data")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    codec: str
    rows: int
    width: int
    data: bytes
    def __init__(self, codec: _Optional[str] = ..., rows: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "fingerprint", "bottom", "top", "instance", "keys", "ends")
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    fingerprint: str
    bottom: int
    top: int
    instance: str
    keys: _containers.ScalarMap[str, str]
    ends: int
    def __init__(self, version: _Optional[int] = ..., fingerprint: _Optional[str] = ..., bottom: _Optional[int] = ..., top: _Optional[int] = ..., instance: _Optional[str] = ..., keys: _Optional[_Mapping[str, str]] = ..., ends: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("completed", "training", "run")
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    completed: int
    training: bool
    run: str
    def __init__(self, completed: _Optional[int] = ..., training: _Optional[bool] = ..., run: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "remedy")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    remedy: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("compared",)
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    compared: Hello
    def __init__(self, compared: _Optional[_Union[Hello, _Mapping]] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("time", "welcome")
    TIME_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    time: float
    welcome: Welcome
    def __init__(self, time: _Optional[float] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("round", "participants", "open", "start", "digest", "steps", "published")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    round: int
    participants: _containers.RepeatedScalarFieldContainer[str]
    open: bool
    start: int
    digest: bytes
    steps: Steps
    published: Published
    def __init__(self, round: _Optional[int] = ..., participants: _Optional[_Iterable[str]] = ..., open: _Optional[bool] = ..., start: _Optional[int] = ..., digest: _Optional[bytes] = ..., steps: _Optional[_Union[Steps, _Mapping]] = ..., published: _Optional[_Union[Published, _Mapping]] = ...) -> None: ...

class Published(_message.Message):
    __slots__ = ("certificate", "signature")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    signature: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Steps(_message.Message):
    __slots__ = ("count", "before", "total")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    count: int
    before: int
    total: int
    def __init__(self, count: _Optional[int] = ..., before: _Optional[int] = ..., total: _Optional[int] = ...) -> None: ...

class Begun(_message.Message):
    __slots__ = ("round", "start", "digest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    start: int
    digest: bytes
    def __init__(self, round: _Optional[int] = ..., start: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("round",)
    ROUND_FIELD_NUMBER: _ClassVar[int]
    round: int
    def __init__(self, round: _Optional[int] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("example", "hidden")
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    example: int
    hidden: Matrix
    def __init__(self, example: _Optional[int] = ..., hidden: _Optional[_Union[Matrix, _Mapping]] = ...) -> None: ...

class Kept(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Forward(_message.Message):
    __slots__ = ("step", "lengths", "hidden", "train", "examples", "dropout", "answered")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    step: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    hidden: Matrix
    train: bool
    examples: _containers.RepeatedScalarFieldContainer[int]
    dropout: bool
    answered: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., hidden: _Optional[_Union[Matrix, _Mapping]] = ..., train: _Optional[bool] = ..., examples: _Optional[_Iterable[int]] = ..., dropout: _Optional[bool] = ..., answered: _Optional[_Iterable[int]] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("hidden", "changes", "changed")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    hidden: Matrix
    changes: Matrix
    changed: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, hidden: _Optional[_Union[Matrix, _Mapping]] = ..., changes: _Optional[_Union[Matrix, _Mapping]] = ..., changed: _Optional[_Iterable[int]] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("step", "gradient", "reply", "ascent_pass", "keep")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    ASCENT_PASS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    gradient: Matrix
    reply: bool
    ascent_pass: bool
    keep: float
    def __init__(self, step: _Optional[int] = ..., gradient: _Optional[_Union[Matrix, _Mapping]] = ..., reply: _Optional[bool] = ..., ascent_pass: _Optional[bool] = ..., keep: _Optional[float] = ...) -> None: ...

class Gradient(_message.Message):
    __slots__ = ("gradient", "norm")
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    gradient: Matrix
    norm: float
    def __init__(self, gradient: _Optional[_Union[Matrix, _Mapping]] = ..., norm: _Optional[float] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ("round", "step", "weight", "optimizer", "scale")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    round: int
    step: int
    weight: float
    optimizer: Optimizer
    scale: float
    def __init__(self, round: _Optional[int] = ..., step: _Optional[int] = ..., weight: _Optional[float] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., scale: _Optional[float] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("kind", "learning_rate", "weight_decay", "beta1", "beta2", "epsilon", "amsgrad", "momentum", "dampening", "nesterov", "fresh")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    AMSGRAD_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    DAMPENING_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    kind: str
    learning_rate: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    amsgrad: bool
    momentum: float
    dampening: float
    nesterov: bool
    fresh: bool
    def __init__(self, kind: _Optional[str] = ..., learning_rate: _Optional[float] = ..., weight_decay: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., epsilon: _Optional[float] = ..., amsgrad: _Optional[bool] = ..., momentum: _Optional[float] = ..., dampening: _Optional[float] = ..., nesterov: _Optional[bool] = ..., fresh: _Optional[bool] = ...) -> None: ...

class Stepped(_message.Message):
    __slots__ = ("contributors",)
    CONTRIBUTORS_FIELD_NUMBER: _ClassVar[int]
    contributors: int
    def __init__(self, contributors: _Optional[int] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("after", "tensors")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    after: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, after: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("after", "tensors")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    after: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, after: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Decode(_message.Message):
    __slots__ = ("session", "step", "lengths", "hidden", "forget", "rows", "drafted")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    session: int
    step: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    hidden: Matrix
    forget: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    drafted: bool
    def __init__(self, session: _Optional[int] = ..., step: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., hidden: _Optional[_Union[Matrix, _Mapping]] = ..., forget: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., drafted: _Optional[bool] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    def __init__(self, session: _Optional[int] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ready(_message.Message):
    __slots__ = ("completed", "keys", "silos", "run")
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    completed: int
    keys: SumKeys
    silos: _containers.RepeatedScalarFieldContainer[str]
    run: str
    def __init__(self, completed: _Optional[int] = ..., keys: _Optional[_Union[SumKeys, _Mapping]] = ..., silos: _Optional[_Iterable[str]] = ..., run: _Optional[str] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("round", "completed", "participants", "adapters", "sum", "keys", "control", "counted", "clip", "published")
    class KeysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: SumKeys
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[SumKeys, _Mapping]] = ...) -> None: ...
    class CountedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    round: int
    completed: int
    participants: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedCompositeFieldContainer[Tensor]
    sum: bytes
    keys: _containers.MessageMap[str, SumKeys]
    control: _containers.RepeatedCompositeFieldContainer[Tensor]
    counted: _containers.ScalarMap[str, int]
    clip: float
    published: Published
    def __init__(self, round: _Optional[int] = ..., completed: _Optional[int] = ..., participants: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., sum: _Optional[bytes] = ..., keys: _Optional[_Mapping[str, SumKeys]] = ..., control: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., counted: _Optional[_Mapping[str, int]] = ..., clip: _Optional[float] = ..., published: _Optional[_Union[Published, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("round", "weight", "tensors", "masked", "compressed", "quality", "learned", "silos")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    LEARNED_FIELD_NUMBER: _ClassVar[int]
    SILOS_FIELD_NUMBER: _ClassVar[int]
    round: int
    weight: float
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    masked: bytes
    compressed: bytes
    quality: float
    learned: bool
    silos: int
    def __init__(self, round: _Optional[int] = ..., weight: _Optional[float] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., masked: _Optional[bytes] = ..., compressed: _Optional[bytes] = ..., quality: _Optional[float] = ..., learned: _Optional[bool] = ..., silos: _Optional[int] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Current(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Adapters(_message.Message):
    __slots__ = ("completed", "adapters", "run")
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    completed: int
    adapters: _containers.RepeatedCompositeFieldContainer[Tensor]
    run: str
    def __init__(self, completed: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., run: _Optional[str] = ...) -> None: ...

class SumKeys(_message.Message):
    __slots__ = ("sealing", "masking", "commitment", "certificate", "signature")
    SEALING_FIELD_NUMBER: _ClassVar[int]
    MASKING_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    sealing: bytes
    masking: bytes
    commitment: bytes
    certificate: bytes
    signature: bytes
    def __init__(self, sealing: _Optional[bytes] = ..., masking: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Deal(_message.Message):
    __slots__ = ("round", "sealed", "commitments")
    class SealedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class CommitmentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    COMMITMENTS_FIELD_NUMBER: _ClassVar[int]
    round: int
    sealed: _containers.ScalarMap[str, bytes]
    commitments: _containers.ScalarMap[str, bytes]
    def __init__(self, round: _Optional[int] = ..., sealed: _Optional[_Mapping[str, bytes]] = ..., commitments: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Dealt(_message.Message):
    __slots__ = ("sealed", "commitments")
    class SealedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    class CommitmentsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SEALED_FIELD_NUMBER: _ClassVar[int]
    COMMITMENTS_FIELD_NUMBER: _ClassVar[int]
    sealed: _containers.ScalarMap[str, bytes]
    commitments: _containers.ScalarMap[str, bytes]
    def __init__(self, sealed: _Optional[_Mapping[str, bytes]] = ..., commitments: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("alive", "dropped")
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    alive: _containers.RepeatedScalarFieldContainer[str]
    dropped: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, alive: _Optional[_Iterable[str]] = ..., dropped: _Optional[_Iterable[str]] = ...) -> None: ...

class Agree(_message.Message):
    __slots__ = ("round", "signature")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    round: int
    signature: bytes
    def __init__(self, round: _Optional[int] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Agreed(_message.Message):
    __slots__ = ("signatures",)
    class SignaturesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    signatures: _containers.ScalarMap[str, bytes]
    def __init__(self, signatures: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Reveal(_message.Message):
    __slots__ = ("round", "shares")
    class SharesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    round: int
    shares: _containers.ScalarMap[str, bytes]
    def __init__(self, round: _Optional[int] = ..., shares: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Enroll(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    def __init__(self, request: _Optional[bytes] = ...) -> None: ...

class Enrolled(_message.Message):
    __slots__ = ("certificate", "authority", "revoked", "recipe")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authority: bytes
    revoked: bytes
    recipe: str
    def __init__(self, certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., revoked: _Optional[bytes] = ..., recipe: _Optional[str] = ...) -> None: ...

class Withdrawals(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("revoked", "roster")
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    revoked: bytes
    roster: bytes
    def __init__(self, revoked: _Optional[bytes] = ..., roster: _Optional[bytes] = ...) -> None: ...

class Listing(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Listed(_message.Message):
    __slots__ = ("files", "fingerprint")
    FILES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[File]
    fingerprint: str
    def __init__(self, files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "size", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    digest: str
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("name", "offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
