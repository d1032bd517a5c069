"""Options as the fields of a dataclass: a parser and a table of the docs come from them."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from types import UnionType
from typing import Any, Self, get_args, get_type_hints

__all__ = ["Options", "option", "options_page"]

PAGE = """\
Every command also takes `--help` and `--traceback`, which shows where an error came from. This page
is written by `make options`; a test compares it with the options."""


def option(
    meaning: str,
    default: Any = MISSING,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    flag: str | None = None,
    said: str | None = None,
) -> Any:
    """A field of :class:`Options`; one without a default is an argument without dashes.

    Args:
        meaning: What it does.
        default: What it is if it is not given; ``dict`` is an empty one.
        metavar: What stands for its value in usage.
        choices: The values that it may have.
        flag: Its spelling, if that is not its name.
        said: What to say of a default that is worked out later, or ``"required"``.
    """
    about = {"help": meaning, "metavar": metavar, "choices": choices, "flag": flag, "said": said}
    if default is dict:
        return field(default_factory=dict, metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a command.

    A field is an option of its type: ``int | None`` is an ``int``, ``bool`` takes no value, a
    ``Mapping`` may be given several times as ``NAME=VALUE``, and a tuple has one value or more.
    """

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add every option to a parser, which leaves out those that are not given."""
        for each in fields(cls):
            about, kind, default = each.metadata, _kind(cls, each), _default(each)
            how: dict[str, Any] = {"help": about["help"]}
            if not _is_positional(each):
                how |= {"dest": each.name, "default": SUPPRESS}
                how |= {"required": True} if default == "required" else {}
                how["help"] += f", default {default}" if default not in ("", "required") else ""
            if kind is bool:
                how["action"] = "store_true"
            elif kind is Mapping:
                how |= {"action": "append", "metavar": about["metavar"]}
            elif kind is tuple:
                how |= {"nargs": "+", "metavar": about["metavar"]}
            else:
                how |= {"type": kind, "metavar": about["metavar"], "choices": about["choices"]}
            parser.add_argument(each.name if _is_positional(each) else _flag(each), **how)

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Each option as it is written, its default, and what it means."""
        rows = []
        for each in fields(cls):
            about, kind = each.metadata, _kind(cls, each)
            value = about["metavar"] or "|".join(about["choices"] or [each.name.upper()])
            if _is_positional(each):
                usage = f"{value} ..." if kind is tuple else value
            else:
                usage = _flag(each) if kind is bool else f"{_flag(each)} {value}"
            rows.append((usage, _default(each), about["help"]))
        return rows

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options that were given, and the defaults of the others.

        Raises:
            InputError: If a number is out of range.
        """
        names = {each.name for each in fields(cls)}
        options = cls(**{name: value for name, value in given.items() if name in names})
        options.check()
        return options

    def check(self) -> None:
        """Refuse what no type says."""


def options_page(commands: Mapping[str, type[Options]]) -> str:
    """What ``docs/options.md`` holds: a table of options for each command.

    Args:
        commands: The options of each command by its name.
    """
    lines = ["# Options of the command line", "", PAGE, ""]
    for name, options in commands.items():
        lines += [f"## pyrovae {name}", "", f"{options.__doc__}", ""]
        if rows := options.table():
            lines += ["| option | default | meaning |", "|---|---|---|"]
            lines += [_row(*row) for row in rows] + [""]
    return "\n".join(lines)


def _kind(cls: type, each: Field) -> type:
    """The type of an option's value: of ``int | None`` it is ``int``."""
    hint = get_type_hints(cls)[each.name]
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    return getattr(hint, "__origin__", hint)


def _is_positional(each: Field) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _flag(each: Field) -> str:
    return each.metadata["flag"] or f"--{each.name.replace('_', '-')}"


def _default(each: Field) -> str:
    said = each.metadata["said"]
    if said is not None:
        return said
    return "" if _is_positional(each) or isinstance(each.default, bool) else f"{each.default}"


def _row(usage: str, default: str, meaning: str) -> str:
    cells = [cell.replace("|", "\\|") for cell in (f"`{usage}`", default, meaning)]
    return f"| {' | '.join(cells)} |"
