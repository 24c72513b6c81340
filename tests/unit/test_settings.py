# SPDX-License-Identifier: Apache-2.0
"""Settings: all channels, precedence, and clear errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dp_sync_patch import settings
from dp_sync_patch.errors import SettingsError
from dp_sync_patch.settings import Settings, load

CONNECTOR, ADDITIONAL = CHANNELS = ("kv_connector_extra_config", "additional_config")


def config(connector: Any = None, additional: Any = None) -> Any:
    """What is read of a VllmConfig. None: the mapping has no section; without `connector` there is no KV transfer."""
    mappings = [{"other": 1} if section is None else {"dp_sync_patch": section} for section in (connector, additional)]
    transfer = None if connector is None else SimpleNamespace(kv_connector_extra_config=mappings[0])
    return SimpleNamespace(kv_transfer_config=transfer, additional_config=mappings[1])


def in_channel(channel: str, section: Any) -> Any:
    return config(connector=section) if channel == CONNECTOR else config(additional=section)


def test_defaults() -> None:
    empty = SimpleNamespace(kv_connector_extra_config={})
    for found in (
        None,
        config(),
        config({}, {}),
        SimpleNamespace(kv_transfer_config=empty, additional_config={}),
        SimpleNamespace(kv_transfer_config=None, additional_config=None),
    ):
        assert load(found, {}).values() == Settings().values()
        assert {source for _, source in load(found, {}).sources} == {"default"}
    assert load(None, {}).values() == {
        "mode": "auto",
        "graph_mode": "auto",
        "agreement_timeout_s": 120.0,
        "delegate_plugins": "on",
        "same_as": "none",
    }


@pytest.mark.parametrize("channel", CHANNELS)
def test_environment_wins_over_the_configuration(channel: str) -> None:
    found = load(
        in_channel(channel, {"mode": "off", "agreement_timeout_s": 7}),
        {"DP_SYNC_PATCH_MODE": "require", "UNRELATED": "1"},
    )
    assert (found.mode, found.agreement_timeout_s) == ("require", 7.0)
    sources = dict(found.sources)
    assert sources["mode"] == "environment"
    assert sources["agreement_timeout_s"] == channel
    assert sources["graph_mode"] == "default"
    assert found.describe("mode") == "'require' (environment)"
    assert found.describe("agreement_timeout_s") == f"7.0 ({channel})"
    assert found.describe("graph_mode") == "'auto' (default)"


def test_both_sections_count_where_they_do_not_contradict_each_other() -> None:
    found = load(config({"mode": "off", "graph_mode": "sync"}, {"graph_mode": "sync", "agreement_timeout_s": 7}), {})
    assert (found.mode, found.graph_mode, found.agreement_timeout_s) == ("off", "sync", 7.0)
    sources = dict(found.sources)
    assert sources["mode"] == CONNECTOR
    assert sources["agreement_timeout_s"] == ADDITIONAL


@pytest.mark.parametrize("environ", [{}, {"DP_SYNC_PATCH_MODE": "auto"}])
def test_sections_that_contradict_each_other_are_an_error(environ: dict[str, str]) -> None:
    """Also where the environment has the last word: one of the two is not what the operator thinks it is."""
    with pytest.raises(SettingsError) as error:
        load(config({"mode": "require"}, {"mode": "off"}), environ)
    assert error.value.code == "DSP403"
    for part in ("mode", "'require' (kv_connector_extra_config)", "'off' in additional_config"):
        assert part in str(error.value)


def test_the_variables_are_those_that_are_read() -> None:
    values = {"GRAPH_MODE": "sync", "AGREEMENT_TIMEOUT_S": "7", "DELEGATE_PLUGINS": "off", "SAME_AS": "0.11.0"}
    environ = {f"DP_SYNC_PATCH_{name}": value for name, value in {"MODE": "off", **values}.items()}
    assert sorted(settings.variables()) == sorted(environ)
    assert {source for _, source in load(None, environ).sources} == {"environment"}


@pytest.mark.parametrize(
    ("section", "environ", "code", "mentions"),
    [
        ({"modus": "auto"}, {}, "DSP401", "modus"),
        ({"delegate_plugins": "off"}, {}, "DSP401", "delegate_plugins"),
        ({}, {"DP_SYNC_PATCH_MODUS": "auto"}, "DSP401", "DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S"),
        ({}, {"DP_SYNC_PATCH_mode": "auto"}, "DSP401", "DP_SYNC_PATCH_MODE"),
        ({"mode": "on"}, {}, "DSP402", "auto, off, require"),
        ({"mode": True}, {}, "DSP402", "auto, off, require"),
        ({}, {"DP_SYNC_PATCH_MODE": ""}, "DSP402", "environment"),
        ({"graph_mode": "always"}, {}, "DSP402", "auto, uniform, sync, refuse"),
        ({"agreement_timeout_s": True}, {}, "DSP402", "seconds"),
        ({"agreement_timeout_s": [1]}, {}, "DSP402", "seconds"),
        ({}, {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "soon"}, "DSP402", "seconds"),
        ({}, {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "nan"}, "DSP402", "seconds"),
        ({}, {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "0"}, "DSP402", "seconds"),
        ({}, {"DP_SYNC_PATCH_AGREEMENT_TIMEOUT_S": "1e9"}, "DSP402", "seconds"),
        # The losing channel is validated too.
        ({"mode": "maybe"}, {"DP_SYNC_PATCH_GRAPH_MODE": "refuse"}, "DSP402", "maybe"),
    ],
)
@pytest.mark.parametrize("channel", CHANNELS)
def test_errors_name_the_setting_and_what_is_allowed(
    channel: str, section: dict[str, Any], environ: dict[str, str], code: str, mentions: str
) -> None:
    with pytest.raises(SettingsError) as error:
        load(in_channel(channel, section), environ)
    assert error.value.code == code
    assert mentions in str(error.value)


@pytest.mark.parametrize(("channel", "other"), [CHANNELS, CHANNELS[::-1]])
@pytest.mark.parametrize("section", [{"modus": "auto"}, {"mode": "on"}, "auto", ["mode"]])
def test_errors_name_the_channel(channel: str, other: str, section: Any) -> None:
    """And no other one. Both are looked at, whatever the other says."""
    for found in (in_channel(channel, section), config(*((section, {}) if channel == CONNECTOR else ({}, section)))):
        with pytest.raises(SettingsError) as error:
            load(found, {})
        assert channel in str(error.value)
        assert other not in str(error.value)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("section", ["auto", ["mode"], 3, True])
def test_the_section_must_be_a_mapping(channel: str, section: Any) -> None:
    with pytest.raises(SettingsError, match=rf"DSP401 {channel}\.dp_sync_patch must be a mapping, found"):
        load(in_channel(channel, section), {})
