"""Requests that may be repeated without a second effect."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.domain.errors import IdempotencyConflict
from service.domain.ports import IdempotencyKey
from service.store.bulk import insert_rows
from service.store.tables import idempotency_keys

Name = tuple[str, str, str]
"""What a key is known by: owner, route, key."""

Holder = tuple[str, str]
"""Hash of the body that a key first came with, and what it was answered with."""


def name_of(key: IdempotencyKey) -> Name:
    """Return what a key is known by, whatever the body it came with."""
    return key.owner, key.route, key.key


def claim_key(connection: Connection, key: IdempotencyKey, response: str, time: datetime) -> str | None:
    """Take a key for the effect of this transaction, or return the response of the one that has it.

    Waits for a transaction that is about to take the same key.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    return None if _insert(connection, {key: response}, time) else find_response(connection, key)


def claim_keys(connection: Connection, responses: Mapping[IdempotencyKey, str], time: datetime) -> set[IdempotencyKey]:
    """Take keys for the effects of this transaction; return those that another has.

    Waits for transactions that are about to take the same keys.

    Args:
        connection: in a transaction for writing.
        responses: what each key is to be answered with, different for every attempt to take it.
        time: now.
    """
    if _insert(connection, responses, time) == len(responses):
        return set()
    present = find_responses(connection, responses)
    return {key for key, response in responses.items() if present[name_of(key)][1] != response}


def find_response(connection: Connection, key: IdempotencyKey) -> str | None:
    """Return the response of the request that has a key; None if there is none.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    found = find_responses(connection, [key]).get(name_of(key))
    if found is None:
        return None
    body_sha256, response = found
    check_body(key, body_sha256)
    return response


def find_responses(connection: Connection, keys: Iterable[IdempotencyKey]) -> dict[Name, Holder]:
    """Return the hash of the body and the response of the requests that have these keys, as far as there are any."""
    of_route: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for key in keys:
        of_route[key.owner, key.route].append(key.key)
    return {
        (owner, route, row.key): (row.body_sha256, row.response)
        for (owner, route), wanted in of_route.items()
        for row in connection.execute(
            sa.select(idempotency_keys.c.key, idempotency_keys.c.body_sha256, idempotency_keys.c.response).where(
                idempotency_keys.c.owner == owner,
                idempotency_keys.c.route == route,
                idempotency_keys.c.key.in_(wanted),
            )
        )
    }


def check_body(key: IdempotencyKey, body_sha256: str) -> None:
    """Refuse a key that was used with another body. Raises ``IdempotencyConflict``."""
    if body_sha256 != key.body_sha256:
        raise IdempotencyConflict(
            f"The idempotency key {key.key!r} was used before with another body. Use a new key for a new request."
        )


def _insert(connection: Connection, responses: Mapping[IdempotencyKey, str], time: datetime) -> int:
    """Write the keys that nobody has, and return their number."""
    rows = [
        {
            "owner": key.owner,
            "route": key.route,
            "key": key.key,
            "body_sha256": key.body_sha256,
            "response": response,
            "created_at": time,
        }
        # In one order, so that two transactions never wait for each other.
        for key, response in sorted(responses.items(), key=lambda item: name_of(item[0]))
    ]
    return insert_rows(connection, idempotency_keys, rows, on_conflict="skip")
