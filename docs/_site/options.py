"""Print docs/options.md, a table of options for each command: what `make options` runs."""

from pyrovae.cli import COMMANDS

HEAD = """\
# Options of the command line

Every command also takes `--help` and `--traceback`, which shows where an error came from. This page
is written by `make options`; a test compares it with the options.
"""


def options_page() -> str:
    """The whole page."""
    lines = [HEAD]
    for name, (options, _) in COMMANDS.items():
        lines += [f"## pyrovae {name}", "", f"{options.__doc__}", ""]
        if rows := [row(*each) for each in options.table()]:
            lines += ["| option | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def row(*cells: str) -> str:
    """An option as it is written, its default, and what it means."""
    option, default, meaning = (cell.replace("|", "\\|") for cell in cells)
    return f"| `{option}` | {default} | {meaning} |"


if __name__ == "__main__":
    print(options_page(), end="")
