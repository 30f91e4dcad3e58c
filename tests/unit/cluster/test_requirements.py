"""Requirements of a bundle, installed without a network. A failure means that installing runs what a job brings,
replaces what the service has, or leaves its owner in the dark."""

import hashlib
import os
import subprocess
import sys
import time
from importlib.metadata import version

import pytest

from service.cluster.node_agent import training_environment
from service.cluster.requirements import install_requirements, installed, read_requirements
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


def test_a_deadline_ends_pip(install, monkeypatch):
    import service.cluster.requirements as module

    monkeypatch.setattr(module, "_START_PIP", "import time; print('so far', flush=True); time.sleep(1000)")
    started = time.monotonic()
    with pytest.raises(UserCodeRefused, match=r"within its time(?s:.*)so far"):
        install(HERE + "tiny\n", deadline_s=1.0)
    assert time.monotonic() - started < 20


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
    ],
)  # fmt: skip
def test_what_would_run_code_or_leave_the_bundle_is_refused_with_its_line(code, line):
    (code / "requirements.txt").write_text(f"# a comment\n\nnumpy\n{line}\n")
    with pytest.raises(UserCodeRefused, match=r"^Line 4 of the bundle's requirements\.txt"):
        read_requirements(code, SHA256)


@pytest.mark.parametrize(
    "line",
    [
        "tiny", "tiny==1.0", "tiny[extra]>=1,<2 ; python_version >= '3.9'  # why", "tiny==1.0 --hash=sha256:" + SHA256,
        "-i https://example.org/simple", "--extra-index-url=https://example.org/simple", "--pre", "--require-hashes",
        "--find-links https://example.org/wheels", "-f wheels", "tiny @ https://example.org/tiny-1.0-py3-none-any.whl",
        "https://example.org/tiny-1.0-py3-none-any.whl", "wheels/tiny-1.0-py3-none-any.whl", "tiny \\\n  >=1.0",
    ],
)  # fmt: skip
def test_what_is_usual_is_allowed(code, line):
    (code / "requirements.txt").write_text(line + "\n")
    assert read_requirements(code, SHA256).lines


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
