"""Whether the process lives and whether it can serve; the only routes without a token."""

from fastapi import APIRouter

from service.api.parts import AppParts
from service.api.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """Say that the process answers."""
    return Health(status="ok")


@router.get("/readyz")
def readyz(parts: AppParts) -> Health:
    """Say that the database answers too; 503 if it does not."""
    parts.store.ping()
    return Health(status="ready")
