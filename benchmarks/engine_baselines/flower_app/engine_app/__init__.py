"""Rounds of Flower's FedAvg without training."""
