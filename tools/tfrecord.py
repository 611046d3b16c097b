"""TFRecord files of `tf.train.Example` messages, read and written without TensorFlow.

A shard is a row of records, each framed by its length and two checksums:

    length (uint64) │ CRC of the length │ payload │ CRC of the payload         all little-endian, CRC-32C, "masked"

A payload is a protocol buffer, Example{Features{map<name, Feature>}}, and a Feature one list, of byte strings,
floats or integers. An episode of a robot data set (RLDS) is one Example: feature `steps/observation/image` lists the
encoded pictures of all steps, `steps/action/world_vector` all their numbers in one row, and so on.
"""
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """Data that cannot be used; the message says what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------
# Records


def walk_records(path: Path) -> Iterator[tuple[int, int, memoryview]]:
    """Offset, size and payload of every record of a shard. The payload is a view of the file: only what is looked at is read.

    Checks the lengths and their checksums; raises DataError for a shard that is empty, truncated or damaged.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path} is empty: fetch it again")
    shard = memoryview(np.memmap(path, np.uint8, mode="r"))
    position = 0
    while position < size:
        header = bytes(shard[position : position + 12])
        if len(header) == 12 and masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
            raise DataError(f"{path} is damaged: the length of the record at byte {position} fails its checksum; fetch it again")
        length = int.from_bytes(header[:8], "little")
        if len(header) < 12 or position + 16 + length > size:
            raise DataError(f"{path} is truncated: the record at byte {position} ends after the file does; fetch it again")
        yield position + 12, length, shard[position + 12 : position + 12 + length]
        position += 16 + length


def read_record(path: Path, offset: int, size: int) -> memoryview:
    """A record's payload, from where `walk_records` found it. Raises DataError if its checksum does not match."""
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


# ---------------------------------------------------------------------------------------------------------
# Examples


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: number, and value (an int, or the bytes of anything longer)."""
    position = 0
    while position < len(message):
        tag, position = varint(message, position)
        wire = tag & 7
        if wire == 0:
            value, position = varint(message, position)
        elif wire in (1, 2, 5):
            size, position = varint(message, position) if wire == 2 else ({1: 8, 5: 4}[wire], position)
            value, position = message[position : position + size], position + size
            if position > len(message):
                raise DataError("its message is cut short")
        else:
            raise DataError("its message is no protocol buffer")
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
    raise DataError("its message is no protocol buffer")


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
            example[bytes(entry.get(1, b"")).decode("utf-8", "replace")] = entry.get(2, memoryview(b""))
    return example


def feature_list(example: dict[str, memoryview], name: str) -> tuple[int, memoryview]:
    """A feature's kind (1 bytes, 2 float, 3 int64) and its encoded list."""
    if name not in example:
        raise DataError(f"there is no feature {name!r}; there are {', '.join(sorted(example)[:8])}, …")
    return next(parts(example[name]), (1, memoryview(b"")))


def feature_bytes(example: dict[str, memoryview], name: str) -> list[memoryview]:
    return [value for _, value in parts(feature_list(example, name)[1])]


def feature_numbers(example: dict[str, memoryview], name: str) -> np.ndarray:
    """A list of floats or integers, packed or not."""
    kind, values = feature_list(example, name)
    if kind == 2:
        packed = b"".join(value for _, value in parts(values))  # 4 bytes each, one or many to a field
        if len(packed) % 4:
            raise DataError(f"feature {name!r} is no list of floats")
        return np.frombuffer(packed, "<f4")
    numbers = []
    for _, value in fields(values):
        position = 0
        while not isinstance(value, int) and position < len(value):
            number, position = varint(value, position)
            numbers.append(number)
        if isinstance(value, int):
            numbers.append(value)
    return np.array([number % 2**64 for number in numbers], np.uint64).astype(np.int64)  # negative ones come as 2⁶⁴ - n


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C, rotated and shifted so that data may contain its own checksum."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, CRC_TABLE >> 1 ^ np.uint32(0x82F63B78), CRC_TABLE >> 1)
CRC_LIST = CRC_TABLE.tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4), fast enough for megabytes without compiled code.

    The register is linear over bits. So the data is cut into equal lanes, which numpy advances side by side,
    one byte of each at a time; then neighbours are joined, crc(AB) = shift(crc(A), len(B)) ^ crc(B), where the
    shift is a 32×32 bit matrix that is found by sending its 32 unit vectors along as further lanes.
    """
    if len(data) < 256:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = CRC_LIST[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF

    lanes = 1 << (len(data).bit_length() // 2 + 2)
    length = -(-len(data) // lanes)
    padded = np.zeros((lanes + 32, length), np.uint8)  # zeros in front change nothing in a register that starts at zero
    padded.reshape(-1)[lanes * length - len(data) : lanes * length] = np.frombuffer(data, np.uint8)
    padded.reshape(-1)[lanes * length - len(data) :][:4] ^= 255  # the same as starting the register at 0xFFFFFFFF
    crc = np.zeros(lanes + 32, np.uint32)
    crc[lanes:] = 1 << np.arange(32, dtype=np.uint32)
    for column in np.ascontiguousarray(padded.T):
        crc = CRC_TABLE[(crc ^ column) & 255] ^ crc >> 8

    crc, shift = crc[:lanes], crc[lanes:]

    def shifted(x: np.ndarray) -> np.ndarray:
        bits = x[:, None] >> np.arange(32, dtype=np.uint32) & 1
        return np.bitwise_xor.reduce(bits * shift, axis=1)

    while len(crc) > 1:
        crc = shifted(crc[0::2]) ^ crc[1::2]
        shift = shifted(shift)
    return int(crc[0]) ^ 0xFFFFFFFF


# ---------------------------------------------------------------------------------------------------------
# Writing


def encode_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """An Example of byte strings (a list of bytes), floats or integers (arrays), each feature one flat list."""
    entries = []
    for name, values in features.items():
        if not isinstance(values, np.ndarray):
            kind, encoded = 1, b"".join(encode_field(1, value) for value in values)
        elif values.dtype.kind == "f":
            kind, encoded = 2, encode_field(1, values.astype("<f4").tobytes())
        else:
            kind, encoded = 3, encode_field(1, b"".join(encode_varint(int(value) % 2**64) for value in values.ravel()))
        entries.append(encode_field(1, encode_field(1, name.encode()) + encode_field(2, encode_field(kind, encoded))))
    return encode_field(1, b"".join(entries))


def encode_field(number: int, value: bytes) -> bytes:
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def encode_varint(value: int) -> bytes:
    groups = []
    while value > 127:
        groups.append(value & 127 | 128)
        value >>= 7
    return bytes(groups + [value])
