"""lm-eval as a function: a candidate's weights in, a score per task, split and item out."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
from torch import Tensor
from transformers.utils import logging as transformers_logging

from poemerge.adapter import is_adapter
from poemerge.merge import expert_weights
from poemerge.progress import Progress
from poemerge.vocabulary import same_vocabulary
from tasks.evaluate.lm_tasks import Score, load_task
from tasks.evaluate.scorer import load_scorer
from tasks.evaluate.task_files import TaskFiles
from tasks.progress import progress

logger = logging.getLogger(__name__)
for _module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
    # `evaluate` has no switch for these bars, of which there would be hundreds.
    _module.tqdm = partial(
        lambda bar, *args, **how: bar(*args, **how | {"disable": True}), _module.tqdm
    )
_ONE_AT_A_TIME = threading.Lock()  # candidates share one model object


@dataclass(frozen=True)
class Harness:
    """lm-eval with everything that is the same for all candidates; see `evaluate`."""

    base: Path
    digest: str  # of the base's files
    dtype: str
    device: str
    batch_size: int
    limit: int | None
    seed: int
    validation: str

    def score(
        self,
        candidate: str,
        kind: str,
        weights: Path | None,
        tasks: Sequence[TaskFiles],
        splits: Sequence[str],
        *,
        content: str,
    ) -> dict[str, dict[str, Score]]:
        """Task → split → score of one candidate; `content` is the digest of its files."""
        with _ONE_AT_A_TIME, _quiet():
            loaded = {task.name: load_task(task) for task in tasks}
            wanted = [(t, s, loaded[t].split(s, self.validation)) for t in loaded for s in splits]
            if not wanted:
                return {}
            home = self._home(kind, weights, content)
            scorer = load_scorer(*home, self.dtype, self.device, self.batch_size)
            where = str(weights or self.base)
            scorer.fill(partial(self._weights, kind, weights), f"{kind} {content}", where)
            scores: dict[str, dict[str, Score]] = {name: {} for name in loaded}
            sizes = [loaded[name].items(split, self.limit) for name, _, split in wanted]
            counted = _Counted(progress(f"evaluate {candidate}", "items"), sum(sizes))
            for (name, split, dataset_split), size in zip(wanted, sizes, strict=True):
                scorer.progress = counted.part(size)
                found = loaded[name].score(scorer, dataset_split, self.limit, self.seed)
                scorer.progress(1, 1)  # of requests of another kind, nothing was told
                scores[name][split] = found
                items = len(found.outcomes)
                logger.info(
                    "%s on %s, %s: %.3f, %d items", candidate, name, split, found.score, items
                )
        return scores

    def _home(self, kind: str, weights: Path | None, content: str) -> tuple[Path, str]:
        """Whose config and tokenizer serve: the base's, but for a merge that has more tokens."""
        if weights is not None and kind == "merge" and not same_vocabulary(weights, self.base):
            return weights, content
        return self.base, self.digest

    def _weights(self, kind: str, weights: Path | None) -> Iterator[tuple[str, Tensor]]:
        if weights is not None and kind == "merge" and not is_adapter(weights):
            return expert_weights(weights, None)  # to the bit what is stored
        return expert_weights(self.base, weights)


class _Counted:
    """Items of all tasks and splits together, out of how far each of them is."""

    def __init__(self, tell: Progress, total: int) -> None:
        self._tell, self._total, self._before = tell, total, 0

    def part(self, size: int) -> Progress:
        """What the next `size` items are told by; those before are done."""
        start, self._before = self._before, self._before + size
        return lambda done, total: self._tell(start + size * done // total, self._total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars and remarks of lm-eval, datasets and transformers off the screen."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(level)
        datasets.enable_progress_bars()
        transformers_logging.enable_progress_bar()
