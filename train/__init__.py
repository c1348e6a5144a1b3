"""Training scripts, one thin script a method: python -m train.NAME --help."""

import os

# Before torch is imported: threads that wait by spinning slow a shared machine down thirtyfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
