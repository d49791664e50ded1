"""Placement: how many resources each role asks for, whether the cluster has them, and the places it has granted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic, sleep

import ray
from ray._private.state import state  # Ray has no public name for nodes that it drains
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.cluster import RolePlacementConfig
from configs.run import RunConfig
from protocol.errors import UserError

Bundle = dict[str, float]
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RolePlan:
    """What one role asks for: one bundle a worker."""

    role: str
    bundles: tuple[Bundle, ...]
    strategy: str


def plan(config: RunConfig) -> tuple[RolePlan, ...]:
    """Compute the bundles of every role. Scoring holds its reward workers first, then its reference workers."""
    cuda = config.cluster.backend == "cuda"
    rollout, scoring, learner = config.rollout, config.scoring, config.learner
    places = config.cluster.placement
    gpus = {"rollout": float(rollout.tensor_parallel), "scoring": scoring.gpus_per_worker, "learner": 1.0}
    return (
        _role("rollout", rollout.workers, rollout.cpus_per_worker, gpus["rollout"] if cuda else 0, places.rollout),
        _role(
            "scoring",
            scoring.workers + scoring.reference_workers,
            scoring.cpus_per_worker,
            gpus["scoring"] if cuda else 0,
            places.scoring,
        ),
        _role("learner", learner.workers, learner.cpus_per_worker, gpus["learner"] if cuda else 0, places.learner),
    )


def _role(role: str, workers: int, cpus: float, gpus: float, place: RolePlacementConfig) -> RolePlan:
    bundle: Bundle = {"CPU": float(cpus), **place.resources}
    if gpus:
        bundle["GPU"] = float(gpus)
    return RolePlan(role=role, bundles=tuple(dict(bundle) for _ in range(workers)), strategy=place.strategy)


def check(plans: tuple[RolePlan, ...], available: Mapping[str, float]) -> None:
    """Compare what the roles ask for with what the cluster has.

    Raises:
        UserError: Naming each resource that is short, e.g. "needs 8 CPUs, the cluster has 2".
    """
    needed: Counter[str] = Counter()
    for role in plans:
        for bundle in role.bundles:
            needed.update(bundle)
    short = [
        f"needs {amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}, the cluster has "
        f"{available.get(name, 0):g}"
        for name, amount in needed.items()
        if amount > available.get(name, 0) + 1e-6
    ]
    if short:
        asked = "; ".join(f"{role.role}: {len(role.bundles)} x {_spell(role.bundles[0])}" for role in plans)
        raise UserError(
            f"the run {' and '.join(short)}",
            where="cluster",
            cause=f"the roles ask for {asked}",
            next_step="lower rollout.workers, scoring.workers or learner.workers (or *.cpus_per_worker, where roles "
            "take turns on a core), or add nodes; `rondo train CONFIG --dry-run` shows the placement",
        )


def _spell(bundle: Bundle) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())


class Places:
    """The places of one role: one placement group, and a group of its own for each place that came later.

    When a node dies, Ray moves the places on it to other nodes as soon as there is room.
    """

    def __init__(self, plan: RolePlan) -> None:
        self._plan = plan
        first = placement_group(list(plan.bundles), strategy=plan.strategy)
        self._places: dict[int, tuple[PlacementGroup, int]] = {n: (first, n) for n in range(len(plan.bundles))}
        self._vacant: set[int] = set()
        """Places of the first group that were given back: Ray takes no bundle out of a group."""
        self._asked: int | None = None
        """A later place that may not be granted yet."""
        self._next = len(plan.bundles)

    @property
    def indices(self) -> list[int]:
        """The places in use."""
        return sorted(set(self._places) - self._vacant - {self._asked})

    def granted(self, index: int) -> bool:
        """Say whether a place is on a node that Ray takes for alive."""
        group, bundle = self._places[index]
        found = placement_group_table(group)
        # While Ray seeks a node for one place of a group, the others have theirs.
        moving = found["state"] == "RESCHEDULING"
        return found["state"] == "CREATED" or (moving and bool(found["bundles_to_node_id"][bundle]))

    def another(self) -> int | None:
        """Have one more place, if the cluster has room; else see to it that one is asked for. Waits for nothing."""
        draining = draining_nodes()
        for index in sorted(self._vacant):
            group, bundle = self._places[index]
            if self.granted(index) and placement_group_table(group)["bundles_to_node_id"][bundle] not in draining:
                self._vacant.remove(index)
                return index
        if self._asked is None:
            self._asked, self._next = self._next, self._next + 1  # no number comes twice
            self._places[self._asked] = placement_group([self._plan.bundles[0]], strategy="PACK"), 0
        index = self._asked
        if not self.granted(index):
            return None
        self._asked = None
        return index

    def enough(self) -> None:
        """Ask for no more."""
        if self._asked is not None:
            index, self._asked = self._asked, None
            self.give_back(index)

    def wait(self, deadline_s: float) -> bool:
        """Wait until the places are granted; say whether they are."""
        deadline = monotonic() + deadline_s
        while not self.granted(0):
            if monotonic() >= deadline:
                return False
            sleep(_POLL_S)
        return True

    def options(self, index: int) -> dict[str, object]:
        """The actor options that put a worker into its place."""
        group, number = self._places[index]
        bundle = self._plan.bundles[0]
        custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "resources": custom or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=number
            ),
        }

    def give_back(self, index: int) -> None:
        """Give a place back to the cluster; one of the first group is kept for the next who needs a place."""
        if index < len(self._plan.bundles):
            self._vacant.add(index)
        else:
            remove_placement_group(self._places.pop(index)[0])

    def remove(self) -> None:
        """Give all places back."""
        groups = {group.id: group for group, _ in self._places.values()}
        for group in groups.values():
            remove_placement_group(group)
        self._places.clear()

    def part(self, first: int, count: int) -> "PartOfPlaces":
        """So many places from one on, counted from 0."""
        return PartOfPlaces(self, first, range(count))


@dataclass(frozen=True, slots=True)
class PartOfPlaces:
    """Some places of a role: the reward workers' among those of scoring, or the reference workers'."""

    places: Places
    first: int
    indices: Sequence[int]

    def options(self, index: int) -> dict[str, object]:
        """The actor options that put a worker into its place."""
        return self.places.options(self.first + index)

    def granted(self, index: int) -> bool:
        """Say whether a place is on a node that Ray takes for alive."""
        return self.places.granted(self.first + index)

    def give_back(self, index: int) -> None:
        """Give a place back."""
        self.places.give_back(self.first + index)


class Placement:
    """The places of a run."""

    def __init__(self, plans: tuple[RolePlan, ...], *, deadline_s: float) -> None:
        self._roles = {plan.role: Places(plan) for plan in plans}
        for role, places in self._roles.items():
            if not places.wait(deadline_s):
                self.remove()
                raise UserError(
                    f"the cluster did not grant the {role} placement group within {deadline_s:g} s",
                    where="cluster",
                    cause="the resources exist but are taken, or no node holds a whole bundle",
                    next_step="look at `ray status`, or raise cluster.deadlines.placement_s",
                )

    def of(self, role: str) -> Places:
        """The places of one role."""
        return self._roles[role]

    def remove(self) -> None:
        """Give all resources back."""
        for places in self._roles.values():
            places.remove()


def draining_nodes() -> set[str]:
    """Ask Ray which nodes it is about to give up: their machines are preempted or scaled down."""
    return set(state.get_draining_nodes())


def available_resources() -> dict[str, float]:
    """Ask Ray what the cluster has in total."""
    return dict(ray.cluster_resources())
