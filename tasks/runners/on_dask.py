"""Workers of a Dask cluster, one that is there or one that is started here."""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from poemerge.errors import MachineError, SettingError
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob
from tasks.runners.cluster import ANSWER, OnCluster

try:
    from distributed import Client, LocalCluster, Security, as_completed
    from distributed.comm.core import connect
    from distributed.scheduler import KilledWorker
except ImportError as error:
    raise SettingError("runner is dask; install it: pip install 'poemerge[dask]'.") from error

PATIENCE = 60  # seconds for a first worker to come
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells all that it starts and stops


class OnDask(OnCluster):
    """A runner on Dask."""

    def __call__(self, jobs: Sequence[ShardJob], done: Callable[[Shard], None]) -> None:
        """Do all jobs, the first ones first.

        Raises:
            PoemergeError: one was refused; or its workers died, one after another.
        """
        with self._cluster() as address, _connected(address) as client:
            futures = [
                client.submit(self.work, job, pure=False, priority=-rank)
                for rank, job in enumerate(jobs)
            ]
            try:
                for _, shard in as_completed(futures, with_results=True):
                    done(shard)
            except KilledWorker as error:
                raise MachineError(
                    "The workers of Dask died at one job, one after another; see whether their "
                    "machines ended them for want of memory, and set `memory`."
                ) from error
            finally:
                client.cancel(futures)

    @contextmanager
    def _cluster(self) -> Iterator[str]:
        """Address of the one that is there, or of one for the block."""
        if self.address is not None:
            self.see_it_listens()
            yield self.address
            return
        threads = dict.fromkeys(THREADS, str(torch.get_num_threads()))
        with LocalCluster(
            n_workers=self.workers,
            threads_per_worker=1,  # of Dask's, each of which would do a job
            dashboard_address=None,
            env={**os.environ, **threads},
        ) as cluster:
            yield cluster.scheduler_address


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        with ThreadPoolExecutor(1) as apart:  # a caller in a notebook has a running loop
            apart.submit(asyncio.run, _greet(address)).result()
        client = Client(address)
    except Exception as error:  # what listens there may speak another language
        raise SettingError(
            f"No scheduler of Dask answers at {address}; start it, or mend runtime.address."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            message = f"Dask at {address} has no worker; start some (docs/runners.md)."
            raise SettingError(message) from error
        yield client


async def _greet(address: str) -> None:
    """Say hello and leave; a client would wait without end for one who accepts in silence."""
    async with asyncio.timeout(ANSWER):
        known = Security().get_connection_args("client")
        await (await connect(address, timeout=ANSWER, **known)).close()
