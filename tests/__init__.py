import os

# For the tests and all that they start. Several processes share the cores, and a thread that waits keeps its core busy.
os.environ["OMP_NUM_THREADS"] = "1"
