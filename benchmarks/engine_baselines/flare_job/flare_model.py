"""The model whose parameters are the payload."""

import torch


class Payload(torch.nn.Module):
    """So many tensors of random values."""

    def __init__(self, tensors: int, values: int) -> None:
        super().__init__()
        # FLARE reads the arguments back from attributes of the same names.
        self.tensors = tensors
        self.values = values
        draw = torch.Generator().manual_seed(0)
        drawn = {f"tensor_{number:03d}": torch.randn(values, generator=draw) for number in range(tensors)}
        self.payload = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in drawn.items()})
