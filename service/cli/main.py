"""The commands."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from service.cli import lifecycle, logs, queues, uploads
from service.cli.arguments import ChangesOption, FormatOption, JobArgument, TimeoutOption
from service.cli.commands import Commands
from service.cli.exit_codes import ExitCode
from service.cli.metric_names import scores
from service.cli.options import CommonOptions
from service.cli.output import Format, age, is_lively, one_line, say, show, show_json, show_pairs, show_table, steps

# The client and the domain are loaded by the commands that need them, so that help and typing errors are quick.
# ruff: noqa: PLC0415

app = typer.Typer(
    cls=Commands,
    help="Distributed training with synchronized batch norm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(lifecycle.app)
app.add_typer(logs.app)
app.add_typer(uploads.app)
app.add_typer(queues.app, name="queue")


@app.callback()
def common(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="Where the service is; else SYNCBN_URL, else the data directory.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Its token; else SYNCBN_TOKEN, else the data directory.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Of a service on this machine; else SYNCBN_DATA_DIR, else ~/.syncbn.")
    ] = None,
) -> None:
    """Take the options of all commands."""
    context.obj = CommonOptions(url=url, token=token, data_dir=data_dir)


@app.command()
def submit(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The job, in YAML; - for standard input.")
    ] = None,
    named_file: Annotated[Path | None, typer.Option("--file", "-f", help="The same as FILE.")] = None,
    changes: ChangesOption = None,
    code_path: Annotated[
        Path | None, typer.Option("--code", metavar="DIRECTORY", help="Upload this code, and set code.bundle to it.")
    ] = None,
    watch_it: Annotated[bool, typer.Option("--watch", help="Watch it to its end.")] = False,
    timeout_s: TimeoutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how it would run; start nothing.")] = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Submit a job; prints its id."""
    from service.cli.job_file import load_job
    from service.domain.errors import InvalidSpec

    path = file or named_file
    if path is None or (file is not None and named_file is not None):
        raise InvalidSpec("Name one job file: syncbn submit job.yaml")
    # Checked before anything is packed; the bundle's hash, which decides nothing here, takes the place of the zeros.
    spec = load_job(path, [*(changes or []), *([] if code_path is None else [f'code.bundle="{"0" * 64}"'])])
    options: CommonOptions = context.obj
    with options.client() as client:
        if code_path is not None:
            bundle = client.upload_bundle(code_path).sha256
            spec = spec.model_copy(update={"code": spec.code.model_copy(update={"bundle": bundle})})
        if dry_run:
            plan = client.plan(spec)
            code = ExitCode.USAGE if plan.fits is False else ExitCode.OK  # what submitting it would end with
            if output is Format.JSON:
                show_json(plan.model_dump(mode="json"))
                raise typer.Exit(code)
            verdict = {True: "yes", False: "no", None: "unknown"}[plan.fits]
            show_pairs(
                [
                    ("workers", plan.world_size),
                    ("or also", ", ".join(str(one.world_size) for one in plan.worlds[1:]) or None),
                    ("samples per rank", " + ".join(str(count) for count in plan.samples_per_rank)),
                    ("micro-steps per step", plan.num_micro_steps),
                    ("steps", plan.num_steps),
                    ("resources", plan.resources),
                    ("fits the cluster", verdict if plan.reason is None else f"{verdict}: {plan.reason}"),
                    ("starts", None if plan.start is None else "at once" if plan.start.now else plan.start.message),
                ]
            )
            raise typer.Exit(code)
        job = client.submit(spec)
    if output is Format.JSON:
        show_json(job.model_dump(mode="json"))
    else:
        show(job.id)
    if watch_it:
        _watch(options, job.id, timeout_s)
    say(f"Submitted {job.spec.name}. Watch it with `syncbn watch {job.id}`.")


