"""Runs: every method answers on one shared prefill, and each answer is recorded."""
