"""Programs to read and to run: the service at work on real data.

One BLAS thread is enough for arrays of this size and leaves the other core to the server. Said here,
because NumPy and gRPC read it once, when they are imported.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
