"""Rates and host names, without a server."""

import pytest

from reward_service.labeling.guard import Buckets, Rate, hosts_for


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    buckets = Buckets(Rate(per_s=2.0, burst=3))
    assert [buckets.take("ana", now=10.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert buckets.take("bob", now=10.0) == 0.0
    assert buckets.take("ana", now=10.4) == pytest.approx(0.1)
    assert buckets.take("ana", now=10.5) == 0.0
    assert [buckets.take("ana", now=100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_full_buckets_are_forgotten() -> None:
    buckets = Buckets(Rate(per_s=1.0, burst=2))
    buckets.MANY = 5
    for number in range(50):
        buckets.take(str(number), now=float(number))
    assert len(buckets._levels) <= 6


@pytest.mark.parametrize(
    ("listens", "names", "host", "allowed"),
    [
        ("127.0.0.1", [], "127.0.0.1:8600", True),
        ("127.0.0.1", [], "LOCALHOST", True),
        ("127.0.0.1", [], "[::1]:8600", True),
        ("127.0.0.1", [], "10.0.0.1", False),
        ("127.0.0.1", [], "rebound.example", False),
        ("127.0.0.1", ["labels.example"], "labels.example", True),
        ("127.0.0.1", ["labels.example"], "x.labels.example", False),
        ("0.0.0.0", [], "10.0.0.1:80", True),
        ("0.0.0.0", [], "rebound.example", False),
        ("127.0.0.1", [], "", False),
        ("127.0.0.1", [], "user@127.0.0.1@evil", False),
    ],
)
def test_hosts(listens: str, names: list[str], host: str, allowed: bool) -> None:
    assert hosts_for(listens, names).allow(host) is allowed
