"""The run folder: journal, checkpoints, metrics, report."""
