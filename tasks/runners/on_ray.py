"""Workers of a Ray cluster, one that is there or one that is started here."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from poemerge.errors import MachineError, SettingError
from poemerge.merging.shards import Shard
from poemerge.merging.work import ShardJob
from tasks.runners.cluster import OnCluster
from tasks.runners.worker import TRIES

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unasked

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise SettingError("runner is ray; install it: pip install 'poemerge[ray]'.") from error


class OnRay(OnCluster):
    """A runner on Ray."""

    def __call__(self, jobs: Sequence[ShardJob], done: Callable[[Shard], None]) -> None:
        """Do all jobs, the first ones first.

        Raises:
            PoemergeError: one was refused; or its workers died, one after another.
        """
        with self._connected():
            gpus = [int(job.recipe.choices.device.type == "cuda") for job in jobs]
            make = ray.remote(num_cpus=1, max_retries=TRIES - 1)(self.work)
            waiting = [
                make.options(num_gpus=own).remote(job) for job, own in zip(jobs, gpus, strict=True)
            ]
            try:
                while waiting:
                    ready, waiting = ray.wait(waiting)
                    for each in ready:
                        done(_result(each))
            finally:
                for each in waiting:
                    ray.cancel(each, force=True)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        if ray.is_initialized():  # by whoever uses us as a library
            yield
            return
        self.see_it_listens()
        own: dict[str, Any] = {"num_cpus": self.workers, "include_dashboard": False}
        try:
            ray.init(
                self.address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                **({} if self.address else own),
            )
        except Exception as error:  # Ray raises just this where it starts too slowly
            where = f"be reached at {self.address}" if self.address else "start here"
            first = " ".join(str(error).split())
            raise SettingError(
                f"Ray cannot {where} ({first}); try again, or mend runtime.address."
            ) from error
        try:
            yield
        finally:
            ray.shutdown()


def _result(shard: Any) -> Shard:
    try:
        return ray.get(shard)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        first = str(error).strip().splitlines()[0]
        raise MachineError(
            f"Workers of Ray died at one job, one after another ({first})"
        ) from error
