"""Results that are kept, what draws them, and programs of other packages: `python -m benchmarks.programs`."""
