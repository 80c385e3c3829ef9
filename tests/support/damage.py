"""One flipped bit, as a disk or a copy may leave it."""

from pipeline.artifacts.storage import StoragePath


def flip(file: StoragePath, index: int, bit: int = 0) -> None:
    """Flips a bit of the byte at `index`; a second call gives the file back its bytes."""
    data = bytearray(file.read_bytes())
    data[index] ^= 1 << bit
    file.write_bytes(bytes(data))
