"""Outcome tables, metrics, baselines and reports."""
