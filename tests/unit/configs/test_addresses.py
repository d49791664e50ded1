"""Which addresses an endpoint may be at."""

import pytest

from configs.addresses import forbidden, trouble
from configs.load import ConfigError, load


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.0.1",
        "169.254.255.255",
        "fe80::1",
        "fe80::1%eth0",
        "febf::1",
        "::ffff:169.254.169.254",
        "::169.254.169.254",
        "::100.100.100.200",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a9fe:a9fe",
        "64:ff9b:1:abcd::168.63.129.16",
        "64:ff9b:1:a9fe:a9:fe00::",
        "64:ff9b:1:a9:fe:a9fe::",
        "64:ff9b:1:0:a9:fea9:fe00:0",
        "2002:a9fe:a9fe::1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "fd00:ec2::254",
        "::ffff:100.100.100.200",
    ],
)
def test_link_local_and_metadata_addresses_are_forbidden_however_they_are_written(address: str) -> None:
    assert forbidden(address) is not None


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "::1",
        "::",
        "::10.0.0.7",
        "64:ff9b:1::a00:7",
        "64:ff9b::808:808",
        "10.0.0.7",
        "192.168.1.1",
        "100.100.100.201",
        "169.253.255.255",
        "169.255.0.0",
        "fec0::1",
    ],
)
def test_this_machine_and_private_networks_are_not(address: str) -> None:
    assert forbidden(address) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://me:hunter2@scores.example/v1", "a user or a password"),
        ("http://hunter2@scores.example/", "a user or a password"),
        ("http://scores.example\\@hunter2/", "a user or a password"),
        ("http://scores.example/?key=hunter2", "a secret in its query"),
        ("http://scores.example/?v=1&access_token=hunter2", "a secret in its query"),
        ("http://scores.example/?X-Amz-Signature=hunter2", "a secret in its query"),
        ("http://169.254.169.254/hunter2", "a link-local address"),
        ("https://[fe80::1]:8000/hunter2", "a link-local address"),
    ],
)
def test_an_address_that_will_not_do_is_refused_and_its_secret_not_repeated(url: str, words: str) -> None:
    found = trouble(url)
    assert found is not None
    assert words in found
    assert "hunter2" not in found or url.partition("@")[2].rstrip("/") == "hunter2"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/score", "https://scores.example/a?version=2", "http://[::1]/"])
def test_others_will_do(url: str) -> None:
    assert trouble(url) is None


@pytest.mark.parametrize(
    ("url", "entry"),
    [
        ("http://Scores.Example/x", "scores.example"),
        ("http://scores.example./x", "SCORES.example"),
        ("http://scores.example/x", "scores.example:80"),
        ("https://scores.example/x", "scores.example:443"),
        ("https://scores.example:8443/x", "scores.example:8443"),
        ("http://[::1]:99/x", "[::1]:99"),
        ("http://[::1]:99/x", "[::1]"),
    ],
)
def test_the_allow_list_takes_hosts_with_and_without_a_port(url: str, entry: str) -> None:
    assert trouble(url, allowed_hosts=["elsewhere", entry]) is None
    assert "cluster.allowed_hosts" in (trouble(url, allowed_hosts=[]) or "")


@pytest.mark.parametrize("entry", ["example", "scores.example:8080", "evil-scores.example", "[::1]"])
def test_the_allow_list_takes_nothing_else(entry: str) -> None:
    found = trouble("http://scores.example/x", allowed_hosts=[entry])
    assert found == f"scores.example:80 is not among cluster.allowed_hosts ({entry})"


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ("scoring.rewards=[{kind: http, name: a, url: 'URL'}]", "scoring.rewards.0.url"),
        ("rounds.labeler={kind: judge, model: m, url: 'URL'}", "rounds.labeler of round 1: url"),
        ("rounds.overrides={'2': {labeler: {kind: judge, model: m, url: 'URL'}}}", "rounds.labeler of round 2: url"),
        ("rounds.evaluation.labeler={kind: judge, model: m, url: 'URL'}", "rounds.evaluation.labeler: url"),
    ],
)
def test_a_configuration_is_held_to_it_wherever_it_names_an_endpoint(section: str, where: str) -> None:
    overrides = ["models.critic.init=policy", "rounds.collect.comparisons=0", "rounds.count=2"]
    for url, allowed, words in (
        ("http://hunter2@a.example/v1", "null", "a user or a password"),
        ("http://169.254.169.254/v1", "null", "a link-local address"),
        ("http://a.example/v1", "[b.example]", "a.example:80 is not among cluster.allowed_hosts (b.example)"),
    ):
        chosen = [*overrides, section.replace("URL", url), f"cluster.allowed_hosts={allowed}"]
        with pytest.raises(ConfigError) as caught:
            load("quickstart", chosen)
        assert f"{where}: " in str(caught.value)
        assert words in str(caught.value)
        assert "hunter2" not in str(caught.value)
    fine = [section.replace("URL", "http://a.example/v1"), "cluster.allowed_hosts=[a.example]"]
    assert load("quickstart", [*overrides, *fine]).cluster.allowed_hosts == ["a.example"]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("data.prompts.source=https://me:hunter2@data.example/prompts.jsonl", "data.prompts.source"),
        ("cluster.address=ray://:hunter2@head:10001", "cluster.address"),
        ("scoring.rewards=[{kind: http, name: a, url: 'http://me:hunter2@b/'}]", "scoring.rewards.0.url"),
        ("models.policy={path: 'https://me:hunter2@hub.example/m'}", "models.policy.path"),
    ],
)
def test_no_value_at_all_is_an_address_with_a_password(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("quickstart", [override])
    assert f"{where}: this address has a password in it" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("source", ["https://data.example:8443/a@b", "s3://bucket/a:b@c", "me@host:/data"])
def test_an_at_sign_elsewhere_is_no_password(source: str) -> None:
    assert load("quickstart", [f"data.prompts.source={source}"]).data.prompts.source == source
