"""Whose a model is: secret marks in it, commitments to them, and how a claim is verified."""
