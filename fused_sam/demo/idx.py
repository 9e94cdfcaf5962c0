"""This module reads gzipped IDX files, the format of MNIST and its successors.

A file has a big-endian header and the elements in row order. The header has two zero bytes, the type, the number of
dimensions, and one 32-bit size per dimension. Images and labels are unsigned bytes (type 0x08).
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from . import DemoError

UNSIGNED_BYTE = 0x08


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return the uint8 tensor in an IDX .gz file, which must have that many dimensions.

    Raises:
        DemoError: the file is missing, truncated, or not an IDX file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise DemoError(f"{path} is missing") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DemoError(f"{path} is truncated or not a gzip file: get it again") from None
    except OSError as error:
        raise DemoError(f"{path} cannot be read: {error.strerror}") from None

    header = 4 + 4 * dimensions
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise DemoError(f"{path} starts with {content[:4].hex() or 'nothing'}, but IDX has {magic.hex()}: wrong file")
    if len(content) < header:
        raise DemoError(f"{path} is truncated or corrupt: get it again")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if 0 in shape or len(content) - header != math.prod(shape):
        raise DemoError(f"{path} holds {len(content) - header} bytes and its header says {shape}: get it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)
