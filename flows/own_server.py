"""The temporary server that Prefect starts where none is named, so that it never stays behind."""

import subprocess
from contextlib import ExitStack
from typing import Any, ClassVar

from prefect.server.api.server import SubprocessASGIServer

from flows.watch import ending_with_us


class OwnServer(SubprocessASGIServer):
    """Prefect's temporary server, which ends with this process even where that is killed.

    Prefect takes the first that was made in a process: making this one is enough. By itself it is
    ended when Python exits, which one that is killed does not.
    """

    _watches: ClassVar = ExitStack()

    def stop(self) -> None:
        """End it, in order."""
        super().stop()
        self._watches.close()

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        process = super()._run_uvicorn_command()
        self._watches.enter_context(ending_with_us(process.pid))
        return process
