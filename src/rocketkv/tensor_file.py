"""Named tensors and a record in one safetensors file: there whole or not at all, checked and mapped when it is read.

The file is an ordinary safetensors file, which any of its readers opens. Its header has, beside the tensors, a format
version, the record as JSON, the SHA-256 of each tensor and one of all that. A tensor begins where its size allows: a
file of whole memory pages is mapped page by page.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rocketkv.errors import CacheFileError, telling_memory

FORMAT = "rocketkv-cache"
VERSION = 1
PAGE = 4096  # bytes
BLOCK = 1 << 20  # bytes read at a time
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NO_DIGEST = "0" * hashlib.sha256().digest_size * 2


class Rows(NamedTuple):
    """Tokens of ragged rows, of which a file holds those in use and room for more: holes, which take no disk.

    Attributes:
        tokens: `[B, Hkv, S, ...]` of any dtype.
        lengths: `[B, Hkv]` integers, tokens in use, the first ones.
        capacity: tokens per row in the file, zeros beyond the length.
    """

    tokens: Tensor
    lengths: Tensor
    capacity: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return (*self.tokens.shape[:2], self.capacity, *self.tokens.shape[3:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        return self.tokens.dtype

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.tokens[:, :, :1].nbytes * self.capacity


def save(path: Path, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> None:
    """Write a file that only its owner reads; what stood at the path is there until the new file is complete.

    The new file is written under another name, `.NAME.` and some letters, and locked; see `half_written`.

    Args:
        path: where the file will be.
        tensors: what it holds.
        record: what JSON can hold.

    Raises:
        CacheFileError: the path is no file's, or the file cannot be written.
    """
    try:
        if _is_other_than_file(path):
            raise CacheFileError(f"{path} is no file that could be replaced; give the path of a new file.")
        handle, temporary = mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
        try:
            with open(handle, "wb") as file:
                with suppress(OSError):  # some file systems know no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                write(file, tensors, record)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)  # the lock holds until then
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise CacheFileError(
            f"{path} cannot be written ({error.strerror or error}); give a path in a folder of yours with room."
        ) from None


def _is_other_than_file(path: Path) -> bool:
    """Return whether a folder, a pipe or the like is there, by one look: others may remove a file meanwhile."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


def half_written(folder: Path, name: re.Pattern[str]) -> dict[Path, int]:
    """Return the files that a `save` began and did not finish since its process was killed, with their bytes.

    Args:
        folder: where the files were to be.
        name: what their names match; a file that another process is writing at the moment is left out.
    """
    found = {}
    for path in folder.glob(".*"):
        with suppress(OSError):  # the file is being written, or has gone
            if name.match(path.name.removeprefix(".")) and path.is_file():
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    if num_bytes := os.fstat(file.fileno()).st_size:  # nothing is written before the lock is there
                        found[path] = num_bytes
    return found


def write(file: BinaryIO, tensors: Mapping[str, Tensor | Rows], record: Mapping[str, Any]) -> None:
    """Write an empty file; see `save`."""
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_alignment(tensors[name].nbytes), name)):
        start, end = end, end + tensors[name].nbytes
        entry = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
        header[name] = entry
    size = len(_header(header, record, dict.fromkeys(header, _NO_DIGEST)))  # digests are of one length
    file.seek(size)
    digests = {name: _write_tensor(file, tensors[name]) for name in header}
    file.truncate(size + end)  # the last row may end in a hole
    file.seek(0)
    file.write(_header(header, record, digests))


