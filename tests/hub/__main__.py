"""`python -m tests.hub [real] [FOLDER]`: serve the repositories by hand until Ctrl-C.

`real` gives Yi-6B-Chat its real widths. What is made stays in FOLDER, or goes with the server.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import threading
from pathlib import Path

from .model_repositories import REAL, SMALL, make_repositories
from .server import serve_hub
from .shallow_encoders import SITE


def main(words: list[str]) -> None:
    """Serve, and say how others find the server."""
    widths = REAL if "real" in words else SMALL
    folders = [word for word in words if word != "real"]
    with contextlib.ExitStack() as stack:
        made = folders[0] if folders else stack.enter_context(tempfile.TemporaryDirectory())
        hub = stack.enter_context(serve_hub(make_repositories(Path(made), widths)))
        print(f"export HF_ENDPOINT={hub.endpoint} HF_HOME=$(mktemp -d)")
        print(f"export PYTHONPATH={SITE}:$PWD  # encoders of two blocks, as those here")
        for kind, name in hub.repositories:
            print(f"  {kind.removesuffix('s')} {name}")
        sys.stdout.flush()  # it may be a pipe
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
