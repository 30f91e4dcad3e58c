"""The commands that bring code and data to the service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.arguments import FormatOption
from service.cli.output import Format, say, show, show_json

if TYPE_CHECKING:
    from service.domain.uploads import Upload

app = typer.Typer()

AgainOption = Annotated[
    bool, typer.Option("--again", help="Send it though the service has it: repairs a copy that storage has damaged.")
]


@app.command()
def bundle(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="With the code; or a zip archive of it.")],
    again: AgainOption = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Upload code for jobs to use; prints its SHA-256."""
    with context.obj.client() as client:
        upload = client.upload_bundle(path, again=again)
    _tell(upload, output)
    say(f"{upload.entries} files, {upload.size_bytes / 1e6:.1f} MB. In a job: code: {{bundle: {upload.sha256}}}")


@app.command()
def dataset(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .npz, .zip, .parquet or .tar file.")],
    name: Annotated[str | None, typer.Option(help="What to keep it under; else its own name.")] = None,
    again: AgainOption = False,
    output: FormatOption = Format.TABLE,
) -> None:
    """Upload a file of data for jobs to use; prints its SHA-256."""
    with context.obj.client() as client:
        upload = client.upload_dataset(path, name=name, again=again)
    _tell(upload, output)
    say(f"{upload.name}, {upload.size_bytes / 1e6:.1f} MB. In a job: dataset.args.path: upload:{upload.sha256}")


def _tell(upload: "Upload", output: Format) -> None:
    if output is Format.JSON:
        show_json(upload.model_dump(mode="json"))
    else:
        show(upload.sha256)
