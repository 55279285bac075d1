"""Load a base model, attach a tuning method, read and write named parameters."""
