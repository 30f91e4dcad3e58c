"""Where the service is and which token it asks for."""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from service.client.errors import AuthenticationError, NoService

URL_VARIABLE = "SYNCBN_URL"
TOKEN_VARIABLE = "SYNCBN_TOKEN"  # noqa: S105 - the name of a variable
SERVICE_FILE = "service.json"
TOKEN_FILE = "token"  # noqa: S105 - the name of a file


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A service.

    Attributes:
        url: where it answers.
        token: what it asks for; not shown.
    """

    url: str
    token: str = field(repr=False)


def find_service(
    *,
    data_dir: Path,
    url: str | None = None,
    token: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Endpoint:
    """Find the service: what is given goes before the environment, and that before the data directory.

    Args:
        data_dir: of a service on this machine; ``syncbn serve`` leaves its URL and token there.
        url: of the service, where it is known.
        token: of the service, where it is known.
        environment: may hold ``SYNCBN_URL`` and ``SYNCBN_TOKEN``.

    Raises:
        NoService: the URL cannot be found.
        AuthenticationError: the token cannot be found.
    """
    url = url or environment.get(URL_VARIABLE) or None
    token = token or environment.get(TOKEN_VARIABLE) or None
    of_this_machine = url is None or is_loopback(url)
    if url is None:
        url = _read_url(data_dir)
    if token is None:
        # The token of the service here is no business of a service elsewhere.
        if not of_this_machine:
            raise AuthenticationError(f"The service at {url} asks for a token. Give --token, or set {TOKEN_VARIABLE}.")
        token = _read_token(data_dir)
    return Endpoint(url=url.rstrip("/"), token=token.strip())


def is_loopback(url: str) -> bool:
    """Say whether a URL leads to this machine."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        return False
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_url(data_dir: Path) -> str:
    path = data_dir / SERVICE_FILE
    try:
        url = json.loads(path.read_text())["url"]
    except FileNotFoundError:
        raise NoService(
            f"No service is known: there is no {path}. Start one with `syncbn serve`, or name one with --url or "
            f"{URL_VARIABLE}, or its data directory with --data-dir."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoService(f"{path} cannot be read: {error!r}. Restart the service, or name it with --url.") from None
    return str(url)


def _read_token(data_dir: Path) -> str:
    path = data_dir / TOKEN_FILE
    try:
        return path.read_text()
    except OSError as error:
        raise AuthenticationError(
            f"The service's token cannot be read: {error}. Give --token, or set {TOKEN_VARIABLE}."
        ) from None
