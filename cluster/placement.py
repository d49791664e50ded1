"""Placement: how many resources each role asks for, whether the cluster has them, and one placement group a role."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.cluster import RolePlacementConfig
from configs.run import RunConfig
from protocol.errors import UserError

Bundle = dict[str, float]


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


class Placement:
    """The placement groups of a run."""

    def __init__(self, plans: tuple[RolePlan, ...], *, deadline_s: float) -> None:
        self._groups: dict[str, PlacementGroup] = {}
        for role in plans:
            self._groups[role.role] = placement_group(list(role.bundles), strategy=role.strategy)
        self._bundles = {role.role: role.bundles for role in plans}
        for role, group in self._groups.items():
            if not group.wait(deadline_s):
                self.remove()
                raise UserError(
                    f"the cluster did not grant the {role} placement group within {deadline_s:g} s",
                    where="cluster",
                    cause="the resources exist but are taken, or no node holds a whole bundle",
                    next_step="look at `ray status`, or raise cluster.deadlines.placement_s",
                )

    def options(self, role: str, index: int) -> dict[str, object]:
        """The actor options that put worker `index` of a role into its bundle."""
        bundle = self._bundles[role][index]
        custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "resources": custom or None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._groups[role], placement_group_bundle_index=index
            ),
        }

    def remove(self) -> None:
        """Give all resources back."""
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups.clear()


def available_resources() -> dict[str, float]:
    """Ask Ray what the cluster has in total."""
    return dict(ray.cluster_resources())
