"""The requirements.txt of a bundle: read strictly, and installed beside the service's own packages.

Only wheels are installed, so that installing runs none of their code; and nothing that the service has is replaced,
since the versions of what is installed are constraints. What pip is asked for is read and written anew here, and its
process may start no other one: building a package, or fetching a repository, would.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from service.domain.errors import UserCodeRefused

FILE_NAME = "requirements.txt"
MAX_FILE_BYTES = 1 << 20

_FLAGS = frozenset({"--no-index", "--pre", "--prefer-binary", "--require-hashes"})
_WITH_URL = frozenset({"-i", "--index-url", "--extra-index-url"})
_FIND_LINKS = frozenset({"-f", "--find-links"})
_COMMENT = re.compile(r"(^|\s+)#.*$")
_HASH_OPTIONS = re.compile(r"(\s+--hash[=\s]\s*[a-z0-9]+:[0-9a-f]+)+\s*$")
_HASH_FRAGMENT = re.compile(r"sha256=[0-9a-f]{64}")
_WHEEL = ".whl"
_LAST_LINES = 15
# Of what pip notes when it is not the requirements' fault: an index that is away, or a full disk.
_MAY_PASS = re.compile(
    r"connection error|connection broken|Connection(?:Reset|Refused|Aborted)?Error|Connect(?:ion)?TimeoutError"
    r"|Read timed out|ReadTimeoutError|IncompleteRead|Temporary failure in name resolution|Name or service not known"
    r"|\b5\d\d Server Error|too many (?:429|5\d\d) error responses|HTTP error (?:429|5\d\d)"
    r"|No space left on device",
    re.IGNORECASE,
)
# pip ends with the process that started it. Tied in its own process: after a fork of a threaded one little may be done.
# To install a wheel it needs no other process; a wheel may name what it needs as an address of anything.
_START_PIP = """
import runpy, sys
from service.linux import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
def refuse(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"):
        raise PermissionError("only wheels are installed: a package that is no wheel would run code to be built")
sys.addaudithook(refuse)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_ENVIRONMENT_FORMAT = b"2"  # part of the key: what is kept under it was made as it is made here


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a bundle asks for.

    Attributes:
        lines: for pip, with absolute paths for what lies in the bundle.
        key: hash of the lines and of all that decides what they give: the environment that is made of them is kept
            under it.
    """

    lines: tuple[str, ...]
    key: str


def read_requirements(code_dir: Path, bundle_sha256: str) -> Requirements:
    """Read the requirements.txt of a bundle.

    Args:
        code_dir: directory with the bundle's files.
        bundle_sha256: of the bundle.

    Raises:
        UserCodeRefused: there is none, or it asks for what is not allowed; names the line.
    """
    path = code_dir / FILE_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        lines = text.decode()
    except FileNotFoundError:
        raise UserCodeRefused(
            f"code.requirements is true, but the bundle has no {FILE_NAME} at its top. Add one, or set it to false."
        ) from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserCodeRefused(f"The bundle's {FILE_NAME} is no UTF-8 text. Write it anew.") from None
    if len(text) > MAX_FILE_BYTES:
        raise UserCodeRefused(f"The bundle's {FILE_NAME} has more than {MAX_FILE_BYTES} bytes.")
    allowed = tuple(_allowed(line, number, code_dir) for number, line in _logical_lines(lines))
    key = hashlib.sha256(_ENVIRONMENT_FORMAT)
    uses_bundle = any(code_dir.resolve().as_uri() in line for line in allowed)
    facts = [*lines.splitlines(), sys.version, platform.machine(), *installed(), bundle_sha256 if uses_bundle else ""]
    key.update("\0".join(facts).encode())
    return Requirements(lines=allowed, key=key.hexdigest())


def install_requirements(
    requirements: Requirements, target: Path, *, environment: Mapping[str, str], log: IO[bytes], deadline_s: float
) -> None:
    """Install what is asked for, and is not there yet, into an empty directory.

    Args:
        requirements: as ``read_requirements`` gave them.
        target: the directory, to be put on ``sys.path``.
        environment: of pip; without secrets.
        log: takes what pip says.
        deadline_s: most time for it.

    Raises:
        UserCodeRefused: pip cannot do it; with its last lines.
        OSError: it could not do it this time: an index does not answer, the disk is full, or the time is over.
    """
    with TemporaryDirectory(prefix="syncbn-requirements-") as scratch:
        asked, constraints, report = (Path(scratch) / name for name in ("asked.txt", "constraints.txt", "report.json"))
        asked.write_text("\n".join(requirements.lines) + "\n")
        constraints.write_text("\n".join(installed()) + "\n")
        pip = _Pip(environment=environment, log=log, deadline_s=deadline_s, cwd=scratch)
        # First, what is missing beside what the service has; left to itself, --target would install all of it again.
        pip.run("--dry-run", "--report", str(report), "--constraint", str(constraints), "--requirement", str(asked))
        missing = [_pinned(item) for item in json.loads(report.read_bytes())["install"]]
        if not missing:
            return
        pinned = Path(scratch) / "pinned.txt"
        pinned.write_text("\n".join(missing) + "\n")
        pip.run("--no-deps", "--target", str(target), "--requirement", str(pinned))


@cache
def installed() -> tuple[str, ...]:
    """Return what is installed beside the service, as constraints."""
    found = {one.name.lower(): f"{one.name}=={one.version}" for one in distributions() if one.name and one.version}
    return tuple(found[name] for name in sorted(found))


class _Pip:
    """Runs pip, all times together within one deadline."""

    def __init__(self, *, environment: Mapping[str, str], log: IO[bytes], deadline_s: float, cwd: str) -> None:
        self._environment = environment
        self._log = log
        self._end = time.monotonic() + deadline_s
        self._cwd = cwd

    def run(self, *arguments: str) -> None:
        notes = Path(self._cwd) / "notes.txt"  # all that pip has to say, of which it prints a part
        notes.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-c", _START_PIP, str(os.getpid())]
        command += ["install", "--no-input", "--disable-pip-version-check", "--log", str(notes)]
        command += ["--no-color", "--progress-bar", "off", "--only-binary", ":all:", *arguments]
        start = self._log.tell()
        process = subprocess.Popen(
            command,
            cwd=self._cwd,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            status = process.wait(max(0.0, self._end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise OSError(
                errno.ETIMEDOUT,
                f"The bundle's {FILE_NAME} was not installed within its time (SYNCBN_PREPARE_TIMEOUT_S). Ask for less, "
                f"or put the wheels into the bundle.{self._last_lines(start)}",
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status == 0:
            return
        message = f"The bundle's {FILE_NAME} cannot be installed:{self._last_lines(start)}"
        if status < 0 or (notes.exists() and _MAY_PASS.search(notes.read_text(errors="replace"))):
            raise OSError(errno.EIO, message)
        raise UserCodeRefused(message)

    def _last_lines(self, start: int) -> str:
        with Path(f"/proc/self/fd/{self._log.fileno()}").open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        return "".join(f"\n{line}" for line in lines[-_LAST_LINES:])


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, without comments, and put together where a backslash splits them."""
    start, joined = 1, ""
    for number, line in enumerate([*text.splitlines(), ""], 1):
        piece = _COMMENT.sub("", line)
        if piece.endswith("\\"):
            joined += piece.removesuffix("\\") + " "
            continue
        whole = (joined + piece).strip()
        if whole:
            yield start, whole
        start, joined = number + 1, ""


def _allowed(line: str, number: int, code_dir: Path) -> str:
    """Return a line as pip is to see it.

    Raises:
        UserCodeRefused: it is not allowed.
    """
    if line.startswith("-"):
        return _allowed_option(line, number, code_dir)
    hashes = _HASH_OPTIONS.search(line)
    asked = line if hashes is None else line[: hashes.start()]
    options = "" if hashes is None else hashes[0]
    if _scheme(asked) == "https":
        _check_wheel_url(asked, number, line)
        return asked + options
    if asked.endswith(_WHEEL) and "@" not in asked:
        found = _inside(code_dir, asked, number)
        if not found.is_file() or not _is_wheel_name(found.name):
            raise _refused(number, line, "is no wheel. Wheels are files named name-version-python-abi-platform.whl")
        return found.as_uri() + options
    # pip takes all from the first word with a dash on as options, also in what a marker quotes.
    if any(word.startswith("-") for word in asked.split()):
        raise _refused(number, line, "has an option where none is allowed")
    try:
        requirement = Requirement(asked)
    except InvalidRequirement as error:
        raise _refused(number, line, f"is no requirement: {str(error).splitlines()[0]}") from None
    if requirement.url is not None:
        _check_wheel_url(requirement.url, number, line)
    return line


def _allowed_option(line: str, number: int, code_dir: Path) -> str:
    try:
        name, *values = shlex.split(line)
    except ValueError as error:
        raise _refused(number, line, f"cannot be read: {error}") from None
    name, equals, value = name.partition("=")
    values = [value, *values] if equals else values
    if name in _FLAGS and not values:
        return name
    if name in _WITH_URL and len(values) == 1 and _is_page(values[0]):
        return f"{name} {shlex.quote(values[0])}"
    if name in _FIND_LINKS and len(values) == 1:
        if _is_page(values[0]):
            return f"{name} {shlex.quote(values[0])}"
        where = _inside(code_dir, values[0], number)
        if where.is_dir():
            return f"{name} {where.as_uri()}"
    known = ", ".join(sorted([*_FLAGS, *_WITH_URL, *_FIND_LINKS]))
    raise _refused(number, line, f"is an option that is not allowed here, or has no fitting value. Known: {known}")


def _check_wheel_url(url: str, number: int, line: str) -> None:
    """Check that an address is one of a wheel. Raises ``UserCodeRefused``."""
    is_plain = _scheme(url) == "https" and not _has_space(url)
    parts = urlsplit(url) if is_plain else None
    if parts is None or not _is_wheel_name(unquote(parts.path.rpartition("/")[2])):
        raise _refused(
            number, line, "asks for something else than a wheel (.whl) at an https:// address, which would run code"
        )
    if parts.fragment and not _HASH_FRAGMENT.fullmatch(parts.fragment):
        raise _refused(number, line, "has something else than #sha256= and 64 digits after its address")


def _is_page(url: str) -> bool:
    return _scheme(url) == "https" and not _has_space(url) and "#" not in url


def _scheme(url: str) -> str:
    """Return the scheme of an address that has a host; empty where there is none."""
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.hostname else ""
    except ValueError:
        return ""


def _has_space(text: str) -> bool:
    return not text.isprintable() or any(character.isspace() for character in text)


def _is_wheel_name(name: str) -> bool:
    try:
        parse_wheel_filename(name)
    except InvalidWheelFilename:
        return False
    return not _has_space(name)


def _inside(code_dir: Path, path: str, number: int) -> Path:
    """Return the path of something in the bundle. Raises ``UserCodeRefused``."""
    found = (code_dir / path).resolve()
    if not found.is_relative_to(code_dir.resolve()) or not found.exists():
        raise _refused(number, path, "is no path in the bundle")
    return found


def _pinned(item: Mapping[str, object]) -> str:
    """Return the line that installs what pip found, and nothing else under the same address.

    Raises:
        UserCodeRefused: it found something else than a wheel.
    """
    download = item["download_info"]
    metadata = item["metadata"]
    assert isinstance(download, dict)
    assert isinstance(metadata, dict)
    if not urlsplit(download["url"]).path.endswith(_WHEEL):
        raise UserCodeRefused(
            f"The bundle's {FILE_NAME} needs {metadata['name']} from {download['url']}, which is no wheel and would "
            "run code to be built. Put its wheel into the bundle."
        )
    hashes = download.get("archive_info", {}).get("hashes", {})
    options = "".join(f" --hash={name}:{value}" for name, value in hashes.items() if name == "sha256")
    return f"{metadata['name']} @ {download['url']}{options}"


def _refused(number: int, line: str, why: str) -> UserCodeRefused:
    return UserCodeRefused(f"Line {number} of the bundle's {FILE_NAME}, {line!r}, {why}.")
