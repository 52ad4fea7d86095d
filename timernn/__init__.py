"""Stream and train a recurrent network whose state a timernn server holds.

    import timernn

    with timernn.connect("localhost:50051") as client:
        client.create_model("weather", input_size=8, hidden_size=64, optimizer=timernn.Adam(lr=1e-3))
        with client.session("weather", session_id="device-7") as session:
            hs = session.forward(xs)                      # (N, T, 8) -> (N, T, 64)
            for hs in session.stream(chunks):             # pipelined
                ...
        with client.session("weather", batch_size=32, train=True) as session:
            loss, dhs = head(session.forward(xs))         # the loss is the caller's
            dxs = session.backward(dhs)
            version = session.update(clip_norm=5.0)

`timernn.aio` has the same names for asyncio. Errors are in `timernn.errors` and here by name.
"""

from importlib.metadata import version as _version_of

from timernn import aio, errors
from timernn._core.retry import RetryPolicy
from timernn._sync import Client, Session, connect
from timernn.errors import *  # noqa: F403  # the tree's names, listed in errors.__all__
from timernn.errors import __all__ as _error_names
from timernn.optimizers import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Momentum,
    Nesterov,
    Optimizer,
    RMSprop,
)
from timernn.types import (
    CheckpointInfo,
    Contributions,
    Discarded,
    Gradients,
    ModelInfo,
    Ping,
    ServerInfo,
    SessionInfo,
    Step,
    UpdateResult,
    Version,
    Waiting,
    Weights,
)

__all__ = [  # noqa: PLE0604  # the names are strings: the tree's own list
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "CheckpointInfo",
    "Client",
    "Contributions",
    "Discarded",
    "Gradients",
    "ModelInfo",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "Ping",
    "RMSprop",
    "RetryPolicy",
    "ServerInfo",
    "Session",
    "SessionInfo",
    "Step",
    "UpdateResult",
    "Version",
    "Waiting",
    "Weights",
    "__version__",
    "aio",
    "connect",
    "errors",
    *_error_names,
]

__version__ = _version_of("timernn")
