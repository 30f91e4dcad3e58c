"""Requests that may be repeated without a second effect."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from service.domain.errors import IdempotencyConflict
from service.domain.ports import IdempotencyKey
from service.store.tables import idempotency_keys


def claim_key(connection: Connection, key: IdempotencyKey, response: str, time: datetime) -> str | None:
    """Take a key for the effect of this transaction, or return the response of the one that has it.

    Waits for a transaction that is about to take the same key.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    claimed = connection.execute(
        insert(idempotency_keys).on_conflict_do_nothing().returning(idempotency_keys.c.response),
        {
            "owner": key.owner,
            "route": key.route,
            "key": key.key,
            "body_sha256": key.body_sha256,
            "response": response,
            "created_at": time,
        },
    ).first()
    return None if claimed else find_response(connection, key)


def find_response(connection: Connection, key: IdempotencyKey) -> str | None:
    """Return the response of the request that has a key; None if there is none.

    Raises:
        IdempotencyConflict: the key was used with another body.
    """
    earlier = connection.execute(
        sa.select(idempotency_keys.c.body_sha256, idempotency_keys.c.response).where(
            idempotency_keys.c.owner == key.owner,
            idempotency_keys.c.route == key.route,
            idempotency_keys.c.key == key.key,
        )
    ).one_or_none()
    if earlier is None:
        return None
    if earlier.body_sha256 != key.body_sha256:
        raise IdempotencyConflict(
            f"The idempotency key {key.key!r} was used before with another body. Use a new key for a new request."
        )
    return str(earlier.response)
