"""Whether what is asked for is what an existing run was made with."""

from __future__ import annotations

from typing import Any

from pyrovae._tools import InputError

__all__ = ["require_same_data", "require_same_run"]

FREE = ("command", "device", "versions")
MOVABLE = ("data.load", "data.root", "data.source")


def require_same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with a run under another configuration.

    Where the data lie, the device and the number of epochs may change; the last only if the
    learning rate does not depend on it.

    Args:
        before: The run's configuration.
        now: The configuration asked for.

    Raises:
        ValueError: Naming the first entry that differs.
    """
    free = FREE if now["schedule"] != "none" else (*FREE, "epochs")
    before, now = _flat(before), _flat(now)
    for key in sorted(before.keys() | now.keys()):
        if key.partition(".")[0] in free or key in MOVABLE:
            continue
        if before.get(key) != now.get(key):
            raise InputError(
                f"The run was made with {key} = {before.get(key)}, and --resume was asked for "
                f"{now.get(key)}: leave the option out, or choose another --out."
            )


def require_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse data that are not those of a run.

    Args:
        before: The provenance that the run recorded.
        now: The provenance of the data at hand.

    Raises:
        ValueError: Naming the first entry that differs.
    """
    for key, value in now.items():
        if key != "source" and key in before and before[key] != value:
            raise InputError(
                f"The data are not those of the run: {key} was {before[key]}, is now {value}."
            )


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= nested or {prefix + key: value}
    return flat
