"""The job's own code on the path. A failure means modules of the bundle that are not found, or that replace what the
service has, or bytecode in a directory that is compared with its hashes."""

import subprocess
import sys
from pathlib import Path

import pytest

from service.domain.rank_protocol import RankTask
from tests.fakes import spec

ROOT = Path(__file__).parents[3]


@pytest.fixture
def brought(tmp_path):
    """Runs statements in a process that was brought code and packages."""
    for name, text in {
        "code/mine.py": "import both, helper\nwhere = 'bundle'\n",
        "code/both.py": "where = 'bundle'\n",
        "code/queue.py": "where = 'bundle'\n",
        "code/pkg/__init__.py": "",
        "packages/helper.py": "where = 'packages'\n",
        "packages/both.py": "where = 'packages'\n",
        "packages/numpy/__init__.py": "where = 'packages'\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(statements, **changes):
        task = RankTask(
            job_id="job", attempt=1, spec=spec(), rank=0, world_size=1, rendezvous_host="", rendezvous_port=1,
            rendezvous_fd=None, interface=None, num_threads=1, staging_dir="", resume_dir=None, collective_timeout_s=1,
            **{"code_dir": str(tmp_path / "code"), "packages_dir": str(tmp_path / "packages"), **changes},
        )  # fmt: skip
        script = f"""
import logging, queue, sys
sys.path.insert(0, {str(ROOT)!r})
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from service.domain.rank_protocol import RankTask
from service.training.code import bring_code
before = list(sys.path)
bring_code(RankTask.model_validate_json({task.model_dump_json()!r}))
{statements}
"""
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.splitlines()

    return run


def test_the_bundle_comes_first_and_packages_add_to_what_is_installed(brought, tmp_path):
    said = brought("""
import mine, numpy
print(mine.where, mine.both.where, mine.helper.where, hasattr(numpy, "ndarray"))
""")
    assert said[-1] == "bundle bundle packages True"
    assert not list(tmp_path.rglob("__pycache__"))


def test_a_name_that_is_taken_is_told(brought):
    (warning, last) = brought("import queue; print(hasattr(queue, 'Queue'))")
    assert "'queue'" in warning
    assert "Rename it" in warning
    assert last == "True"


def test_without_anything_brought_the_path_stays(brought):
    assert brought("print(sys.path == before)", code_dir=None, packages_dir=None) == ["True"]
