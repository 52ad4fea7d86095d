from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("session_id", "steps", "xs")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    XS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    steps: int
    xs: bytes
    def __init__(self, session_id: _Optional[str] = ..., steps: _Optional[int] = ..., xs: _Optional[bytes] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("hs",)
    HS_FIELD_NUMBER: _ClassVar[int]
    hs: bytes
    def __init__(self, hs: _Optional[bytes] = ...) -> None: ...
