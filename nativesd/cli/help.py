"""How commands show themselves: options in sections, whole sentences, and errors in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click

from nativesd.errors import NativesdError

Function = TypeVar("Function", bound=Callable[..., Any])
FROM_FILE = "nativesd.from_file"
"""Of a context's `meta`."""


class Command(click.Command):
    """A command whose help has sections, and whose errors name flags where Python's name arguments."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options, by the section they were declared in."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for param in sorted(options, key=lambda option: not hasattr(option, "section")):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def invoke(self, ctx: click.Context) -> Any:
        """Run; what is raised names flags."""
        try:
            return super().invoke(ctx)
        except NativesdError as error:
            if not error.of_file:
                error.args = (as_flags(str(error), ctx), *error.args[1:])
            raise


class Group(click.Group):
    """Commands, each with its first sentence, which is never cut off."""

    command_class = Command
    group_class = type

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands and what they do."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.commands[name]
            text = command.short_help or command.help or ""
            rows.append((name, " ".join(text.split()).partition(". ")[0].rstrip(".") + "."))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def section(title: str, *options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Declare options that stand under one title in the command's help."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
            function.__click_params__[-1].section = title  # type: ignore[attr-defined]  # where click keeps them
        return function

    return decorate


def with_flags(message: str, params: Sequence[click.Parameter]) -> str:
    """A message of the library in the words of the command line: `steps must be ...`, `dtype='float32'` as flags."""
    flags = {param.name: flag(param) for param in params if isinstance(param, click.Option) and param.name}

    def passed(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"] or ""
        if name not in flags:
            return match[0]
        return f"{flags[name]} {value[1:-1]}" if value[:1] in ("'", '"') else flags[name]

    def named(match: re.Match[str]) -> str:
        name, field = match["name"], match["field"]
        full = f"{name}_{field}" if field and f"{name}_{field}" in flags else name
        return flags.get(full, match[0])

    message = re.sub(r"""(?<![\w.])(?P<name>[a-z]\w*)=(?P<value>'[^']*'|"[^"]*"|True)?(?![\w.(])""", passed, message)
    subject = r"(?<![\w.-])(?P<name>[a-z]\w*)(?:\.(?P<field>\w+))?"
    message = re.sub(rf"{subject}(?=(?: and \w+)? must be\b)", named, message)
    return re.sub(rf"^{subject}(?= (?:is|are|makes|does)\b)", named, message)


def as_flags(message: str, context: click.Context) -> str:
    """`with_flags` of a running command, but for the options that a file said: `from_file`."""
    others = context.meta.get(FROM_FILE, ())
    return with_flags(message, [param for param in context.command.params if param.name not in others])


def from_file(context: click.Context, names: Iterable[str]) -> None:
    """Have messages call options by their names in Python, as they were not given on the command line but in a file."""
    context.meta[FROM_FILE] = frozenset(names)


def flag(param: click.Option) -> str:
    """The option's name on the command line: the first long one."""
    return next((name for name in param.opts if name.startswith("--")), param.opts[0])


def flags_of(context: click.Context) -> dict[str | None, str]:
    """The names on the command line of a command's options, by those of the function's arguments; of an option that has
    two, such as --no-image-prompts, the one that was given."""
    options = [param for param in context.command.params if isinstance(param, click.Option)]
    return {
        param.name: param.secondary_opts[0]
        if param.secondary_opts and context.params.get(param.name or "") is False
        else flag(param)
        for param in options
    }


def does_nothing(option: str, *others: str) -> click.UsageError:
    """What is raised of an option that was given where it changes nothing, for want of one of others."""
    return click.UsageError(f"{option} does nothing without {' or '.join(others)}")
