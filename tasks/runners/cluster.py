"""What runners on a cluster have in common."""

import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from poemerge.errors import SettingError
from poemerge.merging.work import Work, make_shard

ANSWER = 10  # seconds for a host to answer; the clusters' own clients wait for minutes


@dataclass(frozen=True)
class OnCluster:
    """A runner on a cluster, which gives the job of a worker that dies to another one.

    Attributes:
        workers: to start where there is no address.
        address: of a cluster that runs already, `tcp://host:8786` (Dask) or `host:6379` (Ray).
        work: what a worker does with a job.
    """

    workers: int
    address: str | None = None
    work: Work = make_shard

    def see_it_listens(self) -> None:
        """See that somebody listens at `address`, if it names a host and a port.

        Raises:
            SettingError: nobody does.
        """
        address = self.address or ""
        try:
            parts = urlsplit(address if "://" in address else f"//{address}")
            if parts.port:
                socket.create_connection((parts.hostname, parts.port), ANSWER).close()
        except (OSError, ValueError) as error:
            raise SettingError(
                f"No cluster answers at {address} ({error}); start it, or mend runtime.address."
            ) from error
