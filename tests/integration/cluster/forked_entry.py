"""What a forked process does in these tests: it carries out orders that come through its channel, one per line.

It never ends by itself when the channel closes, so that whatever ends it is the forkserver or the kernel.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from service.domain.rank_protocol import RankTask
from service.training.code import bring_code


def main(task_json: str, channel_fd: int) -> int:
    with socket.socket(fileno=channel_fd) as channel, channel.makefile("rw") as lines:
        for line in lines:
            order = json.loads(line)
            if order["do"] == "return":
                return order["status"]
            answer = ORDERS[order.pop("do")](task_json=task_json, **order)
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    while True:
        signal.pause()


def describe(*, task_json):
    descriptors = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the one that listed them
    return {
        "task_json": task_json,
        "pid": os.getpid(),
        "parent_pid": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "descriptors": descriptors,
        "environment": dict(os.environ),
        "oom_score_adj": int(Path("/proc/self/oom_score_adj").read_text()),
    }


def say(*, task_json, text):
    print(text, flush=True)
    print(text.upper(), file=sys.stderr, flush=True)
    subprocess.run(["echo", "from a helper:", text], check=True)


def spawn(*, task_json):
    return subprocess.Popen(["sleep", "1000"]).pid


def bring(*, task_json, module, function):
    """Bring the task's code as a rank does, and call a function of it."""
    bring_code(RankTask.model_validate_json(task_json))
    return getattr(importlib.import_module(module), function)()


def linger(*, task_json, fifo):
    """Keep a member in this process's group that cannot be buried until somebody opens the FIFO for writing.

    The member's parent has left the group, so it outlives the group's end, and waits for no child.
    """
    group = os.getpgid(0)
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setpgid(0, 0)
        if os.fork() == 0:
            os.setpgid(0, group)
            os.write(write_end, b"joined")
            while True:
                signal.pause()
        os.close(os.open(fifo, os.O_RDONLY))
        os._exit(0)
    os.read(read_end, 6)
    os.close(read_end)
    os.close(write_end)


def meet(*, task_json, fd):
    """Accept one connection on an inherited listening socket and greet it."""
    with socket.socket(fileno=fd) as listener:
        connection, _ = listener.accept()
    with connection:
        connection.sendall(b"hello")


def die(*, task_json, signal_number):
    os.kill(os.getpid(), signal_number)
    signal.pause()


def fail(*, task_json):
    raise RuntimeError("as ordered")


def leave(*, task_json, status):
    sys.exit(status)


ORDERS = {"describe": describe, "say": say, "spawn": spawn, "bring": bring, "linger": linger, "meet": meet}
ORDERS |= {"die": die, "fail": fail, "leave": leave}