def load(path: Path, *, check: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Map a file that `save` wrote.

    Args:
        path: of the file.
        check: whether to read all of it and compare its checksums; the header is checked always.

    Returns:
        The record, and the tensors on the CPU: views of a private mapping. What is written to them changes memory
        alone, and what is not is shared with all who map the file.

    Raises:
        CacheFileError: there is no such file, it was written by something else or by another version, or it is damaged.
        OutOfMemoryError: the system has no room to map the file.
    """
    try:
        if _is_other_than_file(path):
            raise CacheFileError(f"{path} is no file; give the path of a saved cache.")
        with telling_memory("to map a saved cache"), torch.inference_mode(False), path.open("rb") as opened:
            with safe_open(
                f"/dev/fd/{opened.fileno()}", framework="pt"
            ) as file:  # of this file, if it is replaced, too
                metadata = file.metadata() or {}
                _check_format(path, metadata)
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
            found = _digests(opened.fileno()) if check else None
    except OSError as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise CacheFileError(f"{path} {reason}; give the path of a saved cache.") from None
    except SafetensorError as error:
        raise CacheFileError(f"{path} is no saved cache, or is damaged ({error}); give one, or save it anew.") from None
    shapes = {name: [_DTYPES.get(x.dtype), list(x.shape)] for name, x in tensors.items()}
    record, digests = metadata.get("record", ""), metadata.get("tensors", "")
    if metadata.get("sha256") != _digest_header(shapes, record, digests):
        raise _damaged(path)
    if found is not None and found != json.loads(digests):
        raise _damaged(path)
    return json.loads(record), tensors


def _write_tensor(file: BinaryIO, tensor: Tensor | Rows) -> str:
    """Write a tensor where the file stands, and return the SHA-256 of its bytes in hexadecimal."""
    digest = hashlib.sha256()
    if not isinstance(tensor, Rows):
        tensor = Rows(tensor[None, None, None], torch.ones(1, 1, dtype=torch.int64), 1)
    rows, lengths, capacity = tensor
    for row, length in zip(rows.flatten(0, 1), lengths.flatten().tolist(), strict=True):
        used = _bytes(row[:length])
        file.write(used)
        digest.update(used)
        hole = row[:1].nbytes * (capacity - length)
        file.seek(hole, os.SEEK_CUR)
        digest.update(bytes(hole))
    return digest.hexdigest()


def _header(entries: dict[str, Any], record: Mapping[str, Any], digests: dict[str, str]) -> bytes:
    """Return what stands before the tensors: the length of the header and the header, in whole pages."""
    shapes = {name: [entry["dtype"], entry["shape"]] for name, entry in entries.items()}
    texts = json.dumps(record), json.dumps(digests)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "record": texts[0],
        "tensors": texts[1],
        "sha256": _digest_header(shapes, *texts),
    }
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(len(header) + 8) % PAGE)
    return len(header).to_bytes(8, "little") + header


def _digest_header(shapes: dict[str, Any], record: str, digests: str) -> str:
    """Return the SHA-256 in hexadecimal of all that the header says."""
    return hashlib.sha256(json.dumps([VERSION, shapes, record, digests], sort_keys=True).encode()).hexdigest()


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a safetensors file that holds something else, or that another version wrote."""
    if metadata.get("format") != FORMAT:
        raise CacheFileError(f"{path} is a safetensors file, but no saved cache; give one that holds a cache.")
    if metadata.get("version") != str(VERSION):
        raise CacheFileError(
            f"{path} has format version {metadata.get('version')!r}, and this rocketkv reads version {VERSION}; "
            "save the cache anew with this one."
        )


def _digests(file: int) -> dict[str, str]:
    """Return the SHA-256 in hexadecimal of each tensor in an open safetensors file.

    The file is read, not looked at through a mapping, so that holes take no memory, nor does what no one goes on with.
    """
    header_size = int.from_bytes(os.pread(file, 8, 0), "little")
    header = json.loads(os.pread(file, header_size, 8))
    header.pop("__metadata__", None)

    def digest(name: str) -> str:
        start, end = (8 + header_size + offset for offset in header[name]["data_offsets"])
        found = hashlib.sha256()
        for place in range(start, end, BLOCK):
            found.update(os.pread(file, min(BLOCK, end - place), place))
        return found.hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(header, pool.map(digest, header), strict=True))


def _damaged(path: Path) -> CacheFileError:
    return CacheFileError(f"{path} is damaged: its checksum is not that of its contents; save the cache anew.")


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, row by row; a copy where it is not contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _alignment(num_bytes: int) -> int:
    """Return the largest power of two that divides a number of bytes, a page at most."""
    return min(num_bytes & -num_bytes or PAGE, PAGE)
