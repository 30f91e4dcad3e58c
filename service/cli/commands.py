"""How the command line takes its arguments and ends."""

from typing import Any

import typer
from typer.core import TyperGroup

from service.cli.exit_codes import exit_code_of
from service.cli.output import say

COMMON_OPTIONS = ("--url", "--token", "--data-dir")


class Commands(TyperGroup):
    """A group whose common options may also follow the command, and whose errors are sentences and exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's own type, which moves
        """Put the common options before the command."""
        common: list[str] = []
        others: list[str] = []
        rest = iter(args)
        for argument in rest:
            if argument == "--":
                others.extend([argument, *rest])
            elif argument in COMMON_OPTIONS:
                common.extend([argument, *([value] if (value := next(rest, None)) is not None else [])])
            elif argument.startswith(tuple(f"{option}=" for option in COMMON_OPTIONS)):
                common.append(argument)
            else:
                others.append(argument)
        return super().parse_args(ctx, [*common, *others])

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as above
        """Run a command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # whoever read stdout has seen enough; typer ends quietly
        except Exception as error:
            if not _is_expected(error):
                raise
            say(f"Error: {error}")
            raise typer.Exit(exit_code_of(error)) from None


def _is_expected(error: Exception) -> bool:
    from service.client.errors import ClientError  # noqa: PLC0415 - only where something went wrong
    from service.domain.errors import ServiceError  # noqa: PLC0415

    return isinstance(error, ClientError | ServiceError | OSError)
