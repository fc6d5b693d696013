"""What a process of ours has started ends with it, even where it is killed without a word."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

# Its input ends when nobody is left who could write to it.
WATCH = 'read -r line; kill "$0"'


@contextmanager
def ending_with_us(pid: int) -> Iterator[None]:
    """Have a process terminated if this one dies before the context is left.

    A shell in a session of its own waits for that: it is not killed along with us.

    Args:
        pid: of what must not outlive us.
    """
    with subprocess.Popen(  # noqa: S603 - no word from elsewhere
        ["/bin/sh", "-c", WATCH, str(pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watch:
        try:
            yield
        finally:
            watch.kill()
