"""What `interv inspect` says of a config outside the table is what the loaded model has."""

from __future__ import annotations

import pytest

from interv.engine.sample import from_config
from tests.test_recognised_families import CONFIGS, known


@pytest.mark.parametrize("name", ["deepseek_v3", "jamba", "mpt", "glm4"])
def test_two_layers_stand_for_all(name: str) -> None:
    """Two blocks of DeepSeek may be dense, and have neurons that the third has not."""
    config = {"model_type": name, **CONFIGS[name]}
    if name == "deepseek_v3":
        config["first_k_dense_replace"] = 2
    found = from_config(config)
    whole = known(name).family
    assert whole is not None
    assert found.components == whole.components
    assert found.layerless == whole.layerless
