"""What `bench_kernels.py` compares, how it measures, and what it writes."""
