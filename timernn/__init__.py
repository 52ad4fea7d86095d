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

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from timernn import optimizers as optimizers
    from timernn import types as types
    from timernn import v1 as v1
    from timernn._public import *  # noqa: F403
    from timernn._public import __all__ as __all__
    from timernn.errors import *  # noqa: F403  # here too: mypy does not follow one star to another
else:
    # The server imports the stubs in `timernn.v1`, and with them this module: that must not import the
    # client. So the first use of a name brings them all, as plain attributes from then on.
    from importlib import import_module as _import

    _SUBMODULES = ("aio", "errors", "optimizers", "types", "v1")

    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return _import(f"timernn.{name}")
        if not name.startswith("_") or name in ("__all__", "__version__"):
            public = _import("timernn._public")
            names = {each: getattr(public, each) for each in public.__all__}
            globals().update(names, __all__=public.__all__)
            if name in globals():
                return globals()[name]
        raise AttributeError(f"module 'timernn' has no attribute {name!r}", name=name)

    def __dir__() -> set[str]:
        return {*_import("timernn._public").__all__, *_SUBMODULES, *globals()}
