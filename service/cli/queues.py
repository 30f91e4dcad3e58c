"""The commands of queues: list, set, remove."""

from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.arguments import FormatOption
from service.cli.output import Format, say, show, show_json, show_table

if TYPE_CHECKING:
    from service.domain.queue import QueueState, Quota

app = typer.Typer(help="List, set and remove queues.", no_args_is_help=True)

QueueArgument = Annotated[str, typer.Argument(metavar="QUEUE", help="Name of the queue.")]
_LIMITS = "a number, or none for no limit"


@app.command("ls")
def list_queues(context: typer.Context, output: FormatOption = Format.TABLE) -> None:
    """List the queues, their shares, limits and jobs."""
    with context.obj.client() as client:
        states = client.queues()
    if output is Format.JSON:
        show_json({"queues": [state.model_dump(mode="json") for state in states]})
        return
    show_table(
        ("QUEUE", "WEIGHT", "QUEUED", "LIVE", "USED H", "QUOTA", "PER OWNER", "PAUSED"),
        [
            (
                state.queue.name,
                f"{state.queue.weight:g}",
                state.num_queued,
                state.num_live,
                f"{state.usage_s / 3600:.2f}",
                _limits(state.queue.quota),
                _limits(state.queue.quota_per_owner),
                "yes" if state.queue.paused else "no",
            )
            for state in states
        ],
    )


@app.command("set")
def set_queue(
    context: typer.Context,
    name: QueueArgument,
    weight: Annotated[float | None, typer.Option(help="Its share, in relation to the other queues with jobs.")] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help=f"Most that its jobs may hold together: gpus=8, cpus, memory_bytes or jobs; {_LIMITS}."),
    ] = None,
    quota_per_owner: Annotated[list[str] | None, typer.Option(help="Likewise the jobs of one owner.")] = None,
    paused: Annotated[bool | None, typer.Option("--pause/--start", help="Start nothing from it, or again.")] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Make a queue, or change what is named of one."""
    from service.domain.queue import Queue  # noqa: PLC0415 - help and typing errors are quick

    _check(name, weight)
    with context.obj.client() as client:
        known = {state.queue.name: state.queue for state in client.queues()}
        before = known.get(name) or Queue(name=name)
        queue = Queue(
            name=name,
            weight=before.weight if weight is None else weight,
            quota=_changed(before.quota, quota, "--quota"),
            quota_per_owner=_changed(before.quota_per_owner, quota_per_owner, "--quota-per-owner"),
            paused=before.paused if paused is None else paused,
        )
        state = client.put_queue(queue)
    _tell(state, output)
    say(f"{'Changed' if name in known else 'Made'} queue {name}. In a job: queue: {name}")


@app.command("rm")
def remove_queue(context: typer.Context, name: QueueArgument) -> None:
    """Remove a queue whose jobs have all ended."""
    with context.obj.client() as client:
        client.remove_queue(name)
    say(f"Removed queue {name}.")


def _check(name: str, weight: float | None) -> None:
    """Refuse what no queue can have. Raises ``typer.BadParameter``."""
    from service.domain.queue import Queue  # noqa: PLC0415 - as above

    try:
        new = Queue(name=name)
    except ValueError:
        raise typer.BadParameter(
            f"{name!r}: use 1 to 63 lower-case letters, digits, '_' or '-', the first a letter or digit.",
            param_hint="QUEUE",
        ) from None
    try:
        Queue(name=new.name, weight=new.weight if weight is None else weight)
    except ValueError:
        message = f"{weight:g}: give a number above 0, at most 1000000. To start nothing from it, use --pause."
        raise typer.BadParameter(message, param_hint="--weight") from None


def _changed(quota: "Quota", changes: list[str] | None, option: str) -> "Quota":
    from service.domain.queue import Quota  # noqa: PLC0415 - as above

    values = quota.model_dump()
    for change in changes or []:
        limit, _, value = change.partition("=")
        if limit not in values or not value:
            raise typer.BadParameter(
                f"{change!r}: write it as gpus=8, with one of {', '.join(values)}.", param_hint=option
            )
        try:
            values[limit] = None if value == "none" else Quota.model_validate({limit: value}).model_dump()[limit]
        except ValueError:
            raise typer.BadParameter(f"{change!r}: give {_LIMITS}.", param_hint=option) from None
    return Quota(**values)


def _limits(quota: "Quota") -> str | None:
    given = {name: value for name, value in quota.model_dump().items() if value is not None}
    return ", ".join(f"{name}={value:g}" for name, value in given.items()) or None


def _tell(state: "QueueState", output: Format) -> None:
    if output is Format.JSON:
        show_json(state.model_dump(mode="json"))
    else:
        show(state.queue.name)
