"""What all commands have in common: panels, suggestions, and how they end at a Ctrl-C."""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from optgrad.experiments import interrupts

# The panels of 'optgrad --help', in this order.
LOOK, COMPARE, PAPERS, MACHINE = "Look", "Compare", "Papers and pictures", "Machine"
# Those of 'optgrad compare --help'; 'optgrad resume' has some of them, too.
WHAT, BUDGET, TUNING = "What to compare", "Budget", "Tuning"
RUNNING, PROCESSES, OUTPUT = "Running", "Several processes", "Output"


_COMPLETION_HELP = {
    "install_completion": "Have the shell complete commands and names.",
    "show_completion": "Print what the shell needs for it.",
}


class Command(TyperCommand):
    """A command that prepares the process when it really runs: not for its help, say."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options."""
        return _with_short_help(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads them; of an option that there is not, the nearest is named."""
        with _nearest_option(self, ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs it; the context's object, if there is one, is called before."""
        if ctx.obj:
            ctx.obj()
        return super().invoke(ctx)


class Group(TyperGroup):
    """Several commands; a Ctrl-C within any of them ends it without a traceback."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Options before the command."""
        return _with_short_help(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads them; of an option that there is not, the nearest is named."""
        with _nearest_option(self, ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        with interrupts.explained(lambda: "Interrupted; no results were written."):
            return super().invoke(ctx)


def create_app() -> typer.Typer:
    """A group of commands, without any as yet."""
    return typer.Typer(
        cls=Group,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )


@contextlib.contextmanager
def _nearest_option(command: TyperCommand | TyperGroup, ctx: Any) -> Iterator[None]:
    """Names one option where Click names several, in the order of the alphabet."""
    try:
        yield
    except Exception as error:
        wrong = getattr(error, "option_name", None)
        if wrong is None or not hasattr(error, "possibilities"):
            raise
        options = [name for param in command.get_params(ctx) for name in param.opts]
        if nearest := difflib.get_close_matches(wrong, options, n=1):
            unknown: Any = error
            unknown.message = f"No such option: {wrong}. Did you mean {nearest[0]!r}?"
            unknown.possibilities = None
        raise


def _with_short_help(params: list[Any]) -> list[Any]:
    """Flags are shown without the type that they all have."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
        param.help = _COMPLETION_HELP.get(param.name, getattr(param, "help", None))
    return params


def finish(app: typer.Typer) -> None:
    """To be called when all commands are there: those without a class of their own get ours."""
    for info in app.registered_commands:
        if info.cls in {None, TyperCommand}:
            info.cls = Command
