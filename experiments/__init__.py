"""Presets, sweeps, and what the records of their runs say."""
