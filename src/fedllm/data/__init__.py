"""Data: read, map, template, mask, batch. Importing this package loads nothing heavy."""
