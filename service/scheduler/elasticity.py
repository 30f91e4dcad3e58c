"""Which running jobs go on with more or fewer workers; a pure decision."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from service.domain.elasticity import worlds_of
from service.domain.job import AttemptStatus, Job, JobStatus
from service.domain.placement import Node
from service.domain.ports import LiveAttempt
from service.scheduler.admission import first_in_line
from service.scheduler.room import Room, held_by, next_of


@dataclass(frozen=True, kw_only=True)
class Resize:
    """A running job that is to go on elsewhere.

    Attributes:
        live: the job and its present attempt.
        node_ids: node of each rank of its next attempt.
        message: why.
    """

    live: LiveAttempt
    node_ids: tuple[str, ...]
    message: str


def decide_resizes(
    queued: Sequence[Job],
    live: Sequence[LiveAttempt],
    nodes: Sequence[Node],
    *,
    settled: Set[tuple[str, int]],
) -> tuple[Resize, ...]:
    """Decide which running jobs are resized now.

    1. A job that has more workers than its owner asked for gives the others back.
    2. If the first job in line could start on what elastic jobs can spare, they give up just that: those of the lowest
       priority first, then the latest.
    3. Otherwise what is free goes to elastic jobs, highest priority first, then first come: it is of no use to the
       queue. A job that was started or resized a moment ago is left alone, unless its owner asked for it.

    Args:
        queued: by priority, then first come; those that fit now have been admitted.
        live: attempts that hold resources.
        nodes: the cluster.
        settled: job and number of the attempts that have run for long enough to be interrupted for growing.
    """
    room = Room.beside(live, nodes)
    movable = [entry for entry in live if _is_movable(entry) and room.has_nodes(entry.attempt.node_ids)]
    resizes = []
    for entry in movable:
        most = worlds_of(entry.job)[0]
        if entry.attempt.world_size > most:
            message = f"Asked to stop: to go on with {most} worker(s), as was asked for."
            resizes.append(Resize(live=entry, node_ids=_part(entry, most), message=message))
    movable = [entry for entry in movable if all(entry is not resize.live for resize in resizes)]
    head = first_in_line(queued, nodes)
    if head is not None:
        coming = _room_to_come(room, live, resizes)
        if _fits(head, coming):
            return tuple(resizes)  # it starts at once, or as soon as those have stopped that were asked to
        if shrinks := _make_room(head, movable, coming):
            return (*resizes, *shrinks)
        if _fits(head, _room_to_spare(coming, live)):
            return tuple(resizes)  # as soon as those that start now can be asked for it
    return (*resizes, *_grow(movable, room, settled))


def _is_movable(entry: LiveAttempt) -> bool:
    job, attempt = entry.job, entry.attempt
    return (
        job.spec.workers.is_elastic
        and job.status is JobStatus.RUNNING
        and attempt.status is AttemptStatus.RUNNING
        and not _is_stopping(entry)
    )


def _is_stopping(entry: LiveAttempt) -> bool:
    is_asked = entry.job.cancel_requested or entry.job.pause_requested or entry.attempt.stop_reason is not None
    return is_asked or entry.attempt.status is AttemptStatus.ENDED


def _room_to_come(room: Room, live: Sequence[LiveAttempt], resizes: Sequence[Resize]) -> Room:
    """Return the room there will be once every attempt that was asked to stop has stopped."""
    coming = room.copy()
    for entry in live:
        if _is_stopping(entry):
            coming.give(held_by(entry.attempt) - next_of(entry.attempt), entry.job.spec.resources_per_rank)
    for resize in resizes:
        given = Counter(resize.live.attempt.node_ids) - Counter(resize.node_ids)
        coming.give(given, resize.live.job.spec.resources_per_rank)
    return coming


def _room_to_spare(coming: Room, live: Sequence[LiveAttempt]) -> Room:
    """Return the room there would be if every elastic job had as few workers as it can."""
    spare = coming.copy()
    for entry in live:
        fewest = worlds_of(entry.job)[-1]
        if not _is_stopping(entry) and entry.attempt.world_size > fewest:
            given = Counter(entry.attempt.node_ids) - Counter(_part(entry, fewest))
            spare.give(given, entry.job.spec.resources_per_rank)
    return spare


def _fits(job: Job, room: Room) -> bool:
    return worlds_of(job)[-1] <= room.num_fitting(job.spec.resources_per_rank)


def _make_room(head: Job, movable: Sequence[LiveAttempt], coming: Room) -> tuple[Resize, ...]:
    """Return the least that lets a job start; nothing if all that can be spared does not."""
    coming = coming.copy()
    shrinks: list[Resize] = []
    for entry in reversed(_in_order(movable)):
        shrink = _least_shrink(head, entry, coming)
        if shrink is not None:
            shrinks.append(shrink)
            _apply(shrink, coming)
            if _fits(head, coming):
                return _needed(head, shrinks, coming)
    return ()


def _least_shrink(head: Job, entry: LiveAttempt, coming: Room) -> Resize | None:
    """Return the least shrink of one job that lets another start, or else its greatest; None if it can spare none."""
    shrinks = [world for world in worlds_of(entry.job) if world < entry.attempt.world_size]
    if not shrinks:
        return None

    def shrunk(world: int) -> Resize:
        message = f"Asked to stop: to go on with {world} worker(s), so that job {head.id} can start."
        return Resize(live=entry, node_ids=_part(entry, world), message=message)

    def is_enough(world: int) -> bool:
        trial = coming.copy()
        _apply(shrunk(world), trial)
        return _fits(head, trial)

    # The fewer stay, the more room there is on every node: what is enough for one world is for all below it.
    least = bisect_left(shrinks, True, key=is_enough)
    return shrunk(shrinks[min(least, len(shrinks) - 1)])


def _needed(head: Job, shrinks: Sequence[Resize], coming: Room) -> tuple[Resize, ...]:
    """Leave out what turned out not to be needed, such as room on a node where it does not help."""
    needed = []
    for shrink in shrinks:
        trial = coming.copy()
        _apply(shrink, trial, undo=True)
        if _fits(head, trial):
            coming = trial
        else:
            needed.append(shrink)
    return tuple(needed)


def _apply(shrink: Resize, room: Room, *, undo: bool = False) -> None:
    given = Counter(shrink.live.attempt.node_ids) - Counter(shrink.node_ids)
    amount = shrink.live.job.spec.resources_per_rank
    if undo:
        room.take(given, amount)
    else:
        room.give(given, amount)


def _part(entry: LiveAttempt, world: int) -> tuple[str, ...]:
    """Return places for fewer ranks among those that an attempt has: on the nodes with the most of them.

    Those for a smaller world are among those for a larger one.
    """
    own = sorted(Counter(entry.attempt.node_ids).items(), key=lambda item: (-item[1], item[0]))
    return tuple(node_id for node_id, count in own for _ in range(count))[:world]


def _grow(movable: Sequence[LiveAttempt], room: Room, settled: Set[tuple[str, int]]) -> list[Resize]:
    room = room.copy()
    grown = []
    for entry in _in_order(movable):
        if not entry.job.resize_requested and (entry.job.id, entry.attempt.number) not in settled:
            continue
        amount, own = entry.job.spec.resources_per_rank, Counter(entry.attempt.node_ids)
        room.give(own, amount)
        num_fitting = room.num_fitting(amount)
        most = next((world for world in worlds_of(entry.job) if world <= num_fitting), 0)
        places = room.place(most, amount) if most > entry.attempt.world_size else None
        if places is None:
            room.take(own, amount)
            continue
        room.take(own | Counter(places), amount)  # until the present attempt has ended, both
        message = f"Asked to stop: to go on with {len(places)} worker(s), for whom there is room."
        grown.append(Resize(live=entry, node_ids=places, message=message))
    return grown


def _in_order(entries: Sequence[LiveAttempt]) -> list[LiveAttempt]:
    """Return live attempts by priority, then as they came, which is the order that they are listed in."""
    return sorted(entries, key=lambda entry: -entry.job.spec.priority)
