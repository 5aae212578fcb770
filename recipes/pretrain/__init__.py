"""Pretraining in PyTorch, and what its checkpoints hold."""

import os

# Read when torch is imported. Threads that spin while they wait take the cores from whatever else
# runs there, itself included: a hundred times slower on a machine that is shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
