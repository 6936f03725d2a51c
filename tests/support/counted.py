"""gmux whose workers count their greenlets: `python -m tests.support.counted server ...`.

Every GREENLETS_EVERY seconds a worker writes the number to the file GREENLETS, from a thread of its own.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

from greenlet import greenlet

from gmux.cli import main


def count() -> None:
    path, every = Path(os.environ["GREENLETS"]), float(os.environ["GREENLETS_EVERY"])
    while True:
        time.sleep(every)
        path.write_text(str(sum(isinstance(thing, greenlet) for thing in gc.get_objects())))


if __name__ == "__main__":
    os.register_at_fork(after_in_child=lambda: threading.Thread(target=count, daemon=True).start())
    main()
