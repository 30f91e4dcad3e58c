"""Hosts of one machine: network namespaces joined by a bridge, whose links can be cut and healed.

The bridge has a namespace of its own, so nothing of the machine's own network is touched. A cut link drops every packet
without a word to either side, as a broken switch would. Processes on different hosts share the machine's file systems,
but for the directories that a host is given for itself.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

# Of the bridge's ports, as in linux/if_bridge.h.
DISABLED, FORWARDING = "0", "3"
# Documentation addresses (RFC 5737) of which no machine makes use.
SUBNET = "198.51.100"
# Binds a host's own directories over the paths by which all hosts know them, then runs the command.
RUN_ON_HOST = """
set -e
while [ "$1" != -- ]; do mount --bind "$1" "$2"; shift 2; done
shift
exec "$@"
"""


class Host:
    """One network namespace with an address.

    Args:
        namespace: its name.
        address: of its one interface.
        port: of the bridge, that leads to it.
        own_dirs: paths that every host sees, each another directory under; by path, where this host's lies.
    """

    def __init__(self, namespace: str, *, address: str, port: str, own_dirs: Mapping[Path, Path]) -> None:
        self.namespace = namespace
        self.address = address
        self.port = port
        self.own_dirs = own_dirs

    def start(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: IO[bytes],
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a process here; a socket that it inherits stays in the namespace that it was made in."""
        binds = [str(path) for shared, own in self.own_dirs.items() for path in (own, shared)]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "sh", "-c", RUN_ON_HOST, "sh", *binds, "--", *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    def pids(self) -> set[int]:
        """Return the processes that run here."""
        return {int(pid) for pid in _ip("netns", "pids", self.namespace).split()}


class Network:
    """Hosts that reach each other until a link is cut.

    Args:
        hosts: by their addresses.
        bridge_namespace: where the bridge is.
    """

    def __init__(self, hosts: Sequence[Host], bridge_namespace: str) -> None:
        self.hosts = hosts
        self._bridge_namespace = bridge_namespace

    def cut(self, host: Host) -> None:
        """Let no packet through between a host and all others."""
        self._set_port(host, DISABLED)

    def heal(self, host: Host) -> None:
        """Let packets through again."""
        self._set_port(host, FORWARDING)

    def _set_port(self, host: Host, state: str) -> None:
        _ip("netns", "exec", self._bridge_namespace, "bridge", "link", "set", "dev", host.port, "state", state)


@contextmanager
def network(num_hosts: int, directory: Path, *, own: Sequence[Path] = ()) -> Iterator[Network]:
    """Make a network, and remove it with every process that still runs on its hosts.

    Args:
        num_hosts: how many.
        directory: for the hosts' own directories.
        own: paths, made where they are missing, under which every host has a directory of its own.
    """
    name = f"syncbn-{uuid.uuid4().hex[:8]}"
    bridge = f"{name}-bridge"
    namespaces = [bridge, *(f"{name}-{number}" for number in range(num_hosts))]
    try:
        for namespace in namespaces:
            _ip("netns", "add", namespace)
        _ip("-n", bridge, "link", "add", "name", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        hosts = [_make_host(number, namespaces[number + 1], bridge, directory, own) for number in range(num_hosts)]
        yield Network(hosts, bridge)
    finally:
        for namespace in namespaces:
            _remove(namespace)


def skip_without_namespaces() -> None:
    """Skip a test, with the reason, on a machine that makes no network namespaces; fail where they are required."""
    reason = _why_not()
    if reason and "netns" in os.environ.get("SYNCBN_REQUIRE", "").split(","):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _why_not() -> str:
    if shutil.which("ip") is None or shutil.which("bridge") is None:
        return "ip and bridge (iproute2) are not installed"
    probe = f"syncbn-{uuid.uuid4().hex[:8]}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no network namespace can be made: {made.stderr.strip()}"
    _ip("netns", "del", probe)
    return ""


def _make_host(number: int, namespace: str, bridge: str, directory: Path, own: Sequence[Path]) -> Host:
    own_dirs = {}
    for shared in own:
        shared.mkdir(parents=True, exist_ok=True)
        own_dirs[shared] = directory / f"host-{number}" / shared.name
        own_dirs[shared].mkdir(parents=True)
    port, address = f"port{number}", f"{SUBNET}.{number + 1}"
    _ip("-n", bridge, "link", "add", "name", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", bridge, "link", "set", port, "master", "br0", "up")
    _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", interface, "up")
    return Host(namespace, address=address, port=port, own_dirs=own_dirs)


def _remove(namespace: str) -> None:
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
