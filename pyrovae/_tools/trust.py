"""Whether a file was made here: the user's key signs its checksum, and stays on the machine.

A run that was made elsewhere holds programs and paths that somebody else chose. The signature is
an HMAC of the configuration's checksum, which holds the digests of the programs, so that nothing of
it can be exchanged; the key lies in ``$XDG_STATE_HOME/pyrovae/key`` (``~/.local/state``).
"""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path


def sign(seal: str) -> str:
    """The signature of a checksum; empty where no key can be kept."""
    key = _key()
    return hmac.digest(key, seal.encode(), "sha256").hex() if key else ""


def is_own(seal: str, signature: str) -> bool:
    """Whether this user signed a checksum on this machine."""
    own = sign(seal)
    return bool(own) and hmac.compare_digest(own.encode(), signature.encode())


def _key() -> bytes:
    """The user's key, made when it is first asked for; empty if it cannot be."""
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    path = Path(state) / "pyrovae" / "key"
    with suppress(OSError):
        if not path.is_file():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = path.with_name(f"key.{os.getpid()}")
            with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
            # Of two processes that make a key, the first one's counts.
            with suppress(FileExistsError):
                os.link(made, path)
            made.unlink()
        return path.read_bytes()
    return b""
