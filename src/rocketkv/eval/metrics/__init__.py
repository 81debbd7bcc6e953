"""Scores of answers, as the benchmarks define them."""
