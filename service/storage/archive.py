"""Zip archives from outside: checked without unpacking, and unpacked by the same checks.

Nothing that an archive says of itself is trusted: sizes are counted while its bytes are read.
"""

import copy
import errno
import hashlib
import os
import re
import stat
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from service.domain.errors import FieldProblem, InvalidUpload

CHUNK_BYTES = 1 << 20
MAX_PART_BYTES = 255
MAX_NAME_BYTES = 1024
# Below this size no ratio is suspicious: a page of zeros compresses a thousandfold.
RATIO_MATTERS_FROM_BYTES = 1 << 20

_MAX_PROBLEMS = 20
_START = b"PK\x03\x04"
_DIRECTORY_RECORD = b"PK\x01\x02"
# Of the directory, which is read in one piece: room for the longest name and as much again, and never more than memory
# can bear.
_DIRECTORY_BYTES_PER_ENTRY = 2 << 10
_MAX_DIRECTORY_BYTES = 64 << 20
_END_BYTES = 1 << 17  # of the record at an archive's end, and a comment
_ENCRYPTED_FLAGS = 0x1 | 0x40 | 0x2000
_UTF8_FLAG = 0x800
_DRIVE = re.compile(r"[A-Za-z]:")
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)


@dataclass(frozen=True, kw_only=True)
class ArchiveLimits:
    """What an archive may hold at most.

    Attributes:
        entries: files and directories.
        unpacked_bytes: of all files together.
        ratio: of the size of a file to its compressed size.
    """

    entries: int = 10_000
    unpacked_bytes: int = 512 << 20
    ratio: int = 200


@dataclass(frozen=True, kw_only=True)
class ArchivedFile:
    """A file of an archive.

    Attributes:
        name: its path, with forward slashes.
        size_bytes: counted, not as the archive says.
        sha256: of its content, hexadecimal.
    """

    name: str
    size_bytes: int
    sha256: str


BUNDLE_LIMITS = ArchiveLimits()


def check_archive(file: BinaryIO, limits: ArchiveLimits = BUNDLE_LIMITS) -> tuple[ArchivedFile, ...]:
    """Read all of an archive, and write nothing.

    Args:
        file: the archive, from its beginning.
        limits: what it may hold.

    Returns:
        Its files.

    Raises:
        InvalidUpload: it is no zip archive, is damaged, or holds what could do harm; names the entries.
    """
    with _opened(file, limits) as archive:
        entries = _checked_entries(archive, limits)
        reader = _Reader(archive, limits)
        return tuple(reader.read(entry) for entry in entries if not entry.is_dir())


def unpack_archive(file: BinaryIO, target: Path, limits: ArchiveLimits = BUNDLE_LIMITS) -> tuple[ArchivedFile, ...]:
    """Unpack an archive into an empty directory, by the checks of ``check_archive``; the files are read-only.

    Args:
        file: the archive, from its beginning.
        target: an empty directory. After an error, whatever it holds by then is to be thrown away.
        limits: what it may hold.

    Returns:
        Its files.

    Raises:
        InvalidUpload: as ``check_archive`` raises it.
        OSError: the directory cannot be written.
    """
    with _opened(file, limits) as archive:
        entries = _checked_entries(archive, limits)
        reader = _Reader(archive, limits)
        unpacked = []
        for entry in entries:
            path = target / entry.filename
            if entry.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o444)
            with os.fdopen(descriptor, "wb") as written:
                unpacked.append(reader.read(entry, written))
        return tuple(unpacked)


def check_directory(file: BinaryIO, limits: ArchiveLimits) -> tuple[str, ...]:
    """Check what an archive says that it holds, without reading it.

    Args:
        file: the archive, from its beginning.
        limits: what it may hold; ``ratio`` does not count.

    Returns:
        The names of its files.

    Raises:
        InvalidUpload: as ``check_archive`` raises it.
    """
    with _opened(file, limits) as archive:
        return tuple(entry.filename for entry in _checked_entries(archive, limits) if not entry.is_dir())


