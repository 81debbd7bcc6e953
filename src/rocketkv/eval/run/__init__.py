"""Runs of methods on a suite: every method answers on one shared prefill, and each answer is recorded."""
