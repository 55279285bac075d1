"""How messages travel between the halves of a scenario."""
