"""The same job between machines, over NVIDIA FLARE: the only place that imports nvflare."""
