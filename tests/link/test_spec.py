"""What --link accepts, and what a machine that cannot make links says. Runs everywhere."""

from __future__ import annotations

import errno
import shutil
import sys

import pytest

from fluid_npu.link import LinkError, Loopback, SlowLink, make_network, parse_link, why_unavailable
from fluid_npu.link import namespace as namespace_module


@pytest.mark.parametrize(
    ("text", "bits", "delay"),
    [
        ("1gbit", 10**9, 0.0),
        ("200mbit+2ms", 2 * 10**8, 2.0),
        ("2.5gbit+0.5ms", 25 * 10**8, 0.5),
        ("1500kbit", 1500000, 0),
    ],
)
def test_a_rate_and_a_delay_are_read(text: str, bits: int, delay: float) -> None:
    spec = parse_link(text)
    assert (spec.bits_per_s, spec.delay_ms) == (bits, delay)


@pytest.mark.parametrize("text", ["", "1", "1gb", "1 gbit", "gbit", "-1gbit", "1gbit+", "1gbit+2s", "1gbps", "1GBIT"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"--link .*: not a rate; give a number with kbit, mbit or gbit"):
        parse_link(text)


@pytest.mark.parametrize("text", ["0gbit", "999kbit", "101gbit"])
def test_rates_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"--link {text}: the rate must be between 1mbit and 100gbit"):
        parse_link(text)


def test_the_transfer_time_follows_from_the_rate() -> None:
    assert parse_link("1gbit").transfer_ms(4 * 2**20) == pytest.approx(33.554432)
    assert parse_link("100mbit+5ms").transfer_ms(10**6) == pytest.approx(80.0), "the delay is not the link's"


def test_the_row_says_that_a_delay_is_planted_in_the_transport() -> None:
    assert "planted in the transport" in parse_link("1gbit+2ms").describe()
    assert "planted" not in parse_link("1gbit").describe()


def test_missing_iproute2_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert why_unavailable() == "iproute2 is missing (tc not found); install it: apt-get install iproute2"
    with pytest.raises(LinkError, match=r"--link 1gbit: iproute2 is missing"), SlowLink(2, parse_link("1gbit")):
        pass


def test_without_root_the_reason_and_three_ways_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(namespace_module, "_leave_for_a_new_one", refuse)
    reason = str(why_unavailable())
    for part in ("root is needed", "sudo", "unshare --map-root-user fluid-npu", "--cap-add SYS_ADMIN"):
        assert part in reason


def test_another_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_unavailable() == "network namespaces are Linux's, this is darwin; run it on Linux"


def test_one_rank_has_nobody_to_reach() -> None:
    with pytest.raises(ValueError, match=r"--nproc 1: a link joins 2 to 250 ranks; use --nproc 2"):
        SlowLink(1, parse_link("1gbit"))


def test_without_a_link_everything_stays_on_the_loopback() -> None:
    with make_network(2, None) as network, network.listen() as listener:
        assert isinstance(network, Loopback)
        assert listener.getsockname()[0] == "127.0.0.1"
        assert network.in_rank(1, lambda: 3) == network.in_hub(lambda: 3) == 3
        assert network.environment() == {}
