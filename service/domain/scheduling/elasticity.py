"""Which elastic jobs go on with more or fewer workers."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from service.domain.scheduling.active import Active, most_of
from service.domain.scheduling.amount import holds
from service.domain.scheduling.decision import Resize
from service.domain.scheduling.pending import Pending
from service.domain.scheduling.quotas import Ledger
from service.domain.scheduling.room import Room


def give_back(active: Iterable[Active]) -> tuple[Resize, ...]:
    """Have those that have more workers than their owners asked for give the others back."""
    resizes = []
    for job in active:
        most = job.worlds[0]
        if job.is_movable and job.world > most:
            message = f"Asked to stop: to go on with {most} worker(s), as was asked for."
            resizes.append(Resize(job_id=job.id, node_ids=job.part(most), message=message))
    return tuple(resizes)


def with_spare(coming: Room, active: Iterable[Active]) -> Room:
    """Return the room there would be if every elastic job had as few workers as it can."""
    spare = coming.copy()
    for job in active:
        if not job.is_stopping and job.world > job.worlds[-1]:
            spare.give(job.spare, job.amount)
    return spare


def make_room(head: Pending, movable: Iterable[Active], coming: Room) -> tuple[Resize, ...]:
    """Return the least that elastic jobs have to give up for a job to start; nothing if all they can does not do it.

    Those of the lowest priority give first, then the latest. They stay where they have the most ranks, unless they are
    just there in the way.

    Args:
        head: the job.
        movable: elastic jobs that could be asked.
        coming: what will be free without them.
    """
    givers = sorted(movable, key=lambda job: (job.priority, -job.sequence))
    return _shrink(head, givers, coming.copy()) or _step_aside(head, givers, coming.copy())


def _shrink(head: Pending, givers: Iterable[Active], coming: Room) -> tuple[Resize, ...]:
    shrinks: list[tuple[Active, int]] = []
    for job in givers:
        world = _least_shrink(head, job, coming)
        if world is not None:
            shrinks.append((job, world))
            coming.give(job.beside(world), job.amount)
            if _fits(head, coming):
                return _needed(head, shrinks, coming)
    return ()


def _step_aside(head: Pending, givers: Sequence[Active], room: Room) -> tuple[Resize, ...]:
    """Place the job as if so many of the elastic ones were not there, and leave them what it does not take."""
    for num_givers, giver in enumerate(givers, start=1):
        room.give(giver.own, giver.amount)
        places = room.place(head.fewest, head.amount, layout=head.layout)
        if places is None:
            continue
        rest = room.copy()
        rest.take(Counter(places), head.amount)
        resizes = []
        for job in reversed(givers[:num_givers]):  # the most important first
            left = {node: min(count, holds(rest.free[node], job.amount)) for node, count in job.own.items()}
            world = next((world for world in job.worlds if world <= min(job.world, sum(left.values()))), None)
            if world is None:
                break
            kept = most_of(left, world)
            rest.take(Counter(kept), job.amount)
            if world < job.world:
                resizes.append(_smaller(job, kept, head))
        else:
            return tuple(reversed(resizes))
    return ()


def _smaller(job: Active, node_ids: tuple[str, ...], head: Pending) -> Resize:
    message = f"Asked to stop: to go on with {len(node_ids)} worker(s), so that job {head.id} can start."
    return Resize(job_id=job.id, node_ids=node_ids, message=message)


def widened(
    job: Pending, node_ids: tuple[str, ...], room: Room, ledger: Ledger, *, is_room_held: bool
) -> tuple[str, ...]:
    """Return places for a job that starts on the largest world that fits, and take the room for it.

    Args:
        job: the job.
        node_ids: where it starts on its fewest ranks; taken from the room already.
        room: what others have no use for.
        ledger: what is held against quotas.
        is_room_held: whether room is held for jobs that start later: then its fewest ranks stay where they are in
            nobody's way, and the others, which it can give up, come to them.
    """
    world = len(node_ids)
    room.give(Counter(node_ids), job.amount)
    num_fitting = room.num_fitting(job.amount)
    most = next(
        (more for more in job.worlds if more <= num_fitting and ledger.exceeded_by(job, more - world, 0) is None), world
    )
    places = _larger(job, Counter(node_ids), most, room, is_room_held) if most > world else None
    if places is None:
        places = node_ids
    room.take(Counter(places), job.amount)
    ledger.take(job, len(places) - world, 0)
    return places


def grow(movable: Iterable[Active], room: Room, ledger: Ledger, *, is_room_held: bool) -> tuple[Resize, ...]:
    """Give what is free to elastic jobs, highest priority first, then first come.

    One that was started or resized a moment ago is left alone, unless its owner asked for it.

    Args:
        movable: elastic jobs that could be asked.
        room: what others have no use for.
        ledger: what is held against quotas.
        is_room_held: as for ``widened``.
    """
    grown = []
    for job in sorted(movable, key=lambda job: (-job.priority, job.sequence)):
        if not (job.is_resize_requested or job.is_settled):
            continue
        room.give(job.own, job.amount)
        num_fitting = room.num_fitting(job.amount)
        most = next((world for world in job.worlds if world <= num_fitting), 0)
        while most > job.world and ledger.exceeded_by(job, most - job.world, 0) is not None:
            most = next((world for world in job.worlds if world < most), 0)
        places = _larger(job, job.own, most, room, is_room_held) if most > job.world else None
        if places is None:
            room.take(job.own, job.amount)
            continue
        room.take(job.own | Counter(places), job.amount)  # until the present attempt has ended, both
        ledger.take(job, len(places) - job.world, 0)
        message = f"Asked to stop: to go on with {len(places)} worker(s), for whom there is room."
        grown.append(Resize(job_id=job.id, node_ids=places, message=message))
    return tuple(grown)


def _larger(
    job: Pending | Active, own: Counter[str], world: int, room: Room, is_room_held: bool
) -> tuple[str, ...] | None:
    """Return places for more ranks than a job has, in room that includes its own; None if they do not fit."""
    if not is_room_held:
        return room.place(world, job.amount, layout=job.layout)
    rest = room.copy()
    rest.take(own, job.amount)
    more = rest.place(world - own.total(), job.amount, layout=job.layout)
    return None if more is None else tuple((own + Counter(more)).elements())  # those of a node together


def _fits(job: Pending, room: Room) -> bool:
    return job.fewest <= room.num_fitting(job.amount)


def _least_shrink(head: Pending, job: Active, coming: Room) -> int | None:
    """Return the largest world of one job that lets another start, or else its smallest; None if it can spare none."""
    shrinks = [world for world in job.worlds if world < job.world]
    if not shrinks:
        return None

    def is_enough(world: int) -> bool:
        trial = coming.copy()
        trial.give(job.beside(world), job.amount)
        return _fits(head, trial)

    # The fewer stay, the more room there is on every node: what is enough for one world is for all below it.
    least = bisect_left(shrinks, True, key=is_enough)
    return shrinks[min(least, len(shrinks) - 1)]


def _needed(head: Pending, shrinks: Sequence[tuple[Active, int]], coming: Room) -> tuple[Resize, ...]:
    """Leave out what turned out not to be needed, such as room on a node where it does not help."""
    needed = []
    for job, world in shrinks:
        coming.take(job.beside(world), job.amount)
        if not _fits(head, coming):
            coming.give(job.beside(world), job.amount)
            needed.append(_smaller(job, job.part(world), head))
    return tuple(needed)
