"""What runners on a cluster have in common."""

from dataclasses import dataclass

from poemerge.merging.work import Work, make_shard


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
