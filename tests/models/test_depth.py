"""A configuration that asks for more layers than any model has is refused before a module is made."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedlotr.cost.architectures import read_architecture
from fedlotr.errors import InputError
from fedlotr.models.supported import check_depth, check_folder


@pytest.mark.parametrize(
    "found",
    [
        {"num_hidden_layers": 2_001},
        {"n_layer": 10**6},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"num_local_experts": 50_000},
        {"depths": [2, 2, 4_000]},
    ],
)
def test_more_layers_than_any_model_has_are_refused(tmp_path: Path, found: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **found}), encoding="utf-8")
    with pytest.raises(ValueError, match="its configuration asks for .*; expected at most 2,000"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match=r"--model .*its configuration asks for"):
        read_architecture(str(tmp_path), None, 2, "all-linear")


def test_other_large_numbers_are_no_layers() -> None:
    check_depth({"vocab_size": 10**6, "num_hidden_layers": 126, "max_position_embeddings": 10**7, "layer_norm_eps": 1})
