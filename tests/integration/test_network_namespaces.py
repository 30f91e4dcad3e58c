"""The hosts that other tests are made of. A failure means that what those tests show is not what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.embedded_service import wait_until
from tests.netns import Host, Network, network, skip_without_namespaces

pytestmark = pytest.mark.netns

SERVE = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('ready', flush=True)\nwhile True: s.accept()"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=float(sys.argv[2]))"
# A packet crosses a bridge in microseconds; this is for a machine that is busy with others.
PATIENCE_S = "10"
# Long enough for a first packet, its ARP and one repetition.
IMPATIENCE_S = "2.5"


def _run(host: Host, *command: str) -> int:
    return host.start(command, environment={}, output=subprocess.DEVNULL).wait(30)


def _reaches(host: Host, other: Host, timeout_s: str) -> bool:
    return _run(host, sys.executable, "-c", CONNECT, other.address, timeout_s) == 0


def test_a_link_that_is_cut_carries_nothing_until_it_is_healed(tmp_path: Path) -> None:
    skip_without_namespaces()
    shared = tmp_path / "shared"
    with network(2, tmp_path, own=[shared]) as joined:
        assert isinstance(joined, Network)
        first, second = joined.hosts
        log = tmp_path / "log"
        with log.open("wb") as output:
            server = second.start([sys.executable, "-u", "-c", SERVE], environment={}, output=output)
        wait_until(lambda: log.read_bytes() == b"ready\n", 30, log.read_text)
        assert _reaches(first, second, PATIENCE_S)
        joined.cut(second)
        assert not _reaches(first, second, IMPATIENCE_S)
        joined.heal(second)
        assert _reaches(first, second, PATIENCE_S)
        assert _run(first, "touch", str(shared / "of-the-first")) == 0
        assert _run(second, "test", "-e", str(shared / "of-the-first")) == 1
        assert list(shared.iterdir()) == []
        assert server.pid in second.pids()
        assert server.pid not in first.pids()
    assert server.wait(10) == -9
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.namespace not in names
