"""A method applied to a loaded batch: which method, with which say, and where it fits."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from poemerge.errors import NumericalError
from poemerge.merging.choices import MODE_ALONE, Draws
from poemerge.merging.groups import Batch
from poemerge.merging.loader import Loaded
from poemerge.merging.memory import is_shortage, shortages
from poemerge.merging.plan import Plan
from poemerge.method import Call, Merged, Method, Posterior, Sampling
from poemerge.methods import find
from poemerge.rules import AVERAGE, VOCABULARY
from poemerge.task_vector import Stack, StreamedStack
from poemerge.update import Dense, LowRank, Update

CPU = torch.device("cpu")
Stacked = Stack | StreamedStack


@dataclass
class Applier:
    """Merges batches of a plan.

    Attributes:
        plan: whose method and settings are used.
        seed: of methods that draw at random, and of draws from the posterior.
        device: where to solve.
        draws: from the posterior.
        spilled: names of tensors that did not fit on the GPU and were solved on the CPU.
    """

    plan: Plan
    seed: int
    device: torch.device
    draws: Draws = MODE_ALONE
    spilled: list[str] = field(default_factory=list)

    def merge(self, batch: Batch, loaded: Loaded) -> Merged:
        """The merged updates of a batch, before `strength`.

        Raises:
            NumericalError: a system has no unique solution; the message names the tensor.
            MachineError: memory does not suffice for one tensor alone; likewise.
        """
        stack = loaded.stack
        assert stack is not None
        call = self._call(batch, loaded)
        if loaded.squares.device.type != self.device.type:
            self.spilled += [info.name for info in batch.tensors]
        merged = self._fitting(batch, stack, call)
        if merged is None:
            parts = [self._alone(batch, stack, call, i) for i in range(len(batch.tensors))]
            merged = _join(parts)
        return merged

    def _alone(self, batch: Batch, stack: Stacked, call: Call, index: int) -> Merged:
        """One tensor of a batch that did not fit as a whole: on the GPU, else on the CPU."""
        own = replace(batch, tensors=batch.tensors[index : index + 1])
        part, given = stack.part(index), _part_of(call, index)
        merged = self._fitting(own, part, given)
        if merged is None:
            name = own.tensors[0].name
            if self.device != CPU:
                self.spilled.append(name)
            with shortages(name):
                merged = self._apply(own, part.to(CPU), _moved(given, CPU))
        return merged

    def _fitting(self, batch: Batch, stack: Stacked, call: Call) -> Merged | None:
        """None where memory does not suffice."""
        try:
            return self._apply(batch, stack, call)
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
        torch.cuda.empty_cache()
        return None

    def _apply(self, batch: Batch, stack: Stacked, call: Call) -> Merged:
        method, settings = self._method(batch)
        try:
            return method.merge(stack, settings, call)
        except NumericalError as error:
            raise NumericalError(f"{batch.tensors[0].name}: {error}") from error

    def _method(self, batch: Batch) -> tuple[Method, Any]:
        method: Method = self.plan.method
        settings: Any = self.plan.settings
        if batch.group.rule == AVERAGE:
            return find("average"), settings
        if batch.group.rule == VOCABULARY:
            return method, replace(settings, side="input")
        return method, settings

    def _call(self, batch: Batch, loaded: Loaded) -> Call:
        names = [self.plan.experts[i].name for i in batch.group.voters]
        say = self.plan.settings.weight_of
        weights = [[say(name, info.name) for name in names] for info in batch.tensors]
        return Call(
            torch.tensor(weights, dtype=torch.float64, device=loaded.squares.device),
            tuple(tuple(seed_of(self.seed, i.name, n) for n in names) for i in batch.tensors),
            loaded.curvature,
            loaded.prepared,
            batch.group.cut,
            self._sampling(batch),
        )

    def _sampling(self, batch: Batch) -> Sampling | None:
        if not self.draws.count:
            return None
        seeds = tuple(seed_of(self.seed, info.name, "posterior") for info in batch.tensors)
        return Sampling(seeds, self.draws.sampler, self.draws.temperature)


def seed_of(seed: int, tensor: str, expert: str) -> int:
    """A seed of its own for each draw, whatever the order of the walk."""
    text = f"{seed}\0{tensor}\0{expert}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def _part_of(call: Call, index: int) -> Call:
    own = slice(index, index + 1)
    return replace(
        call,
        weights=call.weights[own],
        seeds=call.seeds[own],
        curvature=None if call.curvature is None else call.curvature[own],
        prepared=None if call.prepared is None else call.prepared[own],
        sampling=None if call.sampling is None else call.sampling.part(index),
    )


def _moved(call: Call, device: torch.device) -> Call:
    return replace(
        call,
        weights=call.weights.to(device),
        curvature=None if call.curvature is None else call.curvature.to(device),
        prepared=None if call.prepared is None else call.prepared.to(device),
    )


def _join(parts: Sequence[Merged]) -> Merged:
    """One batch of tensors that were merged one by one."""
    known = [part.posterior for part in parts if part.posterior is not None]
    posterior = None
    if known:
        facts = tuple(fact for one in known for fact in one.facts)
        posterior = Posterior(facts, map(_together, zip(*(p.draws for p in known), strict=True)))
    certificates = tuple(certificate for part in parts for certificate in part.certificates)
    return Merged(_together([part.update for part in parts]), certificates, posterior)


def _together(updates: Sequence[Update]) -> Update:
    """One update of a batch, on the CPU if a part of it is there: the GPU had no room for it."""
    if any(update.device.type == "cpu" for update in updates):
        updates = [update.to(CPU, torch.float32) for update in updates]
    factors = [update for update in updates if isinstance(update, LowRank)]
    if len(factors) == len(updates):
        ups, downs = zip(*((u.up, u.down) for u in factors), strict=True)
        return LowRank(torch.cat(ups), torch.cat(downs))
    return Dense(torch.cat([update.dense() for update in updates]))
