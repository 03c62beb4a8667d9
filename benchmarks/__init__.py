"""One module per workload, run as ``python -m benchmarks.<workload>`` from the repository's root."""
