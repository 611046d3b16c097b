"""TFRecord files of `tf.train.Example` messages, read and written without TensorFlow.

A shard is a row of records, each framed by its length and two checksums:

    length (uint64) │ CRC of the length │ payload │ CRC of the payload

all little-endian, the checksums "masked" CRC-32C (episodes/crc32c.py).

A payload is a protocol buffer, Example{Features{map<name, Feature>}}, and a Feature one list, of
byte strings, floats or integers. An episode of a robot data set (RLDS) is one Example: feature
`steps/observation/image` lists the encoded pictures of all steps, `steps/action/world_vector` all
their numbers in one row, and so on.
"""
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from episodes.crc32c import masked_crc32c
from episodes.npz import Actions
from support.errors import DataError, stand_in

Rows = list[tuple[int, int, int]]  # offset, size and frames of every record


# --------------------------------------------------------------------------------------------------
# Episodes: the two functions that a file format is


def index(path: Path, image: str, actions: Actions) -> Rows:
    """A row for every episode of a shard, its frames unread; "frames" is -1 if it is damaged.

    image    the feature that lists the encoded pictures
    actions  (feature, how many numbers it has), …: what an action is made of

    Raises DataError for a damaged shard, and for a whole one that holds something else.
    """
    rows = []
    for offset, size, message in walk_records(path):
        try:
            frames = count_frames(message, image, actions)
        except DataError as error:
            if is_intact(path, offset, size):
                raise DataError(f"{path} does not hold this data set: {error}") from None
            frames = -1
        rows.append((offset, size, frames))
    return rows


def read(path: Path, offset: int, size: int, image: str, actions: Actions, start: int, stop: int
         ) -> tuple[list[memoryview], np.ndarray]:
    """The encoded pictures start .. stop-1 of an episode, and their actions float32 [T, A]. Raises
    DataError."""
    example = parse_example(read_record(path, offset, size))
    images = feature_bytes(example, image)
    columns = [feature_numbers(example, name) for name, _ in actions]
    if any(len(column) != width * len(images) for column,
           (_, width) in zip(columns, actions, strict=True)):
        counts = [len(column) for column in columns]
        raise DataError(f"{len(images)} frames do not go with {counts} action numbers")
    rows = [column.reshape(len(images), -1) for column in columns]
    return images[start:stop], np.concatenate(rows, axis=1)[start:stop].astype(np.float32)


def read_feature(path: Path, offset: int, size: int, name: str) -> np.ndarray:
    """Another feature of numbers, flat. Raises DataError if it is not there."""
    return feature_numbers(parse_example(read_record(path, offset, size)), name)


def read_text(path: Path, offset: int, size: int, name: str) -> str:
    """The first of a feature of texts. Raises DataError if it is not there."""
    texts = feature_bytes(parse_example(read_record(path, offset, size)), name)
    if not texts:
        raise DataError(f"feature {name!r} is empty")
    return bytes(texts[0]).decode("utf-8", "replace")


def count_frames(message: memoryview, image: str, actions: Actions) -> int:
    example = parse_example(message)
    feature_list(example, image)
    name, width = actions[0]
    return len(feature_numbers(example, name)) // width


def is_intact(path: Path, offset: int, size: int) -> bool:
    try:
        return bool(read_record(path, offset, size))
    except DataError:
        return False


# --------------------------------------------------------------------------------------------------
# Records


def walk_records(path: Path) -> Iterator[tuple[int, int, memoryview]]:
    """Offset, size and payload of every record of a shard. The payload is a view of the file: only
    what is looked at is read.

    Checks lengths and their checksums; raises DataError for an empty, truncated or damaged shard.
    """
    size = os.path.getsize(path)
    if other := stand_in(path):
        raise DataError(f"{path} {other}")
    if size == 0:
        raise DataError(f"{path} is empty: fetch it again")
    shard = memoryview(np.memmap(path, np.uint8, mode="r"))
    position = 0
    while position < size:
        header = bytes(shard[position : position + 12])
        if len(header) == 12 and masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
            raise DataError(f"{path} is damaged: the length of the record at byte {position} fails "
                            "its checksum; fetch it again")
        length = int.from_bytes(header[:8], "little")
        if len(header) < 12 or position + 16 + length > size:
            raise DataError(f"{path} is truncated: the record at byte {position} ends after the "
                            "file does; fetch it again")
        yield position + 12, length, shard[position + 12 : position + 12 + length]
        position += 16 + length


