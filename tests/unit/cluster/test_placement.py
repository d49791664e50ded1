"""Placement: what the roles ask for, and what is said when the cluster has less."""

import pytest

from cluster import placement
from configs.load import load
from protocol.errors import UserError


def test_too_many_workers_are_refused_with_both_numbers() -> None:
    config = load(
        "quickstart",
        [
            "rollout.workers=4",
            "rollout.cpus_per_worker=1",
            "scoring.cpus_per_worker=1",
            "learner.workers=2",
            "learner.cpus_per_worker=1",
        ],
    )
    with pytest.raises(UserError, match="needs 8 CPUs, the cluster has 2"):
        placement.check(placement.plan(config), {"CPU": 2.0})


def test_a_missing_custom_resource_is_named() -> None:
    config = load("quickstart", ["cluster.placement.learner.resources.learner_node=1"])
    with pytest.raises(UserError, match="needs 1 learner_node, the cluster has 0"):
        placement.check(placement.plan(config), {"CPU": 8.0})


def test_gpus_are_asked_for_on_cuda_alone() -> None:
    plans = {role.role: role for role in placement.plan(load("llama_70b_apa_multinode"))}
    assert plans["rollout"].bundles[0]["GPU"] == 4
    assert len(plans["learner"].bundles) == 40
    assert len(plans["scoring"].bundles) == 8
    assert all("GPU" not in role.bundles[0] for role in placement.plan(load("quickstart")))


def test_what_fits_passes() -> None:
    placement.check(placement.plan(load("quickstart")), {"CPU": 2.0})
