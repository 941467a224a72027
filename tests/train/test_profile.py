"""A profile of ``fluid-npu tune`` decides the overlap of a run where it was measured, and only there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fluid_npu import cli
from fluid_npu.train.config import ConfigError, TrainConfig
from fluid_npu.train.profile import Profile, key_of
from tests.support.ranks import run_ranks
from tests.support.training import store, tiny

SETTINGS = {
    "overlap": "dw",
    "carry_over": True,
    "dispatch": "once-per-rank",
    "moe_chunks": "auto",
    "moe_chunks_of": "auto",
    "local_first": False,
    "interleave_batches": True,
    "attention_chunks": 1,
    "moe_cuda_graph": True,
    "a2a_transport": "pairwise",
    "a2a_ctas": 0,
}


def settled(config_text: str, change: dict[str, Any]) -> tuple[bool, str, bool, Any, str, str]:
    """carry_over, dispatch, halves, recording, overlap and its reason under a profile with a changed key.

    It is in a file of rank 0.
    """
    from fluid_npu.train.overlap import settle
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    place = join(config, store())
    key = {**key_of(config, place, hosts=1), **change}
    path = Path(config.out, f"{place.rank}.json")
    if place.first:
        path.write_text(json.dumps(Profile(key=key, settings=SETTINGS, reason="1.2 times plain").as_dict()))
    config, (value, reason) = settle(dataclasses.replace(config, profile=str(path)), place)
    return config.carry_over, config.dispatch, config.interleave_batches, config.moe_cuda_graph, value, reason


def test_a_profile_of_this_place_decides_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, settled, tiny(tmp_path).to_json(), {})
    assert first[:5] == second[:5] == (True, "once-per-rank", True, "auto", "dw")
    assert first[5].endswith("0.json: 1.2 times plain")


def test_a_profile_of_another_place_is_named_and_not_used(tmp_path: Path) -> None:
    first, second = run_ranks(2, settled, tiny(tmp_path).to_json(), {"hidden": 128})
    assert first[:5] == second[:5] == (False, "plain", False, False, "off")
    assert "is not used: hidden is 64 here and was 128 when it was measured" in first[5]


def unreadable(config_text: str) -> str:
    from fluid_npu.train.overlap import settle
    from fluid_npu.train.parallel import join

    config = TrainConfig.from_json(config_text)
    with pytest.raises(ConfigError) as caught:
        settle(config, join(config, store()))
    return str(caught.value)


def test_an_unreadable_profile_stops_every_rank(tmp_path: Path) -> None:
    found = run_ranks(2, unreadable, tiny(tmp_path, profile=str(tmp_path / "none.json")).to_json())
    assert found[0] == found[1] and "none.json: cannot be read (No such file or directory)" in found[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a profile of schema 6"),
        ("{", "no JSON"),
        ('{"profile": 5}', "not a profile of schema 6"),
        ('{"profile": 6, "key": {}, "reason": "", "settings": {"overlap": "dw"}}', "misses 'carry_over'"),
    ],
)
def test_what_is_no_profile_is_refused_before_anything_starts(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    assert cli.main(["train", "--profile", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"--profile {path}: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
