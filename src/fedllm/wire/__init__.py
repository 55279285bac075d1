"""Payload <-> bytes, checks on receipt, and the byte ledger."""
