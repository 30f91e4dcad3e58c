"""The requirements.txt of a bundle: read strictly, and installed beside the service's own packages.

Only wheels are installed, so that installing runs none of their code; and nothing that the service has is replaced,
since the versions of what is installed are constraints.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from packaging.requirements import InvalidRequirement, Requirement

from service.domain.errors import UserCodeRefused

FILE_NAME = "requirements.txt"
MAX_FILE_BYTES = 1 << 20

_FLAGS = frozenset({"--no-index", "--pre", "--prefer-binary", "--require-hashes"})
_WITH_URL = {"-i": "--index-url", "--index-url": "--index-url", "--extra-index-url": "--extra-index-url"}
_FIND_LINKS = frozenset({"-f", "--find-links"})
_COMMENT = re.compile(r"(^|\s+)#.*$")
_HASH_OPTIONS = re.compile(r"(\s+--hash[=\s]\s*[a-z0-9]+:[0-9a-f]+)+\s*$")
_URL = re.compile(r"https?://", re.IGNORECASE)
_LAST_LINES = 15
# pip ends with the process that started it. Tied in its own process: after a fork of a threaded one little may be done.
_START_PIP = """
import runpy, sys
from service.linux import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_ENVIRONMENT_FORMAT = b"1"  # part of the key: what is kept under it was made as it is made here


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
    uses_bundle = any(str(code_dir) in line for line in allowed)
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
        self._left_s = deadline_s
        self._cwd = cwd

    def run(self, *arguments: str) -> None:
        command = [sys.executable, "-P", "-c", _START_PIP, str(os.getpid())]
        command += ["install", "--no-input", "--disable-pip-version-check"]
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
            status = process.wait(self._left_s)
        except subprocess.TimeoutExpired:
            raise UserCodeRefused(
                f"The bundle's {FILE_NAME} was not installed within its time (SYNCBN_PREPARE_TIMEOUT_S). Ask for less, "
                f"or put the wheels into the bundle.{self._last_lines(start)}"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status != 0:
            raise UserCodeRefused(f"The bundle's {FILE_NAME} cannot be installed:{self._last_lines(start)}")

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
    if asked.endswith(".whl") and "@" not in asked:
        return (asked if _URL.match(asked) else str(_inside(code_dir, asked, number))) + (hashes[0] if hashes else "")
    try:
        requirement = Requirement(asked)
    except InvalidRequirement as error:
        raise _refused(number, line, f"is no requirement: {str(error).splitlines()[0]}") from None
    if requirement.url is not None and not (_URL.match(requirement.url) and requirement.url.endswith(".whl")):
        raise _refused(number, line, "asks for something else than a wheel (.whl), which would run code to be built")
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
    if name in _WITH_URL and len(values) == 1 and _URL.match(values[0]):
        return f"{_WITH_URL[name]} {values[0]}"
    if name in _FIND_LINKS and len(values) == 1:
        where = values[0] if _URL.match(values[0]) else str(_inside(code_dir, values[0], number))
        return f"--find-links {where}"
    known = ", ".join(sorted([*_FLAGS, *_WITH_URL, *_FIND_LINKS]))
    raise _refused(number, line, f"is an option that is not allowed here, or has no fitting value. Known: {known}")


def _inside(code_dir: Path, path: str, number: int) -> Path:
    """Return the path of something in the bundle. Raises ``UserCodeRefused``."""
    found = (code_dir / path).resolve()
    if not found.is_relative_to(code_dir.resolve()) or not found.exists():
        raise _refused(number, path, "is no path in the bundle")
    return found


def _pinned(item: Mapping[str, object]) -> str:
    """Return the line that installs what pip found, and nothing else under the same address."""
    download = item["download_info"]
    metadata = item["metadata"]
    assert isinstance(download, dict)
    assert isinstance(metadata, dict)
    hashes = download.get("archive_info", {}).get("hashes", {})
    options = "".join(f" --hash={name}:{value}" for name, value in hashes.items() if name == "sha256")
    return f"{metadata['name']} @ {download['url']}{options}"


def _refused(number: int, line: str, why: str) -> UserCodeRefused:
    return UserCodeRefused(f"Line {number} of the bundle's {FILE_NAME}, {line!r}, {why}.")
