"""Pretraining in PyTorch, and what its checkpoints hold."""

import os

# Read when torch is imported. Threads that spin while they wait take the cores from whatever else
# runs there, itself included: a hundred times slower on a machine that is shared. But a thread that
# sleeps at once must be woken for each operation; a short spin (GNU's OpenMP) saves a third.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
