"""The walk over tensors: read, subtract, merge, add, write."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from poemerge.merging.apply import Applier
from poemerge.merging.choices import Choices, check_choices
from poemerge.merging.groups import Batch
from poemerge.merging.loader import Loaded, Loader
from poemerge.merging.memory import give_back, shortages
from poemerge.merging.output import Output
from poemerge.merging.plan import Plan
from poemerge.merging.shards import Shard
from poemerge.merging.stream import BEHIND, ahead
from poemerge.rules import COPY, TIED


class Walk:
    """Shards of one merge, made one after another on one device.

    Args:
        plan: with its files open.
        choices: device, dtype, output, seed, rank, memory, draws.

    Raises:
        SettingError: the choices do not fit the plan.
    """

    def __init__(self, plan: Plan, choices: Choices) -> None:
        check_choices(plan, choices)
        draws = choices.draws
        if not draws.count:  # a draw pulls at all experts at once
            plan = plan.fitted(choices.device, choices.memory)
        self.plan, self.choices = plan, choices
        self.limit = plan.limit(choices.device, choices.memory, sampled=draws.count > 0)
        self.applier = Applier(plan, choices.seed, choices.device, draws)

    @property
    def files(self) -> list[str]:
        """Names of the shards that there is something to do for, in order."""
        return sorted({group.file for group in self.plan.groups if group.rule != TIED})

    def output(
        self, folder: Path, finished: Callable[[Shard], None], waiting: int = BEHIND
    ) -> Output:
        """A folder that weights of this walk go to (output.py)."""
        return Output(
            folder,
            self.plan,
            self.choices,
            finished=finished,
            spilled=self.applier.spilled,
            waiting=waiting,
        )

    def fill(
        self,
        outputs: Sequence[Output],
        files: Collection[str],
        tell: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Make shards, tensor by tensor.

        Args:
            outputs: the mode's, and those of draws.
            files: names of the shards.
            tell: called with the number of tensors that are done, over and over.
        """
        with ExitStack() as stack, closing(self.batches(files)) as batches:
            for output in outputs:
                stack.enter_context(output)
            for batch, loaded in batches:
                with shortages(batch.tensors[0].name):
                    self._merge(batch, loaded, outputs)
                tell(len(outputs[0].ledger.tensors))
        give_back()

    def batches(
        self, files: Collection[str] | None = None
    ) -> Generator[tuple[Batch, Loaded], None, None]:
        """All batches, file by file, each loaded while the one before is solved.

        Args:
            files: names of shards; all of them if None.
        """
        adapter = self.choices.output == "adapter"
        loader = Loader(self.plan, self.choices.device, with_base=not adapter)
        groups = [g for g in self.plan.groups if g.rule != TIED]
        groups = [g for g in groups if files is None or g.file in files]
        groups = [group for group in groups if group.voters or not adapter]
        local = self.plan.method.local and not adapter
        batches = (
            batch
            for group in sorted(groups, key=lambda group: group.file)
            for batch in group.batches(self.limit, local=local)
        )
        for batch, loaded in ahead(loader.load, batches, eager=self._is_small):
            loaded.wait()
            yield batch, loaded
            loaded.release()
            if not self._is_small(batch):
                give_back()

    def _is_small(self, batch: Batch) -> bool:
        """False for what is larger than a batch should be: two of those would be too much."""
        return len(batch.tensors) * batch.as_group.loaded_bytes <= self.limit

    def _merge(self, batch: Batch, loaded: Loaded, outputs: Sequence[Output]) -> None:
        """One batch: its mode goes to the first output, and a draw to each other."""
        mode, *draws = outputs
        if batch.group.rule == COPY:
            for output in outputs:
                output.copy(batch, tuple(loaded.base))
            return
        merged = self.applier.merge(batch, loaded)
        mode.add(batch, loaded, merged.update, merged.certificates, spare=bool(draws))
        for output in draws:
            update, facts = merged.draw()
            output.add(batch, loaded, update, facts, spare=output is not draws[-1])
