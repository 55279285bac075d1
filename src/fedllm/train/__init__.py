"""Local training at a party."""
