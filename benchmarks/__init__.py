"""Measurements as ratios, both sides on the same machine: `python -m benchmarks [part …] [--quick] [--save FILE]`."""
