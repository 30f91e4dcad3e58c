"""Zip archives for tests, well-formed and hostile; the hostile ones are made byte by byte where zipfile refuses."""

import io
import stat
import struct
import zipfile
import zlib


def make_zip(files, *, directories=()):
    """Return the bytes of an archive; ``files`` maps names to contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in directories:
            archive.writestr(f"{name}/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def raw_zip(*entries):
    """Return the bytes of an archive whose every field is as told, whether it makes sense or not."""
    body, directory = b"", b""
    for entry in entries:
        local, central = entry.records(len(body))
        body += local
        directory += central
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + end


class Entry:
    """An entry; what is not given is as it should be."""

    def __init__(self, name, content=b"x = 1\n", *, mode=stat.S_IFREG | 0o644, flags=0, method=8, size=None, crc=None):
        self.name = name if isinstance(name, bytes) else name.encode()
        self.mode, self.flags, self.method = mode, flags, method
        self.size = len(content) if size is None else size
        self.crc = zlib.crc32(content) if crc is None else crc
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        self.data = deflate.compress(content) + deflate.flush() if method == 8 else content

    def records(self, offset):
        shared = struct.pack(
            "<5H3L2H", 20, self.flags, self.method, 0, 33, self.crc, len(self.data), self.size, len(self.name), 0
        )
        local = b"PK\3\4" + shared + self.name + self.data
        central = b"PK\1\2" + struct.pack("<H", 0x0314) + shared
        central += struct.pack("<3H2L", 0, 0, 0, self.mode << 16, offset) + self.name
        return local, central


UTF8 = 0x800
HOSTILE = {
    "parent": (raw_zip(Entry("../evil.py")), "../evil.py", "leads out"),
    "parent inside": (raw_zip(Entry("a/../../evil.py")), "a/../../evil.py", "leads out"),
    "absolute": (raw_zip(Entry("/etc/evil.py")), "/etc/evil.py", "absolute"),
    "drive": (raw_zip(Entry("C:evil.py")), "C:evil.py", "absolute"),
    "backslash": (raw_zip(Entry("a\\evil.py")), "a\\evil.py", "backslash"),
    "nul": (raw_zip(Entry("a.py\0.txt")), "a.py\0.txt", "control character"),
    "escape": (raw_zip(Entry("\x1b[2Ja.py")), "\x1b[2Ja.py", "control character"),
    "empty part": (raw_zip(Entry("a//b.py")), "a//b.py", "empty part"),
    "dot": (raw_zip(Entry("./b.py")), "./b.py", "empty part"),
    "no name": (raw_zip(Entry("")), "", "empty part"),
    "long part": (raw_zip(Entry("a" * 256)), "a" * 256, "255 bytes"),
    "long path": (raw_zip(Entry("/".join(["a" * 200] * 6))), "/".join(["a" * 200] * 6), "1024"),
    "not utf-8": (raw_zip(Entry(b"\xff.py", flags=UTF8)), "\\xff.py", "not valid UTF-8"),
    "surrogate": (raw_zip(Entry(b"\xed\xa0\x80.py", flags=UTF8)), "\\xed\\xa0\\x80.py", "not valid UTF-8"),
    "not said to be utf-8": (raw_zip(Entry("é.py")), "├⌐.py", "not said to be UTF-8"),
    "link": (raw_zip(Entry("a", b"/etc/passwd", mode=stat.S_IFLNK | 0o777)), "a", "a link"),
    "device": (raw_zip(Entry("a", b"", mode=stat.S_IFBLK | 0o666)), "a", "a device"),
    "pipe": (raw_zip(Entry("a", b"", mode=stat.S_IFIFO | 0o666)), "a", "a device"),
    "directory with a file's name": (raw_zip(Entry("a", mode=stat.S_IFDIR | 0o755)), "a", "by one mark"),
    "file with a directory's name": (raw_zip(Entry("a/", b"x")), "a/", "by one mark"),
    "twice": (raw_zip(Entry("a.py"), Entry("a.py")), "a.py", "more than once"),
    "case": (raw_zip(Entry("straße.py", flags=UTF8), Entry("STRASSE.py")), "STRASSE.py", "only in case"),
    "composed": (raw_zip(Entry("é", flags=UTF8), Entry("e\u0301", flags=UTF8)), "é", "only in case"),
    "below a file": (raw_zip(Entry("a"), Entry("A/b")), "A/b", "below a path"),
    "encrypted": (raw_zip(Entry("a", flags=1)), "a", "encrypted"),
    "bzip2": (raw_zip(Entry("a", method=12)), "a", "method 12"),
    "bomb by ratio": (raw_zip(Entry("zeros", b"\0" * (4 << 20))), "zeros", "compressed more than 200 times"),
    "bomb that says it is small": (
        raw_zip(Entry("zeros", b"\0" * (4 << 20), size=100)), "zeros", "compressed more than 200 times",
    ),
    "size that lies": (raw_zip(Entry("a", b"x" * 1000, size=10)), "a", "holds 1000 bytes where the archive says 10"),
    "stored size that lies": (raw_zip(Entry("a", b"x" * 50, method=0, size=10)), "a", "holds 50 bytes"),
    "wrong checksum": (raw_zip(Entry("a", crc=1)), "a", "Bad CRC-32"),
    "not deflated": (
        raw_zip(Entry("a", b"\xff" * 40, method=0)).replace(b"\0\0\0\0!\0", b"\x08\0\0\0!\0"), "a", "cannot be read",
    ),
}  # fmt: skip
