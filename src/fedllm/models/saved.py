"""Read back an adapter that was saved in PEFT's layout."""

from __future__ import annotations

from pathlib import Path

from fedllm.models.adapter import TunableModel
from fedllm.models.deliver import WEIGHTS
from fedllm.wire.payload import Tensors


def read_adapter(model: TunableModel, folder: Path) -> Tensors:
    """Return the tensors of a saved adapter by parameter name. The model holds them afterwards.

    Args:
        model: A model with an adapter of the same kind and sizes.
        folder: Where `save_adapter` wrote it.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model.model, load_file(folder / WEIGHTS))
    return model.read()
