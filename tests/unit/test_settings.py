# SPDX-License-Identifier: Apache-2.0
"""Settings: both channels, precedence, and clear errors."""

from __future__ import annotations

from typing import Any

import pytest

from dp_sync_patch.errors import SettingsError
from dp_sync_patch.settings import Settings, load


def test_defaults() -> None:
    assert load({}, {}) == Settings()
    assert load(None, {}).values() == {
        "mode": "auto",
        "graph_mode": "auto",
        "agreement_timeout_s": 120.0,
        "delegate_plugins": "on",
        "same_as": "none",
    }


def test_environment_wins_over_additional_config() -> None:
    found = load(
        {"dp_sync_patch": {"mode": "off", "agreement_timeout_s": 7}, "recompute_scheduler_enable": True},
        {"DP_SYNC_PATCH_MODE": "require", "UNRELATED": "1"},
    )
    assert (found.mode, found.agreement_timeout_s) == ("require", 7.0)
    sources = dict(found.sources)
    assert sources["mode"] == "environment"
    assert sources["agreement_timeout_s"] == "additional_config"
    assert sources["graph_mode"] == "default"


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
def test_errors_name_the_setting_and_what_is_allowed(
    section: dict[str, Any], environ: dict[str, str], code: str, mentions: str
) -> None:
    with pytest.raises(SettingsError) as error:
        load({"dp_sync_patch": section}, environ)
    assert error.value.code == code
    assert mentions in str(error.value)


def test_the_section_must_be_a_mapping() -> None:
    with pytest.raises(SettingsError, match="DSP401"):
        load({"dp_sync_patch": "auto"}, {})
