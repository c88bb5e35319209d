"""Options: accepted, changed and refused values, and the presets."""

from __future__ import annotations

from typing import Any

import pytest

import sparsecomm as sc
from sparsecomm.errors import ConfigError
from sparsecomm.exchange.config import SparseConfig
from sparsecomm.feedback import MomentumCorrection
from sparsecomm.presets import PRESETS, preset


@pytest.mark.parametrize("name", ["ef-topk", "oktopk", "dgc", "dense"])
def test_presets_are_configs_that_a_state_takes(name: str) -> None:
    config = preset(name)
    assert isinstance(config, SparseConfig)
    assert sc.SparseState(config).config == config
    assert config == preset(name)
    assert name in PRESETS


def test_presets_take_their_options_and_name_unknown_ones() -> None:
    assert preset("ef-topk", density=0.2).compressor == sc.TopK(0.2)
    with pytest.raises(ConfigError, match=r"preset 'dgc'.*densty"):
        preset("dgc", densty=0.1)
    with pytest.raises(ConfigError, match=r"'dcg'.*dgc"):
        preset("dcg")


def test_change_keeps_the_rest_and_the_original() -> None:
    config = SparseConfig(compressor=sc.ThresholdTopK(0.1, interval=7), value_codec="int8")
    changed = config.change(density=0.2, collective="dense")
    assert changed.compressor == sc.ThresholdTopK(0.2, interval=7)
    assert (changed.value_codec, changed.collective, config.collective) == ("int8", "dense", "auto")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"densty": 0.1}, ["densty", "density", "collective"]),
        ({"density": 1.5}, ["1.5"]),
        ({"compressor": sc.Dense(), "density": 0.1}, ["0.1", "Dense"]),
        ({"value_codec": "fp8"}, ["value_codec", "'fp8'", "int8"]),
        ({"index_codec": "dense"}, ["index_codec", "'dense'"]),
        ({"dense_below": -1}, ["dense_below", "-1"]),
        ({"dense_steps": True}, ["dense_steps", "True"]),
        ({"feedback": "yes"}, ["feedback", "'yes'"]),
    ],
)
def test_a_bad_change_names_option_and_value(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseConfig().change(**options)
    assert all(w in str(caught.value) for w in words), str(caught.value)


def test_a_live_state_takes_new_options_or_none_of_them() -> None:
    state = sc.SparseState(sc.TopK(0.1))
    state.update(density=0.5, value_codec="fp32")
    assert (state.config.compressor, state.config.value_codec) == (sc.TopK(0.5), "fp32")
    before = state.config
    with pytest.raises(ConfigError):
        state.update(density=0.2, value_codec="fp8")
    assert state.config == before


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": True},
        {"momentum": float("nan")},
        {"momentum": "0.9"},
        {"nesterov": 1},
        {"masking": None},
        {"clip_norm": 0},
        {"clip_norm": -1.0},
        {"clip_norm": float("inf")},
        {"clip_norm": True},
    ],
)
def test_bad_momentum_options_are_refused_by_name_and_value(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError) as caught:
        MomentumCorrection(**options)
    assert f"MomentumCorrection.{name}" in str(caught.value)
    assert repr(value) in str(caught.value)
