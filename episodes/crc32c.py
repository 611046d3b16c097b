"""The checksum of TFRecord files, CRC-32C, in numpy."""
import numpy as np


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, rotated and shifted so that data may contain its own checksum."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


CRC_TABLE = np.arange(256, dtype=np.uint32)
for _ in range(8):
    CRC_TABLE = np.where(CRC_TABLE & 1, CRC_TABLE >> 1 ^ np.uint32(0x82F63B78), CRC_TABLE >> 1)
CRC_LIST = CRC_TABLE.tolist()


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli, RFC 3720 appendix B.4), fast enough for megabytes without compiled code.

    The register is linear over bits. So the data is cut into equal lanes, which numpy advances side
    by side, one byte of each at a time; then neighbours are joined, crc(AB) = shift(crc(A), len(B))
    ^ crc(B), where the shift is a 32×32 bit matrix that is found by sending its 32 unit vectors
    along as further lanes.
    """
    if len(data) < 256:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = CRC_LIST[(crc ^ byte) & 255] ^ crc >> 8
        return crc ^ 0xFFFFFFFF

    lanes = 1 << (len(data).bit_length() // 2 + 2)
    length = -(-len(data) // lanes)
    # zeros in front change nothing in a register that starts at zero
    padded = np.zeros((lanes + 32, length), np.uint8)
    padded.reshape(-1)[lanes * length - len(data) : lanes * length] = np.frombuffer(data, np.uint8)
    # the same as starting the register at 0xFFFFFFFF
    padded.reshape(-1)[lanes * length - len(data) :][:4] ^= 255
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