def refusal(message: str, *problems: FieldProblem) -> InvalidUpload:
    """Return the error for a file that is not accepted.

    Args:
        message: what is wrong and what to do.
        problems: the entries at fault.
    """
    return InvalidUpload(message, problems)


class _Reader:
    """Reads the content of entries, and counts what comes out over all of them."""

    def __init__(self, archive: zipfile.ZipFile, limits: ArchiveLimits) -> None:
        self._archive = archive
        self._limits = limits
        self._left = limits.unpacked_bytes

    def read(self, entry: zipfile.ZipInfo, target: BinaryIO | None = None) -> ArchivedFile:
        name = entry.filename
        # The directory's word on the size would end the reading early; it is compared with the truth afterwards.
        unlimited = copy.copy(entry)
        unlimited.file_size = sys.maxsize
        digest = hashlib.sha256()
        size_bytes = 0
        try:
            with self._archive.open(unlimited) as content:
                while chunk := content.read(CHUNK_BYTES):
                    size_bytes += len(chunk)
                    self._left -= len(chunk)
                    if self._left < 0:
                        raise _too_much(self._limits, name)
                    if size_bytes > RATIO_MATTERS_FROM_BYTES and size_bytes > self._limits.ratio * entry.compress_size:
                        raise _refused_entry(
                            name,
                            f"is compressed more than {self._limits.ratio} times, as archives are that mean to fill a "
                            "disk. Bring such data as a dataset, or make them in the job.",
                        )
                    digest.update(chunk)
                    if target is not None:
                        target.write(chunk)
        except _DAMAGED as error:
            raise _refused_entry(name, f"cannot be read: {error}. Pack the archive anew.") from None
        if size_bytes != entry.file_size:
            raise _refused_entry(
                name, f"holds {size_bytes} bytes where the archive says {entry.file_size}. Pack the archive anew."
            )
        return ArchivedFile(name=name, size_bytes=size_bytes, sha256=digest.hexdigest())


@contextmanager
def _opened(file: BinaryIO, limits: ArchiveLimits) -> Iterator[zipfile.ZipFile]:
    remedy = "Send a zip archive, such as `syncbn bundle` makes."
    file.seek(0)
    if file.read(len(_START)) != _START:
        raise refusal(f"This is no zip archive with a file in it. {remedy}")
    file.seek(0)
    guard = _DirectoryGuard(file, limits)
    try:
        archive = zipfile.ZipFile(guard, "r")
    except UnicodeDecodeError as error:
        raise _refused_entry(
            repr(error.object)[2:-1], "is a name that is not valid UTF-8, as it says it is. Rename the file."
        ) from None
    except _DAMAGED as error:
        raise refusal(f"This zip archive is damaged: {error}. {remedy}") from None
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise refusal(f"This zip archive is damaged: it points outside of itself. {remedy}") from None
    guard.is_open = True
    with archive:
        yield archive


class _DirectoryGuard:
    """A file that ``zipfile`` reads an archive's directory from, refusing one that would fill the memory.

    Every entry of it becomes an object, whatever the archive says of their number: so the records are counted.

    Attributes:
        is_open: whether the directory has been read; the rest is read in small pieces.
    """

    def __init__(self, file: BinaryIO, limits: ArchiveLimits) -> None:
        self._file = file
        self._limits = limits
        self._max_bytes = max(_END_BYTES, min(limits.entries * _DIRECTORY_BYTES_PER_ENTRY, _MAX_DIRECTORY_BYTES))
        self.is_open = False
        self.seek = file.seek
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1, /) -> bytes:
        if not self.is_open and size > self._max_bytes:
            raise _too_many(self._limits)
        content = self._file.read(size)
        if not self.is_open and content.count(_DIRECTORY_RECORD) > self._limits.entries:
            raise _too_many(self._limits)
        return content


