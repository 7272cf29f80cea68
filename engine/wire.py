"""Values as bytes: one codec for the step path, the schedule log and the engine's clients.

MessagePack through msgspec: types are checked when bytes are read, and reading runs no code, as a
pickle would. Arrays are (dtype, shape, data). Dataclasses travel by field name, so a reader of
another version refuses what it does not know how to read rather than misread it.
"""

from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, np.ascontiguousarray(value).data
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} cannot be sent")


def _decode(kind: type, value: Any) -> Any:
    if getattr(kind, "__origin__", kind) is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape).copy()  # writable
    raise NotImplementedError(f"{kind} cannot be read")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode)


def encode(value: Any) -> bytes:
    """``value``, made of dataclasses, arrays and plain values, as bytes."""
    return _encoder.encode(value)


class Decoder(Generic[T]):
    """Reads values of one type. ``decode`` raises msgspec.ValidationError for any other bytes."""

    def __init__(self, kind: type[T] | Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind, dec_hook=_decode)

    def decode(self, data: bytes | bytearray | memoryview) -> T:
        return self._decoder.decode(data)
