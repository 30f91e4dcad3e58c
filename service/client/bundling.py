"""A directory of code as a zip archive that is the same for the same files, whenever and wherever it is packed."""

import io
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from service.client.errors import UploadFailed

BLOCK_BYTES = 1 << 20
IGNORE_FILE = ".syncbnignore"
ALWAYS_IGNORED = (
    "__pycache__/",
    "*.pyc",
    ".git/",
    ".hg/",
    ".svn/",
    ".venv/",
    "venv/",
    ".mypy_cache/",
    ".pytest_cache/",
)
# The earliest that a zip archive can say; the same for every file.
_DATE = (1980, 1, 1, 0, 0, 0)
_MODE = stat.S_IFREG | 0o644


def pack_directory(directory: Path, max_bytes: int | None = None) -> bytes:
    """Pack the files of a directory.

    The same files give the same bytes: names are sorted, and neither dates nor modes are kept. Left out is what
    ``ALWAYS_IGNORED`` and the patterns in ``.syncbnignore`` match, one a line: with a slash at its end, of directories
    only; with another slash, of the path from the top; else of names at any depth.

    Args:
        directory: what ``import`` is to find things in.
        max_bytes: most bytes of the archive; no more is read once there are more.

    Raises:
        UploadFailed: there is nothing in it, or a link or another thing that cannot be packed, or too much.
        OSError: a file cannot be read.
    """
    packed = io.BytesIO()
    patterns = (*ALWAYS_IGNORED, IGNORE_FILE, *_patterns(directory / IGNORE_FILE))
    names = sorted(_names(directory, PurePosixPath(), patterns))
    if not names:
        raise UploadFailed(f"{directory} holds no file that is not ignored. Name the directory that your code is in.")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, wherever it is packed
            entry.external_attr = _MODE << 16
            entry.file_size = (directory / name).stat().st_size
            with (directory / name).open("rb") as file, archive.open(entry, "w") as written:
                while block := file.read(BLOCK_BYTES):
                    written.write(block)
                    if max_bytes is not None and packed.tell() > max_bytes:
                        raise UploadFailed(
                            f"{directory} packs to more than the {max_bytes} bytes that the service takes at most; "
                            f"{name} reaches the limit. Nothing was sent. Name what jobs do not need in {IGNORE_FILE}, "
                            "and bring data as a dataset."
                        )
    return packed.getvalue()


def open_bundle(path: Path, max_bytes: int | None = None) -> BinaryIO:
    """Return the bytes of a bundle: a zip archive as it is, a directory packed.

    Args:
        path: of the one or the other.
        max_bytes: as for ``pack_directory``.

    Raises:
        UploadFailed: as ``pack_directory`` raises it.
        OSError: it cannot be read.
    """
    return io.BytesIO(pack_directory(path, max_bytes)) if path.is_dir() else path.open("rb")


def _patterns(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UploadFailed(f"{path} is no UTF-8 text: {error}. Write it anew.") from None
    for line in text.splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            yield pattern


def _names(top: Path, below: PurePosixPath, patterns: Sequence[str]) -> Iterator[str]:
    with os.scandir(top / below) as scanned:
        entries = list(scanned)
    for entry in entries:
        path = below / entry.name
        is_directory = entry.is_dir(follow_symlinks=False)
        if any(_matches(path, pattern, is_directory) for pattern in patterns):
            continue
        if not str(path).isprintable() or "\\" in entry.name:  # also half of a surrogate pair: a name that is not UTF-8
            raise UploadFailed(f"{str(top / path)!r} is no name that every machine can have. Rename it.")
        if is_directory:
            yield from _names(top, path, patterns)
        elif entry.is_file(follow_symlinks=False):
            yield str(path)
        else:
            raise UploadFailed(
                f"{top / path} is a link, or neither a file nor a directory. Put a copy in its place, or name it in "
                f"{IGNORE_FILE}."
            )


def _matches(path: PurePosixPath, pattern: str, is_directory: bool) -> bool:
    if pattern.endswith("/"):
        if not is_directory:
            return False
        pattern = pattern.removesuffix("/")
    if "/" in pattern:
        return fnmatchcase(str(path), pattern.removeprefix("/"))
    return fnmatchcase(path.name, pattern)