def _checked_entries(archive: zipfile.ZipFile, limits: ArchiveLimits) -> Sequence[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > limits.entries:
        raise _too_many(limits)
    problems = []
    for entry in entries:
        message = _entry_problem(entry)
        if message is not None:
            problems.append(FieldProblem(field=entry.orig_filename, message=message))
    problems = problems or _clashes(entries)
    if problems:
        raise refusal("The archive holds entries that are not accepted.", *problems[:_MAX_PROBLEMS])
    if all(entry.is_dir() for entry in entries):
        raise refusal("The archive holds no file. Pack the directory that your code is in.")
    if sum(entry.file_size for entry in entries) > limits.unpacked_bytes:
        raise _too_much(limits, max(entries, key=lambda entry: entry.file_size).filename)
    return entries


def _entry_problem(entry: zipfile.ZipInfo) -> str | None:
    """Say what is wrong with an entry and what to do; None if nothing is."""
    name = entry.orig_filename
    path = name.removesuffix("/")
    parts = path.split("/")
    mode = entry.external_attr >> 16
    kind = stat.S_IFMT(mode)
    problem = None
    if "\0" in name or not name.isprintable():
        problem = "has a control character in its name. Rename it."
    elif "\\" in name:
        problem = "has a backslash in its name. Rename it, or pack it with forward slashes."
    elif name.startswith("/") or _DRIVE.match(name):
        problem = "is an absolute path. Pack it relative to the directory of your code."
    elif ".." in parts:
        problem = "leads out of the archive with '..'. Pack it relative to the directory of your code."
    elif "" in parts or "." in parts:
        problem = "has an empty part or '.' in its path. Pack it under its plain path."
    elif not name.isascii() and not entry.flag_bits & _UTF8_FLAG:
        problem = "has a name that is not ASCII and not said to be UTF-8. Rename it, or pack it with UTF-8 names."
    elif max(len(part.encode()) for part in parts) > MAX_PART_BYTES or len(path.encode()) > MAX_NAME_BYTES:
        problem = f"has a part of more than {MAX_PART_BYTES} bytes, or more than {MAX_NAME_BYTES} in all. Rename it."
    elif entry.filename != name:
        problem = "goes by two names. Pack the archive anew."
    elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a link" if stat.S_ISLNK(mode) else "a device, a pipe or a socket"
        problem = f"is {what}. Only files and directories are accepted: put a copy of the file in its place."
    elif (kind != 0 and stat.S_ISDIR(mode) != entry.is_dir()) or (entry.is_dir() and entry.file_size):
        problem = "is a directory by one mark and a file by another. Pack the archive anew."
    elif entry.flag_bits & _ENCRYPTED_FLAGS:
        problem = "is encrypted. Pack it without a password."
    elif entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        problem = f"is compressed by method {entry.compress_type}. Pack it with deflate, or store it."
    return problem


def _clashes(entries: Sequence[zipfile.ZipInfo]) -> list[FieldProblem]:
    """Find names that are the same, or would be on a file system that does not tell case or composed letters apart."""
    folded = {entry: _fold(entry.filename.removesuffix("/")) for entry in entries}
    times = Counter(folded.values())
    files = {name for entry, name in folded.items() if not entry.is_dir()}
    problems = []
    for entry, name in folded.items():
        if times[name] > 1:
            message = "is there more than once, or differs from another only in case. Keep one of them."
            problems.append(FieldProblem(field=entry.filename, message=message))
        elif _lies_below_one_of(name, files):
            message = "lies below a path that is a file. Rename one of them."
            problems.append(FieldProblem(field=entry.filename, message=message))
    return problems


def _lies_below_one_of(name: str, files: Set[str]) -> bool:
    while name := name.rpartition("/")[0]:
        if name in files:
            return True
    return False


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _refused_entry(name: str, message: str) -> InvalidUpload:
    return refusal("The archive holds entries that are not accepted.", FieldProblem(field=name, message=message))


def _too_many(limits: ArchiveLimits) -> InvalidUpload:
    return refusal(
        f"The archive holds more than {limits.entries} entries. Leave out what the job does not need; "
        "name it in .syncbnignore. Bring data as a dataset."
    )


def _too_much(limits: ArchiveLimits, name: str) -> InvalidUpload:
    return refusal(
        f"The archive unpacks to more than {limits.unpacked_bytes} bytes. Leave out what the job does not need, and "
        "bring data as a dataset.",
        FieldProblem(field=name, message="reaches the limit."),
    )
