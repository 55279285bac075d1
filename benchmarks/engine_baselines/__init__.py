"""What benchmarks/engine.py compares fedllm with: NVIDIA FLARE's own FedAvg recipe, a bare FLARE call, and Flower."""
