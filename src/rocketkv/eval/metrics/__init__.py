"""The scores of answers, as the benchmarks define them."""
