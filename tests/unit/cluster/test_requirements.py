"""Requirements of a bundle, installed without a network. A failure means that installing runs what a job brings,
replaces what the service has, or leaves its owner in the dark."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.cluster.requirements import Requirements, install_requirements, installed, read_requirements
from service.cluster.training_environment import training_environment
from service.domain.errors import UserCodeRefused
from tests.archives import make_zip

SHA256 = "0" * 64


def wheel(directory, name="tiny", number="1.0", *, needs=(), module="where = 'wheel'\n"):
    """Build a wheel, which is a zip archive with metadata, and return its path."""
    info = f"{name}-{number}.dist-info"
    files = {
        f"{name}.py": module.encode(),
        f"{info}/METADATA": "\n".join(
            [
                "Metadata-Version: 2.1",
                f"Name: {name}",
                f"Version: {number}",
                *(f"Requires-Dist: {one}" for one in needs),
            ]
        ).encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]).encode()
    path = directory / f"{name}-{number}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_zip(files))
    return path


@pytest.fixture
def code(tmp_path):
    directory = tmp_path / "code"
    directory.mkdir()
    wheel(directory / "wheels")
    wheel(directory / "wheels", "needy", needs=["tiny>=1", "numpy", "pydantic"])
    wheel(directory / "wheels", "greedy", needs=["numpy<1"])
    return directory


@pytest.fixture
def install(code, tmp_path):
    def run(text, deadline_s=60.0):
        (code / "requirements.txt").write_text(text)
        target = tmp_path / "target"
        target.mkdir(exist_ok=True)
        with (tmp_path / "log").open("ab") as log:
            install_requirements(
                read_requirements(code, SHA256),
                target,
                environment=training_environment(os.environ),
                log=log,
                deadline_s=deadline_s,
            )
        return target

    return run


HERE = "--no-index\n--find-links wheels\n"


def test_what_is_missing_is_installed_and_what_is_there_is_not(install):
    target = install(HERE + "needy==1.0  # which needs tiny, numpy and pydantic\n")
    assert sorted(path.name for path in target.iterdir() if path.name != "__pycache__") == [
        "needy-1.0.dist-info",
        "needy.py",
        "tiny-1.0.dist-info",
        "tiny.py",
    ]
    script = (
        f"import sys; sys.path.append({str(target)!r}); import needy, tiny, numpy; print(tiny.where, numpy.__version__)"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == ["wheel", version("numpy")]


def test_what_is_all_there_needs_no_installation(install):
    assert list(install("--no-index\nnumpy\ntorch\n").iterdir()) == []


def test_a_wheel_of_the_bundle_by_its_path_and_hash(install, code):
    digest = hashlib.sha256((code / "wheels" / "tiny-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    target = install(f"--no-index\n./wheels/tiny-1.0-py3-none-any.whl --hash=sha256:{digest}\n")
    assert (target / "tiny.py").exists()
    with pytest.raises(UserCodeRefused, match=r"HASHES|hashes"):
        install(f"--no-index\n./wheels/tiny-1.0-py3-none-any.whl --hash=sha256:{SHA256}\n")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (HERE + "absent-thing==3\n", "absent-thing"),
        (HERE + "greedy\n", "numpy"),  # which needs another numpy than there is
    ],
)
def test_what_cannot_be_installed_is_told_with_pips_last_lines(install, tmp_path, text, part):
    with pytest.raises(UserCodeRefused) as caught:
        install(text)
    assert "requirements.txt cannot be installed:" in caught.value.message
    assert "ERROR: " in caught.value.message
    assert part in caught.value.message
    assert "ERROR: " in (tmp_path / "log").read_text()
    assert not list((tmp_path / "target").iterdir())


def test_a_deadline_ends_pip_and_another_try_may_help(install, monkeypatch):
    import service.cluster.requirements as module

    monkeypatch.setattr(module, "_START_PIP", "import time; print('so far', flush=True); time.sleep(1000)")
    started = time.monotonic()
    with pytest.raises(OSError, match=r"within its time(?s:.*)so far"):
        install(HERE + "tiny\n", deadline_s=1.0)
    assert time.monotonic() - started < 20


def test_all_runs_of_pip_share_one_deadline(install, monkeypatch):
    import service.cluster.requirements as module

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            waits.append(timeout)
            clock[0] += 40.0
            return super().wait(60)

    waits, clock = [], [1000.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": Popen}))
    install(HERE + "tiny\n", deadline_s=100.0)
    assert waits == [100.0, 60.0]


def test_an_index_that_is_away_is_no_fault_of_the_job(code, tmp_path):
    class Away(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Away)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed_port = free.getsockname()[1]
    try:
        for port in (server.server_port, closed_port):
            requirements = Requirements(lines=(f"--index-url http://127.0.0.1:{port}/simple", "tiny"), key="")
            with (tmp_path / "log").open("ab") as log, pytest.raises(OSError, match="No matching distribution"):
                install_requirements(
                    requirements,
                    tmp_path / "target",
                    environment={**training_environment(os.environ), "PIP_RETRIES": "0"},
                    log=log,
                    deadline_s=60.0,
                )
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("form", ["directory", "archive"])
def test_what_a_wheel_needs_is_not_built_either(install, code, tmp_path, form):
    source = tmp_path / "boom"
    source.mkdir()
    marker = tmp_path / "ran"
    (source / "setup.py").write_text(f"open({str(marker)!r}, 'w')\nimport setuptools; setuptools.setup(name='boom')\n")
    if form == "archive":
        with tarfile.open(tmp_path / "boom-1.0.tar.gz", "w:gz") as archive:
            archive.add(source, "boom-1.0")
        source = tmp_path / "boom-1.0.tar.gz"
    wheel(code / "wheels", "trojan", needs=[f"boom @ {source.as_uri()}"])
    with pytest.raises(UserCodeRefused, match="only wheels are installed"):
        install("trojan\n" + HERE)
    assert not marker.exists()


def test_what_pip_found_that_is_no_wheel_is_refused(install, tmp_path, monkeypatch):
    import service.cluster.requirements as module

    class Found(module._Pip):
        def run(self, *arguments):
            report = {"url": "https://example.org/boom-1.0.tar.gz#x.whl", "archive_info": {}}
            text = json.dumps({"install": [{"download_info": report, "metadata": {"name": "boom"}}]})
            Path(arguments[arguments.index("--report") + 1]).write_text(text)

    monkeypatch.setattr(module, "_Pip", Found)
    with pytest.raises(UserCodeRefused, match=r"needs boom .* no wheel"):
        install("boom\n")


@pytest.mark.parametrize(
    "line",
    [
        "-e .", "--editable .", "-r other.txt", "-c other.txt", "--no-binary :all:", "--no-binary=tiny", ".",
        "./wheels", "--trusted-host example.org", "--target /", "--prefix=/", "--root /", "--config-settings x",
        "--no-index x",
        "git+https://example.org/x.git", "tiny @ git+https://example.org/x.git", "tiny @ file:///etc/passwd",
        "https://example.org/x.tar.gz", "tiny @ https://example.org/x.tar.gz", "file:///x.whl", "../x.whl", "/x.whl",
        "--find-links ..", "--find-links /etc", "--find-links none", "--find-links file:///etc", "-i file:///etc",
        "--index-url", "tiny; import os", "tiny --global-option=x", "tiny --install-option=x", "tiny --only-binary",
        "'",
        '--index-url "https://example.org/simple --no-binary=tiny"', '-i "https://example.org/ --pre"',
        "-i http://example.org/simple", "-f http://example.org/wheels", "-i https:///simple", "-i https://x/#y",
        '--find-links "https://example.org/ --no-binary=tiny"', "--find-links wheels/tiny-1.0-py3-none-any.whl",
        "tiny @ http://example.org/tiny-1.0-py3-none-any.whl", "http://example.org/tiny-1.0-py3-none-any.whl",
        "tiny @ https://example.org/tiny-1.0.tar.gz#x.whl", "https://example.org/tiny-1.0.tar.gz#x.whl",
        "https://example.org/tiny-1.0.tar.gz?x.whl", "https://example.org/x.tar.gz --no-binary=:all: .whl",
        "https://example.org/tiny-1.0-py3-none-any.whl#subdirectory=x", "folder-1.0-py3-none-any.whl", "odd.whl",
        "tiny ; os_name != ' --no-binary=tiny '",
    ],
)  # fmt: skip
def test_what_would_run_code_or_leave_the_bundle_is_refused_with_its_line(code, line):
    (code / "folder-1.0-py3-none-any.whl").mkdir()
    (code / "odd.whl").write_bytes(b"")
    (code / "requirements.txt").write_text(f"# a comment\n\nnumpy\n{line}\n")
    with pytest.raises(UserCodeRefused, match=r"^Line 4 of the bundle's requirements\.txt"):
        read_requirements(code, SHA256)


@pytest.mark.parametrize(
    "line",
    [
        "tiny", "tiny==1.0", "tiny[extra]>=1,<2 ; python_version >= '3.9'  # why", "tiny==1.0 --hash=sha256:" + SHA256,
        "-i https://example.org/simple", "--extra-index-url=https://example.org/simple", "--pre", "--require-hashes",
        "--find-links https://example.org/wheels", "-f wheels", "tiny @ https://example.org/tiny-1.0-py3-none-any.whl",
        "https://example.org/tiny-1.0-py3-none-any.whl", f"https://u:p@example.org/tiny-1.0-py3-none-any.whl#sha256={SHA256}",
        "wheels/tiny-1.0-py3-none-any.whl", "tiny \\\n  >=1.0",
    ],
)  # fmt: skip
def test_what_is_usual_is_allowed(code, line):
    (code / "requirements.txt").write_text(line + "\n")
    assert read_requirements(code, SHA256).lines


def test_a_name_in_the_bundle_is_never_an_option(install, code):
    wheel(code / "w --pre", "other")
    lines = ["--no-index", "--find-links 'w --pre'", "w --pre/other-1.0-py3-none-any.whl"]
    target = install("\n".join(lines))
    assert (target / "other.py").exists()
    assert not any(" --pre" in line for line in read_requirements(code, SHA256).lines)


def test_a_bundle_without_readable_requirements_is_refused(code):
    with pytest.raises(UserCodeRefused, match=r"no requirements\.txt at its top"):
        read_requirements(code, SHA256)
    (code / "requirements.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserCodeRefused, match="no UTF-8"):
        read_requirements(code, SHA256)
    (code / "requirements.txt").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UserCodeRefused, match="more than"):
        read_requirements(code, SHA256)


def test_the_key_is_of_what_decides_the_result(code, monkeypatch):
    import service.cluster.requirements as module

    def key(text, bundle=SHA256):
        (code / "requirements.txt").write_text(text)
        return read_requirements(code, bundle).key

    assert key("numpy\n") == key("numpy\n", "1" * 64)
    assert key("numpy\n") != key("torch\n")
    # Where wheels of the bundle are used, it counts.
    assert key(HERE + "tiny\n") != key(HERE + "tiny\n", "1" * 64)
    before = key("numpy\n")
    monkeypatch.setattr(module, "installed", lambda: ("torch==1.0",))
    assert key("numpy\n") != before


def test_constraints_are_what_is_installed():
    assert f"torch=={version('torch')}" in installed()


def test_the_time_of_a_note_is_no_answer_of_an_index():
    from service.cluster.requirements import _MAY_PASS

    assert not _MAY_PASS.search("2026-11-23T05:44:08,512 ERROR: No matching distribution found for absent-thing")
    assert _MAY_PASS.search("503 Server Error: Service Unavailable for url: https://index.example/simple/")
