"""A node's cache. A failure means ranks that share something half made, damaged, or removed under their feet."""

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.storage.node_cache import NodeCache, remove_tree


@pytest.fixture
def cache(tmp_path):
    return NodeCache(tmp_path / "cache", max_bytes=1000)


def maker(content=b"x" * 300, name="a/b.py"):
    def make(directory):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)

    return make


def refuse(_directory):
    raise AssertionError("it is there already")


def keys(cache, kind="bundles"):
    return sorted(path.name for path in (cache._root / kind).iterdir() if path.is_dir())


def test_an_entry_is_made_once_and_found_afterwards(cache):
    with cache.claim("bundles", "k", maker()) as first, cache.claim("bundles", "k", refuse) as second:
        assert first.path == second.path
        assert (first.path / "a" / "b.py").read_bytes() == b"x" * 300
    assert keys(cache) == ["k"]


def test_many_at_once_make_it_once_and_all_get_it_whole(cache):
    made = []
    barrier = threading.Barrier(8)

    def make(directory):
        made.append(directory)
        maker()(directory)

    def use(_):
        barrier.wait()
        with cache.claim("bundles", "k", make) as claim:
            return (claim.path / "a" / "b.py").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(8))) == {b"x" * 300}
    assert len(made) == 1
    assert keys(cache) == ["k"]


def test_making_removing_and_using_at_once(tmp_path):
    cache = NodeCache(tmp_path / "cache", max_bytes=700)  # two of the four fit

    def use(number):
        with cache.claim("bundles", f"k{number % 4}", maker(b"%d" % (number % 4) * 300)) as claim:
            return (claim.path / "a" / "b.py").read_bytes() == b"%d" % (number % 4) * 300

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(use, range(200)))
    with cache.claim("bundles", "last", maker()):
        assert len(keys(cache)) <= 2
    left = {path.name.partition(".")[2] for path in (tmp_path / "cache" / "bundles").iterdir()}
    assert left <= {"", "lock", "making"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: (content / "a" / "b.py").write_bytes(b"y" * 300),
        lambda content: (content / "a" / "b.py").write_bytes(b"x" * 299),
        lambda content: (content / "a" / "b.py").unlink(),
        lambda content: (content / "more.py").write_bytes(b""),
        lambda content: (content / "link.py").symlink_to("/etc/passwd"),
        lambda content: os.mkfifo(content / "pipe"),
        lambda content: (content.parent / "record.json").write_text("{"),
        lambda content: (content.parent / "record.json").unlink(),
        lambda content: shutil.rmtree(content),
    ],
)
def test_an_entry_that_is_not_what_it_was_is_made_anew(cache, damage):
    with cache.claim("bundles", "k", maker()) as claim:
        pass
    for directory in (claim.path, claim.path / "a"):
        directory.chmod(0o755)
    damage(claim.path)
    with cache.claim("bundles", "k", maker()) as claim:
        assert [path.name for path in claim.path.rglob("*")] == ["a", "b.py"]
        assert (claim.path / "a" / "b.py").read_bytes() == b"x" * 300
    assert keys(cache) == ["k"]


def test_one_that_is_damaged_while_in_use_stays_and_another_is_made_beside_it(cache, caplog):
    with cache.claim("bundles", "k", maker()) as first:
        (first.path / "a").chmod(0o755)
        (first.path / "a" / "cache.nbi").write_bytes(b"beside the code")
        with cache.claim("bundles", "k", maker()) as second, cache.claim("bundles", "k", refuse) as third:
            assert [path.name for path in second.path.rglob("*")] == ["a", "b.py"]
            assert third.path == second.path
            assert (first.path / "a" / "b.py").read_bytes() == b"x" * 300
    assert "was damaged" in caplog.text
    # Once nobody uses it, it goes: by need of room, or with the next one that is made.
    (second.path / "a").chmod(0o755)
    (second.path / "a" / "b.py").unlink()
    with cache.claim("bundles", "k", maker()):
        assert keys(cache) == ["k"]


def test_directories_are_read_only_and_go_all_the_same(cache):
    with cache.claim("bundles", "k", maker()) as claim:
        for directory in (claim.path, claim.path / "a"):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o555
    cache.claim("bundles", "large", maker(b"x" * 900)).close()
    assert keys(cache) == ["large"]
    remove_tree(cache._root)
    assert not cache._root.exists()


def test_what_cannot_be_made_leaves_nothing(cache):
    def fail(directory):
        (directory / "half").write_bytes(b"x")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cache.claim("bundles", "k", fail)
    assert keys(cache) == []
    with cache.claim("bundles", "k", maker()):
        assert keys(cache) == ["k"]


def test_the_least_recently_used_goes_and_never_one_in_use(cache):
    for key in ("a", "b", "c"):
        cache.claim("bundles", key, maker()).close()
    cache.claim("bundles", "a", refuse).close()
    with cache.claim("bundles", "b", refuse):
        for number, key in enumerate(("b", "c", "a")):  # from the oldest, but b is in use
            os.utime(cache._root / "bundles" / key, ns=(number, number))
        cache.claim("datasets", "d", maker()).close()
        assert keys(cache) == ["a", "b"]
        cache.claim("datasets", "e", maker(b"x" * 800)).close()
        assert (keys(cache), keys(cache, "datasets")) == (["b"], ["e"])
    assert sorted(path.name for path in (cache._root / "bundles").glob("*.lock")) == ["b.lock"]


def test_more_than_fits_is_kept_while_it_is_in_use(cache, caplog):
    with cache.claim("bundles", "a", maker(b"x" * 800)), cache.claim("bundles", "b", maker(b"x" * 800)):
        assert keys(cache) == ["a", "b"]
    assert "all in use" in caplog.text


def test_what_a_killed_process_left_is_cleared_and_its_claim_ends(cache, tmp_path):
    script = """
import os, signal, sys
from pathlib import Path
from service.storage.node_cache import NodeCache
cache = NodeCache(Path(sys.argv[1]), max_bytes=1000)
held = cache.claim("bundles", "old", lambda directory: (directory / "f").write_bytes(b"x" * 900))
def make(directory):
    (directory / "half").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)
cache.claim("bundles", "k", make)
"""
    root = Path(__file__).parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", script, str(cache._root)], env={**os.environ, "PYTHONPATH": str(root)}, timeout=30
    )
    assert killed.returncode == -9
    with cache.claim("bundles", "k", maker()):
        assert keys(cache) == ["k"]


def test_a_claim_is_let_go_when_it_is_closed(cache):
    claim = cache.claim("bundles", "k", maker())
    lock = cache._root / "bundles" / "k.lock"
    with lock.open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        claim.close()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    claim.close()
