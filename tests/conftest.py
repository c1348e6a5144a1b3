"""What all tests share: a thread each where several processes run them (pytest -n), since threads of two would get in each
other's way, and tests of small models gain nothing by theirs."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start
