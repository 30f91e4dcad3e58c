"""The commands that bring code and data to the service."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.arguments import FormatOption
from service.cli.output import Format, say, show, show_json

if TYPE_CHECKING:
    from service.domain.uploads import Upload

app = typer.Typer()


@app.command()
def bundle(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="With the code; or a zip archive of it.")],
    output: FormatOption = Format.TABLE,
) -> None:
    """Upload code for jobs to use; prints its SHA-256."""
    with context.obj.client() as client:
        upload = client.upload_bundle(path)
    _tell(upload, output)
    say(f"{upload.entries} files, {upload.size_bytes / 1e6:.1f} MB. In a job: code: {{bundle: {upload.sha256}}}")


@app.command()
def dataset(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .npz, .zip, .parquet or .tar file.")],
    name: Annotated[str | None, typer.Option(help="What to keep it under; else its own name.")] = None,
    output: FormatOption = Format.TABLE,
) -> None:
    """Upload a file of data for jobs to use; prints its SHA-256."""
    with context.obj.client() as client:
        upload = client.upload_dataset(path, name=name)
    _tell(upload, output)
    say(f"{upload.name}, {upload.size_bytes / 1e6:.1f} MB. In a job: dataset.args.path: upload:{upload.sha256}")


def code_change(path: Path) -> str:
    """Return the change of a job that names the code at a path, as ``--set`` takes it."""
    from service.client.bundling import bundle_sha256  # noqa: PLC0415 - the other commands start faster without

    return f'code.bundle="{bundle_sha256(path)}"'  # a hash may look like a number


def _tell(upload: "Upload", output: Format) -> None:
    if output is Format.JSON:
        show_json(upload.model_dump(mode="json"))
    else:
        show(upload.sha256)
