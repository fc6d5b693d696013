"""Reading ahead and writing behind: the disk works while the processor does."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
BEHIND = 2  # writes that may wait; more would be memory without use


def ahead(
    load: Callable[[Item], Loaded], items: Iterable[Item], *, eager: Callable[[Item], bool]
) -> Iterator[tuple[Item, Loaded]]:
    """(item, load(item)) in order; the next is loaded in a thread while this one is in use.

    Args:
        load: called in the thread.
        items: what to load.
        eager: False for an item that is to be loaded only when its turn comes.
    """

    def work(item: Item) -> Loaded:
        with torch.inference_mode():  # which holds for one thread only
            return load(item)

    with ThreadPoolExecutor(1, "read-ahead") as pool:
        waiting: deque[tuple[Item, Future[Loaded] | None]] = deque()

        def take() -> tuple[Item, Loaded]:
            item, future = waiting.popleft()
            return item, (future or pool.submit(work, item)).result()

        for item in items:
            waiting.append((item, pool.submit(work, item) if eager(item) else None))
            if len(waiting) > 1:
                yield take()
        while waiting:
            yield take()


class Behind:
    """Calls made in a thread, in order, a few at most waiting; use as a context.

    An error in one is raised at the next call, or when the context ends.

    Args:
        limit: calls that may wait; with 0 each is waited for.
    """

    def __init__(self, limit: int = BEHIND) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1, "write-behind")
        self._waiting: deque[Future[Any]] = deque()

    def call(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do `work(*arguments)` soon."""
        self._waiting.append(self._pool.submit(work, *arguments))
        while len(self._waiting) > self._limit:
            self._waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._waiting:
                future.result()
