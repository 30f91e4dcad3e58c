"""The command that prints what ranks printed, or searches in it."""

import codecs
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from service.cli.arguments import JobArgument
from service.cli.output import one_line, say, show

if TYPE_CHECKING:
    from service.client.answers import LogChunk
    from service.client.client import Client

ALL: Final = "all"

app = typer.Typer()


@app.command()
def logs(
    context: typer.Context,
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    rank: Annotated[
        str | None, typer.Option(metavar="RANK", help="Of which rank, or all; else 0, and all in a search.")
    ] = None,
    attempt: Annotated[
        str | None,
        typer.Option(metavar="ATTEMPT", help="Of which attempt; else the current one. In a search also all."),
    ] = None,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last lines.")] = None,
    search: Annotated[str | None, typer.Option(metavar="TEXT", help="Only lines that contain this.")] = None,
    regex: Annotated[bool, typer.Option("--regex", help="TEXT is a regular expression in RE2's syntax.")] = False,
    ignore_case: Annotated[
        bool, typer.Option("--ignore-case", "-i", help="Search for upper and lower case alike.")
    ] = False,
) -> None:
    """Print what a rank printed, or search in what all of them printed."""
    if search is None and (regex or ignore_case):
        raise typer.BadParameter("say what to look for with --search.", param_hint="--regex, --ignore-case")
    if search is not None and (follow or tail is not None):
        raise typer.BadParameter("cannot be combined with --search.", param_hint="--follow, --tail")
    number = _number(rank, "--rank", least=0)
    of_attempt = _number(attempt, "--attempt", least=1)
    with context.obj.client() as client:
        if search is not None:
            _search(
                client, job_id, search, regex=regex, ignore_case=ignore_case, rank=number, attempt=of_attempt or None
            )
            return
        if of_attempt == ALL:
            raise typer.BadParameter("is the number of an attempt, but in a search.", param_hint="--attempt")
        if number == ALL:
            _print_with_ranks(_chunks_of_all(client, job_id, of_attempt, tail=tail, follow=follow))
        else:
            _print(_chunks(client, job_id, of_attempt, number or 0, tail=tail, follow=follow))


def _number(text: str | None, option: str, *, least: int) -> int | Literal["all"] | None:
    if text is None:
        return None
    if text == ALL:
        return ALL
    if not text.isdecimal() or int(text) < least:
        raise typer.BadParameter(f"{text!r} is neither a number from {least} nor {ALL}.", param_hint=option)
    return int(text)


def _search(
    client: "Client",
    job_id: str,
    text: str,
    *,
    regex: bool,
    ignore_case: bool,
    rank: int | Literal["all"] | None,
    attempt: int | Literal["all"] | None,
) -> None:
    is_found = False
    found = client.search_log(
        job_id, text, regex=regex, ignore_case=ignore_case, rank=None if rank == ALL else rank, attempt=attempt
    )
    for match in found:
        is_found = True
        where = f"attempt {match.attempt} " if attempt == ALL else ""
        show(f"{where}rank {match.rank}| {one_line(match.text)}")
    if not is_found:
        say(f"No line {'matches' if regex else 'contains'} {text!r}.")


def _chunks(
    client: "Client", job_id: str, attempt: int | None, rank: int, *, tail: int | None, follow: bool
) -> Iterator["LogChunk"]:
    offset = 0
    if tail is not None:
        chunk = client.log(job_id, attempt=attempt, rank=rank, tail=tail)
        yield chunk
        offset = chunk.next_offset
    if follow:
        yield from client.follow_log(job_id, attempt=attempt, rank=rank, offset=offset)
    elif tail is None:
        chunk = client.log(job_id, attempt=attempt, rank=rank)
        while chunk.content:
            yield chunk
            chunk = client.log(job_id, attempt=chunk.attempt, rank=rank, offset=chunk.next_offset)


def _chunks_of_all(
    client: "Client", job_id: str, attempt: int | None, *, tail: int | None, follow: bool
) -> Iterator["LogChunk"]:
    if follow:
        if tail is not None:
            raise typer.BadParameter("cannot be combined with --follow and --rank all.", param_hint="--tail")
        yield from client.follow_logs(job_id, attempt=attempt)
        return
    number = attempt or client.get(job_id).attempt
    for one in client.attempts(job_id):
        if one.number == number:
            for rank in range(one.world_size):
                yield from _chunks(client, job_id, number, rank, tail=tail, follow=False)


def _print(chunks: Iterable["LogChunk"]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        show(decoder.decode(chunk.content), end="")
    show(decoder.decode(b"", final=True), end="")


def _print_with_ranks(chunks: Iterable["LogChunk"]) -> None:
    """Print whole lines, each with the rank that printed it; a line's beginning waits for the rest."""
    begun: dict[tuple[int, int], bytes] = {}
    for chunk in chunks:
        key = (chunk.attempt, chunk.rank)
        *lines, begun[key] = (begun.get(key, b"") + chunk.content).split(b"\n")
        _show_lines(chunk.rank, lines)
    for (_, rank), line in begun.items():
        if line:
            _show_lines(rank, [line])


def _show_lines(rank: int, lines: Iterable[bytes]) -> None:
    text = "".join(f"rank {rank}| {line.decode(errors='replace')}\n" for line in lines)
    show(text, end="")
