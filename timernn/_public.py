"""The names that `timernn` offers. `timernn/__init__.py` imports this module when one is first used."""

from importlib.metadata import version as _version_of

from timernn import aio, errors
from timernn._core.retry import RetryPolicy
from timernn._core.tls import TLS
from timernn._sync import Client, Session, connect
from timernn.errors import *  # noqa: F403  # the tree's names, listed in errors.__all__
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

__all__ = [
    "SGD",
    "TLS",
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
]
__all__ += errors.__all__

__version__ = _version_of("timernn")
