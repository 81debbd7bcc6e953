"""Times one decode step of the same model on the same long prompt in several engines, side by side."""
