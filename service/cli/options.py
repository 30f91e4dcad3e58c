"""What the options of all commands say: which service, and with which token."""

import getpass
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from service.cli.output import say

if TYPE_CHECKING:
    from service.client.client import Client
    from service.client.discovery import Endpoint


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options of all commands.

    Attributes:
        url: of the service, if given.
        token: what it asks for, if given; not shown.
        data_dir: of a service on this machine, if given.
    """

    url: str | None
    token: str | None = field(repr=False)
    data_dir: Path | None

    def find(self) -> "Endpoint":
        """Return where the service is. Raises ``NoService``."""
        from service.client.discovery import find_service  # noqa: PLC0415 - commands that need no service start faster
        from service.settings import default_data_dir  # noqa: PLC0415

        named = os.environ.get("SYNCBN_DATA_DIR")
        data_dir = self.data_dir or (Path(named) if named else default_data_dir())
        return find_service(data_dir=data_dir, url=self.url, token=self.token)

    def client(self, *, reconnect_for_s: float | None = 60.0) -> "Client":
        """Return a client of the service. Raises ``ClientError``."""
        from service.client.client import Client  # noqa: PLC0415 - as above

        endpoint = self.find()
        return Client(
            endpoint.url,
            endpoint.token,
            owner=_owner(),
            retry_for_s=3.0,
            reconnect_for_s=reconnect_for_s,
            locate=self.find,
            on_interruption=lambda: say("The service does not answer; trying to reach it again. The job goes on."),
        )


def _owner() -> str | None:
    """Whose the jobs are that this person submits: the name of the user, where there is one that can be used."""
    named = os.environ.get("SYNCBN_OWNER")
    if named:
        return named  # refused by the service where it cannot be one
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return None
    return user if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", user) else None