@app.command()
def ls(
    context: typer.Context,
    status: Annotated[list[str] | None, typer.Option(help="Only jobs of this status. Repeatable.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs of this name.")] = None,
    queue: Annotated[str | None, typer.Option(help="Only jobs of this queue.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only jobs of this owner.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Only jobs with this label: key=value. Repeatable.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most jobs to print.")] = 50,
    cursor: Annotated[str | None, typer.Option(help="Print the page that begins here.")] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """List jobs, newest first."""
    from service.domain.job import JobStatus

    for value in status or []:
        if value not in list(JobStatus):
            raise typer.BadParameter(f"{value!r} is none of {', '.join(JobStatus)}.", param_hint="--status")
    for value in label or []:
        if not value.partition("=")[1]:
            raise typer.BadParameter(f"{value!r}: write it as key=value.", param_hint="--label")
    with context.obj.client() as client:
        page = client.list_jobs(
            statuses=[JobStatus(value) for value in status or []],
            name=name,
            queue=queue,
            owner=owner,
            labels=[(pair.partition("=")[0], pair.partition("=")[2]) for pair in label or []],
            limit=limit,
            cursor=cursor,
        )
    if output is Format.JSON:
        show_json({"jobs": [job.model_dump(mode="json") for job in page.jobs], "next_cursor": page.next_cursor})
        return
    show_table(
        ("ID", "NAME", "OWNER", "QUEUE", "STATUS", "STEP", "WORKERS", "CREATED"),
        [
            (
                job.id,
                job.spec.name,
                job.owner,
                job.spec.queue,
                job.status,
                steps(job.step, job.num_steps),
                job.spec.workers,
                age(job.created_at),
            )
            for job in page.jobs
        ],
    )
    if page.next_cursor is not None:
        say(f"There are more: --cursor {page.next_cursor}")


@app.command()
def get(context: typer.Context, job_id: JobArgument, output: FormatOption = Format.TABLE) -> None:
    """Show a job and its attempts."""
    with context.obj.client() as client:
        job, attempts = client.get(job_id), client.attempts(job_id)
    if output is Format.JSON:
        show_json(job.model_dump(mode="json"))
        return
    show_pairs(
        [
            ("id", job.id),
            ("name", job.spec.name),
            ("forked from", job.forked_from and f"step {job.forked_from.step} of {job.forked_from.job_id}"),
            ("owner", job.owner),
            ("queue", job.spec.queue),
            ("labels", ", ".join(f"{key}={value}" for key, value in job.spec.labels.items()) or None),
            ("status", job.status),
            ("reason", f"{job.reason}: {job.message}"),
            ("steps", steps(job.step, job.num_steps)),
            ("model", job.spec.model.factory),
            ("dataset", job.spec.dataset.factory),
            ("workers", job.spec.workers),
            ("workers wanted", job.workers_wanted),
            ("exact", None if job.exact is None else f"{'yes' if job.exact else 'no'}: {job.exactness}"),
            ("batch", f"{job.spec.batch.size}, {job.spec.batch.samples_normalized_together} normalized together"),
            ("retries", f"{job.retries_used} of {job.spec.retry.budget} used"),
            ("next retry", job.not_before and f"not before {job.not_before.isoformat(timespec='seconds')}"),
            (
                "preemptions",
                f"{job.preemptions_used} of {job.spec.retry.preemptions}" if job.preemptions_used else None,
            ),
            ("preemptions", f"{job.preemptions_used} of {job.spec.retry.preemptions} used"),
            ("created", job.created_at.isoformat(timespec="seconds")),
            ("started", job.started_at and job.started_at.isoformat(timespec="seconds")),
            ("ended", job.ended_at and job.ended_at.isoformat(timespec="seconds")),
            ("failure", job.failure and f"{job.failure.error_type}: {job.failure.message}"),
        ]
    )
    if attempts:
        show("")
        show_table(
            ("ATTEMPT", "STATUS", "WORKERS", "OUTCOME", "REASON", "FROM STEP", "LAST STEP", "CREATED"),
            [
                (
                    one.number,
                    one.status,
                    one.world_size,
                    one.outcome,
                    one.reason,
                    one.resumed_from_step,
                    one.step,
                    age(one.created_at),
                )
                for one in attempts
            ],
        )


@app.command()
def watch(context: typer.Context, job_id: JobArgument, timeout_s: TimeoutOption = None) -> None:
    """Watch a job to its end; exits with 0, 3 (failed) or 5 (cancelled)."""
    _watch(context.obj, job_id, timeout_s)


@app.command()
def metrics(
    context: typer.Context,
    job_id: JobArgument,
    name: Annotated[list[str] | None, typer.Option(help="Such as train/loss. Repeatable; else all.")] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last steps.")] = None,
    max_points: Annotated[
        int | None, typer.Option(min=2, max=10_000, help="Roll longer curves up: a row per bucket, with its mean.")
    ] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Print training curves, a row per step."""
    with context.obj.client() as client:
        series = client.metrics(job_id, names=name or [], max_points=max_points)
    if output is Format.JSON:
        show_json({"series": {key: one.model_dump(mode="json", exclude_none=True) for key, one in series.items()}})
        return
    cells: dict[int, dict[str, object]] = {}
    for key, one in series.items():
        for step, value in zip(one.steps, one.values, strict=True):
            cells.setdefault(step, {})[key] = one.nonfinite.get(step) if value is None else value
    shown = sorted(cells)[-tail:] if tail else sorted(cells)
    names = sorted(series)
    show_table(("STEP", *(one_line(key) for key in names)), [(s, *(cells[s].get(key) for key in names)) for s in shown])


@app.command()
def checkpoints(context: typer.Context, job_id: JobArgument, output: FormatOption = Format.TABLE) -> None:
    """List the checkpoints of a job."""
    with context.obj.client() as client:
        found = client.checkpoints(job_id)
    if output is Format.JSON:
        show_json({"checkpoints": [one.model_dump(mode="json") for one in found]})
        return
    show_table(
        ("STEP", "ATTEMPT", "MB", "TEST", "CREATED", "PATH"),
        [
            (
                one.step,
                one.attempt,
                f"{sum(file.size_bytes for file in one.files) / 1e6:.1f}",
                _test_metrics(one.metrics),
                age(one.created_at),
                one.path,
            )
            for one in found
        ],
    )


@app.command()
def download(
    context: typer.Context,
    job_id: JobArgument,
    step: Annotated[int | None, typer.Option(min=0, help="Of which checkpoint; else the latest.")] = None,
    to: Annotated[Path | None, typer.Option(help="Directory to write to; else JOB-step-STEP.")] = None,
) -> None:
    """Download a checkpoint, every file compared with its SHA-256; prints the directory."""
    from service.cli.report import download_folder, load_hint
    from service.client.errors import JobNotFound

    with context.obj.client() as client:
        found = [one for one in client.checkpoints(job_id) if step in (None, one.step)]
        if not found:
            raise JobNotFound(f"Job {job_id} has no such checkpoint. `syncbn checkpoints {job_id}` lists them.", 404)
        folder = to or Path(download_folder(job_id, found[-1].step))
        checkpoint = client.download(job_id, to=folder, step=found[-1].step)
    size_bytes = sum(file.size_bytes for file in checkpoint.files)
    say(f"Step {checkpoint.step}: {len(checkpoint.files)} files, {size_bytes / 1e6:.1f} MB, all as their SHA-256 says.")
    say(f"Load it with {load_hint(str(folder))}")
    show(str(folder))


@app.command()
def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 0,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Logical CPUs to declare; else as many as there are cores, at least 4.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs to use; else all.")] = None,
) -> None:
    """Start the whole service on this machine, until Ctrl-C. Its data lie in --data-dir."""
    from service.embedded import serve as serve_all
    from service.settings import Settings

    options: CommonOptions = context.obj
    settings = Settings() if options.data_dir is None else Settings(data_dir=options.data_dir)
    num_cpus = cpus or max(4, os.cpu_count() or 1)
    raise typer.Exit(serve_all(settings, host=host, port=port, num_cpus=num_cpus, num_gpus=gpus))


def _watch(options: CommonOptions, job_id: str, timeout_s: float | None) -> NoReturn:
    from service.cli.report import show_end
    from service.cli.watch import watch_job

    # The service may take its time to come back: a watch costs nothing while it waits.
    client = options.client(reconnect_for_s=600.0)
    try:
        job = watch_job(client, client.get(job_id), timeout_s=timeout_s, lively=is_lively())
    except KeyboardInterrupt:
        say(f"\nDetached; the job goes on. Watch it again with `syncbn watch {job_id}`.")
        say(f"Stop it with `syncbn cancel {job_id}`.")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    code = show_end(client, job)
    client.close()
    raise typer.Exit(code)


def _test_metrics(metrics: Mapping[str, float]) -> str | None:
    """The first metrics of the evaluation at a checkpoint; None where there was none."""
    names = scores(metrics)[:2]
    return ", ".join(f"{name.removeprefix('eval/')} {metrics[name]:.4f}" for name in names) or None


if __name__ == "__main__":
    app()
