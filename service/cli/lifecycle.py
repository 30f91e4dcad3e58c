"""The commands that a job's owner moves it with: cancel, pause, resume, resize, fork."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.arguments import ChangesOption, FormatOption, JobArgument
from service.cli.output import Format, say, show, show_json

if TYPE_CHECKING:
    from service.domain.job import Job

app = typer.Typer()


@app.command()
def cancel(context: typer.Context, job_id: JobArgument) -> None:
    """Cancel a job; one that runs saves a checkpoint first."""
    with context.obj.client() as client:
        _tell(client.cancel(job_id))


@app.command()
def pause(context: typer.Context, job_id: JobArgument) -> None:
    """Pause a job; one that runs saves a checkpoint first."""
    with context.obj.client() as client:
        _tell(client.pause(job_id))


@app.command()
def resume(context: typer.Context, job_id: JobArgument) -> None:
    """Go on with a job that was paused, has failed or was cancelled, from its last checkpoint."""
    with context.obj.client() as client:
        _tell(client.resume(job_id))


@app.command()
def resize(
    context: typer.Context,
    job_id: JobArgument,
    workers: Annotated[int, typer.Argument(metavar="WORKERS", min=1, help="How many it is to have.")],
) -> None:
    """Give an elastic job more or fewer workers; its result stays the same."""
    with context.obj.client() as client:
        _tell(client.resize(job_id, workers))


@app.command()
def fork(
    context: typer.Context,
    job_id: JobArgument,
    step: Annotated[int | None, typer.Option(min=0, help="Of which checkpoint; else the latest.")] = None,
    changes: ChangesOption = None,
    name: Annotated[str | None, typer.Option(help="Of the new job; else that of the other.")] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Submit a job that goes on from a checkpoint of another; prints its id."""
    from service.cli.job_file import parse_change  # noqa: PLC0415 - the other commands start faster without

    fields: dict[str, Any] = dict(parse_change(change) for change in changes or [])
    if name is not None:
        fields["name"] = name
    with context.obj.client() as client:
        job = client.fork(job_id, step=step, changes=fields)
    if output is Format.JSON:
        show_json(job.model_dump(mode="json"))
    else:
        show(job.id)
    say(f"Forked {job.spec.name} at step {job.step}. Watch it with `syncbn watch {job.id}`.")


def _tell(job: "Job") -> None:
    wishes = {
        "cancel requested": job.cancel_requested,
        "pause requested": job.pause_requested,
        f"resize to {job.workers_wanted} requested": job.resize_requested,
    }
    asked = ", ".join(wish for wish, is_asked in wishes.items() if is_asked)
    show(f"{job.id} {job.status}{f' ({asked})' if asked else ''}")