def read_record(path: Path, offset: int, size: int) -> memoryview:
    """The payload that `walk_records` found. Raises DataError if its checksum does not match."""
    with open(path, "rb") as file:
        file.seek(offset)
        payload, crc = file.read(size), file.read(4)
    if len(crc) < 4 or masked_crc32c(payload) != int.from_bytes(crc, "little"):
        raise DataError("its checksum does not match (CRC-32C)")
    return memoryview(payload)


def write_records(path: Path, payloads: Sequence[bytes]) -> None:
    with open(path, "wb") as file:
        for payload in payloads:
            length = len(payload).to_bytes(8, "little")
            for part in (length, payload):
                file.write(part + masked_crc32c(part).to_bytes(4, "little"))


# --------------------------------------------------------------------------------------------------
# Examples


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: number, and value (an int or bytes)."""
    position = 0
    while position < len(message):
        tag, position = varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = varint(message, position)
        elif wire in (1, 2, 5):
            size = {1: 8, 5: 4}.get(wire)
            if wire == 2:
                size, position = varint(message, position)
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise DataError("its message is cut short")
        else:
            raise DataError("its message is not a protocol buffer")
        yield tag >> 3, value


def varint(message: memoryview, position: int) -> tuple[int, int]:
    """A little-endian base-128 number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise DataError("its message is cut short")
        byte = message[position]
        value |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return value, position
    raise DataError("its message is not a protocol buffer")


def parts(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that has only byte strings and messages in it."""
    for number, value in fields(message):
        if isinstance(value, int):
            raise DataError("its message is not an Example")
        yield number, value


def parse_example(message: memoryview) -> dict[str, memoryview]:
    """Feature name -> encoded Feature. Nothing inside the features is touched."""
    example = {}
    for _, features in parts(message):
        for _, entry in parts(features):
            entry = dict(parts(entry))  # 1: the name, 2: the feature
            name = bytes(entry.get(1, b"")).decode("utf-8", "replace")
            example[name] = entry.get(2, memoryview(b""))
    return example


def feature_list(example: dict[str, memoryview], name: str) -> tuple[int, memoryview]:
    """A feature's kind (1 bytes, 2 float, 3 int64) and its encoded list."""
    if name not in example:
        raise DataError(f"there is no feature {name!r}; there are "
                        f"{', '.join(sorted(example)[:8])}, …")
    return next(parts(example[name]), (1, memoryview(b"")))


def feature_bytes(example: dict[str, memoryview], name: str) -> list[memoryview]:
    return [value for _, value in parts(feature_list(example, name)[1])]


def feature_numbers(example: dict[str, memoryview], name: str) -> np.ndarray:
    """A list of floats or integers, packed or not."""
    kind, values = feature_list(example, name)
    if kind == 2:
        # 4 bytes each, one or many to a field
        packed = b"".join(value for _, value in parts(values))
        if len(packed) % 4:
            raise DataError(f"feature {name!r} is not a list of floats")
        return np.frombuffer(packed, "<f4")
    numbers = []
    for _, value in fields(values):
        position = 0
        while not isinstance(value, int) and position < len(value):
            number, position = varint(value, position)
            numbers.append(number)
        if isinstance(value, int):
            numbers.append(value)
    # negative ones come as 2⁶⁴ - n
    return np.array([number % 2**64 for number in numbers], np.uint64).astype(np.int64)


# --------------------------------------------------------------------------------------------------
# Writing


def encode_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """An Example of byte strings (lists of bytes), floats or integers (arrays)."""
    entries = []
    for name, values in features.items():
        if not isinstance(values, np.ndarray):
            kind, encoded = 1, b"".join(encode_field(1, value) for value in values)
        elif values.dtype.kind == "f":
            kind, encoded = 2, encode_field(1, values.astype("<f4").tobytes())
        else:
            numbers = b"".join(encode_varint(int(value) % 2**64) for value in values.ravel())
            kind, encoded = 3, encode_field(1, numbers)
        feature = encode_field(2, encode_field(kind, encoded))
        entries.append(encode_field(1, encode_field(1, name.encode()) + feature))
    return encode_field(1, b"".join(entries))


def encode_field(number: int, value: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def encode_varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes(groups + [value])
