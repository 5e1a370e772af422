"""Who trains in `benchmarks/train.py`, each a process of its own."""
