"""Who runs when and where: a pure policy, for the scheduler that carries it out and the API that foretells it."""

from service.domain.scheduling.active import Active
from service.domain.scheduling.decision import Cause, Decision, Preemption, Reservation, Resize, Start, Wait, Why
from service.domain.scheduling.foretelling import foretell
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.policy import decide
from service.domain.scheduling.shares import HALF_LIFE_S, accrued

__all__ = [
    "HALF_LIFE_S",
    "Active",
    "Cause",
    "Decision",
    "Pending",
    "Preemption",
    "Reservation",
    "Resize",
    "Start",
    "Wait",
    "Why",
    "accrued",
    "decide",
    "foretell",
]
