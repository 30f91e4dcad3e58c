"""Archives from outside. A failure means that a bundle may write where it should not, fill a disk, or be unpacked as
something else than was checked."""

import io
import os
import random
import stat
import struct

import pytest

from service.domain.errors import InvalidUpload
from service.storage.archive import ArchiveLimits, check_archive, check_directory, unpack_archive
from service.storage.uploads import DATASET_LIMITS
from tests.archives import HOSTILE, Entry, make_zip, raw_zip

GOOD = make_zip({"train.py": b"x = 1\n", "pkg/__init__.py": b"", "pkg/nät.py": b"y = 2\n" * 1000}, directories=["pkg"])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_by_name_and_leaves_nothing_outside(tmp_path, name):
    data, entry, part = HOSTILE[name]
    target = tmp_path / "outer" / "target"
    target.mkdir(parents=True)
    for act in (check_archive, lambda file: unpack_archive(file, target)):
        with pytest.raises(InvalidUpload) as caught:
            act(io.BytesIO(data))
        assert entry in [problem.field for problem in caught.value.problems]
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == ["outer"]
    assert os.listdir(tmp_path / "outer") == ["target"]


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "no zip archive"),
        (b"PK", "no zip archive"),
        (b"\x1f\x8b not a zip", "no zip archive"),
        (raw_zip(), "no zip archive"),
        (b"#!/bin/sh\n" + GOOD, "no zip archive"),
        (GOOD[:-30], "damaged"),
        (GOOD[: len(GOOD) // 2], "damaged"),
        (make_zip({}, directories=["a"]), "holds no file"),
        (b"PK\3\4" + b"PK\1\2" * 200_000, "more than 10000 entries"),
    ],
)
def test_what_is_no_archive_is_refused(data, part):
    with pytest.raises(InvalidUpload, match=part):
        check_archive(io.BytesIO(data))


def one_file_with_directory(directory_bytes, records=0):
    """An archive whose directory is as large as told, with so many records in it besides its first."""
    local, central = Entry("a").records(0)
    directory = (central + central * records).ljust(directory_bytes, b"\0")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(local), 0)
    return local + directory + end


def test_a_directory_that_would_fill_the_memory_is_not_read():
    class Watched(io.BytesIO):
        largest = 0

        def read(self, size=-1):
            content = super().read(size)
            self.largest = max(self.largest, len(content))
            return content

    limits = ArchiveLimits(entries=100)
    for data in (one_file_with_directory(4 << 20), one_file_with_directory(0, records=100)):
        file = Watched(data)
        with pytest.raises(InvalidUpload, match="more than 100 entries"):
            check_directory(file, limits)
        assert file.largest < 1 << 18
    # Nor is it with limits as they are for files of data, where many more entries are allowed.
    with pytest.raises(InvalidUpload, match="more than 500000 entries"):
        check_directory(io.BytesIO(one_file_with_directory((64 << 20) + 1)), DATASET_LIMITS)


def test_archives_in_an_archive_are_no_entries_of_it():
    inner = make_zip({f"{n}": b"" for n in range(50)})
    data = raw_zip(*(Entry(f"{n}.zip", inner, method=0) for n in range(5)))
    assert len(check_archive(io.BytesIO(data), ArchiveLimits(entries=5))) == 5


def test_limits_count_what_comes_out():
    data = make_zip({f"{n}.py": os.urandom(1000) for n in range(10)})
    check_archive(io.BytesIO(data), ArchiveLimits(entries=10, unpacked_bytes=10_000))
    with pytest.raises(InvalidUpload, match="more than 9 entries"):
        check_archive(io.BytesIO(data), ArchiveLimits(entries=9))
    with pytest.raises(InvalidUpload, match="more than 9999 bytes"):
        check_archive(io.BytesIO(data), ArchiveLimits(unpacked_bytes=9999))
    # Every size in the directory says 1: only counting finds it out.
    lying = raw_zip(*(Entry(f"{n}", os.urandom(1000), method=0, size=1) for n in range(10)))
    with pytest.raises(InvalidUpload, match=r"more than 500 bytes.*\n.*reaches the limit"):
        check_archive(io.BytesIO(lying), ArchiveLimits(unpacked_bytes=500))


def test_a_good_archive_is_unpacked_as_it_was_checked(tmp_path):
    checked = check_archive(io.BytesIO(GOOD))
    assert unpack_archive(io.BytesIO(GOOD), tmp_path) == checked
    assert [file.name for file in checked] == ["train.py", "pkg/__init__.py", "pkg/nät.py"]
    assert (tmp_path / "pkg" / "nät.py").read_bytes() == b"y = 2\n" * 1000
    for file in checked:
        mode = (tmp_path / file.name).stat().st_mode
        assert not mode & (stat.S_IWUSR | stat.S_IXUSR | stat.S_ISUID)


def test_nothing_is_written_over_and_no_link_is_followed(tmp_path):
    outside = tmp_path / "outside"
    target = tmp_path / "target"
    target.mkdir()
    (target / "train.py").symlink_to(outside)
    with pytest.raises(FileExistsError):
        unpack_archive(io.BytesIO(GOOD), target)
    assert not outside.exists()


def test_whatever_the_bytes_are_the_answer_is_a_refusal(tmp_path):
    random.seed(0)
    seeds = [GOOD, *(data for data, *_ in HOSTILE.values() if len(data) < 3000)]
    refused = 0
    for round_number in range(1500):
        data = bytearray(random.choice(seeds))
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        if random.random() < 0.2:
            del data[random.randrange(len(data)) :]
        target = tmp_path / str(round_number)
        target.mkdir()
        try:
            files = unpack_archive(io.BytesIO(data), target)
        except InvalidUpload:
            refused += 1
        else:
            assert sum(file.size_bytes for file in files) == sum(
                path.stat().st_size for path in target.rglob("*") if path.is_file()
            )
    assert 1000 < refused < 1500  # some changes, such as to a date, do no harm
