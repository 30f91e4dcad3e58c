"""Arguments and options that several commands take."""

from typing import Annotated

import typer

from service.cli.output import Format

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the data.")]
TimeoutOption = Annotated[float | None, typer.Option("--timeout", min=0, help="Seconds to watch at most.")]
ChangesOption = Annotated[list[str] | None, typer.Option("--set", help="Change a field: batch.size=32. Repeatable.")]
