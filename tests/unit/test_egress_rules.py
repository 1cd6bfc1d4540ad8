"""What machines may reach: by name, by address, and by what the operator says."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from helmr.errors import ConfigError
from worker.egress_rules import Neighbourhood, Refused, Rules, is_own, plain


def _rules(*hosts: str, **environ: str) -> Rules:
    return Rules(hosts or None, Neighbourhood.of(environ, servers=(("8.8.8.8", 4222),)))


NEAR = (
    *("127.0.0.1", "127.1.2.3", "0.0.0.0", "::1", "::"),  # this machine
    *("10.0.0.1", "172.17.0.1", "192.168.1.1", "fd00::1", "fc00::1", "100.64.0.1", "198.18.0.1"),  # its network
    *(
        "169.254.169.254",
        "fe80::1",
        "fe80::1%eth0",
        "168.63.129.16",
        "100.100.100.200",
        "fd00:ec2::254",
    ),  # a cloud's own
    *("224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1"),  # many, or nobody
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::a00:1"),  # in disguise
)


def test_what_is_not_public_cannot_be_reached() -> None:
    rules = _rules()
    for address in NEAR:
        with pytest.raises(Refused):
            rules.check_address(address, 443)


def test_what_is_public_can_be_reached() -> None:
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"):
        _rules().check_address(address, 443)


def test_an_address_of_the_worker_is_its_own_however_public_it_looks() -> None:
    assert is_own(plain("127.0.0.1"))
    assert not is_own(plain("8.8.8.8"))
    assert not is_own(ipaddress.ip_address("2606:4700:4700::1111"))


def test_the_networks_the_worker_is_on_are_closed_however_public_they_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    four += "eth0 00000000 010200C0 0003 0 0 0 00000000 0 0 0\neth0 00020808 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"
    six = "{} 40 {} 00 {} 00000100 00000001 00000000 00000001 eth0\n"
    none = "0" * 32
    (tmp_path / "route").write_text(four)
    (tmp_path / "ipv6_route").write_text(
        six.format("26064700000000000000000000000000", none, none) + six.format(none, none, none)
    )
    monkeypatch.setattr("worker.egress_rules._ROUTES", (tmp_path / "route", tmp_path / "ipv6_route"))
    for address in ("8.8.2.9", "2606:4700::9"):
        with pytest.raises(Refused, match="own network"):
            _rules().check_address(address, 443)
    for address in ("8.8.8.8", "2607::1", "203.0.113.5"):
        _rules().check_address(address, 443)


def test_the_operator_opens_and_closes() -> None:
    rules = _rules(
        HELMR_EGRESS_ALLOW="10.1.0.0/16:443, 127.0.0.1:11434,[fd00::]/8:22, fd01::/16",
        HELMR_EGRESS_DENY="10.1.9.0/24, 1.1.1.1",
    )
    for address, port in (
        ("10.1.2.3", 443),
        ("127.0.0.1", 11434),
        ("fd00::5", 22),
        ("fd01::5", 1),
        ("::ffff:10.1.2.3", 443),
    ):
        rules.check_address(address, port)
    for address, port in (
        ("10.1.2.3", 80),
        ("127.0.0.1", 4222),
        ("10.1.9.9", 443),
        ("1.1.1.1", 443),
        ("10.2.0.1", 443),
    ):
        with pytest.raises(Refused):
            rules.check_address(address, port)


def test_the_nats_server_is_closed_whatever_the_operator_opens() -> None:
    rules = _rules(HELMR_EGRESS_ALLOW="0.0.0.0/0")
    rules.check_address("8.8.8.8", 443)
    with pytest.raises(Refused, match="NATS"):
        rules.check_address("8.8.8.8", 4222)


def test_what_is_no_network_is_a_mistake_that_is_named() -> None:
    for text in ("10.0.0.0/33", "lan", "10.0.0.1:http", "10.0.0.0/8 10.1.0.0/16"):
        with pytest.raises(ConfigError, match="HELMR_EGRESS_ALLOW"):
            Neighbourhood.of({"HELMR_EGRESS_ALLOW": text})


def test_without_a_list_any_name_will_do() -> None:
    _rules().check_name("anything.example", 9)


LISTED = [
    ("api.example.com", 443),
    ("API.Example.COM.", 80),
    ("x.example.org", 443),
    ("a.b.example.org", 443),
    ("git.example.net", 22),
]
NOT_LISTED = [
    *(("api.example.com", 22), ("git.example.net", 443), ("93.184.216.34", 443)),
    *(("evil-api.example.com", 443), ("api.example.com.evil.org", 443), ("example.org", 443), ("notexample.org", 443)),
]


def test_a_list_means_exactly_what_it_says() -> None:
    rules = _rules("api.example.com", "*.Example.org", "git.example.net:22")
    for host, port in LISTED:
        rules.check_name(host, port)
    for host, port in NOT_LISTED:
        with pytest.raises(Refused, match="list of hosts"):
            rules.check_name(host, port)
