"""Starts one process of the service by name: ``python -m service migrate|api|scheduler``.

Settings come from the environment; ``migrate`` makes the database's tables and ends.

``syncbn serve`` starts these on one machine.
"""

import argparse
import os
import signal
import socket

from service.linux import die_with_parent
from service.settings import Settings
from service.wiring import migrate_database, run_api, run_scheduler


def main() -> None:
    """Parse the command line and run the process."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("process", choices=["migrate", "api", "scheduler"])
    parser.add_argument("--listen-fd", type=int, help="api: an inherited socket that is listening already")
    parser.add_argument("--host", default="127.0.0.1", help="api: address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="api: port to listen on")
    parser.add_argument("--parent-pid", type=int, help="end when this process, the parent, ends")
    arguments = parser.parse_args()
    if arguments.parent_pid is not None:
        die_with_parent(arguments.parent_pid, signal.SIGKILL)
    settings = Settings()
    if arguments.process == "migrate":
        migrate_database(settings)
    elif arguments.process == "scheduler":
        run_scheduler(settings)
    else:
        inherited = None if arguments.listen_fd is None else socket.socket(fileno=arguments.listen_fd)
        run_api(settings, inherited, host=arguments.host, port=arguments.port)


if __name__ == "__main__":
    os.umask(0o077)
    main()
