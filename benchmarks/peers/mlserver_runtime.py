"""The same job as a custom runtime of MLServer, in process, over gRPC, with its fastest codec.

It runs in its own virtual environment (see mlserver_setup.py) and imports nothing of this project, so
that it can be started by path: ``python mlserver_runtime.py --redis-url URL --weights FILE.npz``.
MLServer turns numeric tensors into lists of Python numbers; the datatype BYTES with one element is
the way past that, both for the input and for the output. Metrics and access logs are off.
"""

import argparse
import asyncio
import socket
from pathlib import Path

import numpy as np
import redis.asyncio
import torch
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput, TensorData
from mlserver.utils import install_uvloop_event_loop

SESSION_TTL_S = 3600
MODEL_NAME = "timernn"


def load_network(weights: Path) -> torch.nn.RNN:
    """Build torch's network from saved weights.

    Args:
        weights: An npz file with Wx (D, H), Wh (H, H) and b (H,), float32.

    Returns:
        The network, batch first, in evaluation mode.
    """
    saved = np.load(weights)
    network = torch.nn.RNN(*saved["Wx"].shape, batch_first=True)
    with torch.no_grad():
        network.weight_ih_l0.copy_(torch.from_numpy(saved["Wx"].T.copy()))
        network.weight_hh_l0.copy_(torch.from_numpy(saved["Wh"].T.copy()))
        network.bias_ih_l0.copy_(torch.from_numpy(saved["b"]))
        network.bias_hh_l0.zero_()
    return network.eval()


class RecurrentRuntime(MLModel):
    """Run chunks, with h in Redis between them; the request's id is the session's."""

    async def load(self) -> bool:
        """Load the weights and connect to Redis."""
        torch.set_num_threads(1)
        extra = self.settings.parameters.extra
        self._network = load_network(Path(self.settings.parameters.uri))
        self._store = redis.asyncio.Redis.from_url(extra["redis_url"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Run one chunk."""
        key = "mlserver:" + payload.id
        saved = await self._store.get(key)
        hs, h = self._run(payload.inputs[0].data.root[0], saved)
        await self._store.set(key, h, ex=SESSION_TTL_S)
        output = ResponseOutput.model_construct(
            name="hs",
            shape=[len(hs)],
            datatype="BYTES",
            data=TensorData.model_construct(root=[hs]),
            parameters=None,
        )
        return InferenceResponse.model_construct(
            model_name=self.name, id=payload.id, outputs=[output], parameters=None
        )

    @torch.inference_mode()
    def _run(self, data: bytes, saved: bytes | None) -> tuple[bytes, bytes]:
        xs = torch.frombuffer(bytearray(data), dtype=torch.float32)
        xs = xs.view(1, -1, self._network.input_size)
        h0 = None
        if saved is not None:
            h0 = torch.frombuffer(bytearray(saved), dtype=torch.float32).view(1, 1, -1)
        hs, h = self._network(xs, h0)
        return hs.numpy().tobytes(), h.numpy().tobytes()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _announce(server: MLServer, port: int) -> None:
    loaded = False
    while not loaded:
        # MLServer has no event for "ready"; its own clients poll as well.
        await asyncio.sleep(0.05)
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            continue
        writer.close()
        models = await server._model_registry.get_models()  # noqa: SLF001
        loaded = bool(models) and all(model.ready for model in models)
    print(f"mlserver ready on 127.0.0.1:{port}", flush=True)


async def _run(options: argparse.Namespace) -> None:
    port = _free_port()
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=_free_port(),
        grpc_port=port,
        metrics_endpoint=None,
        parallel_workers=0,
        load_models_at_startup=False,
        grpc_max_message_length=16 << 20,
    )
    model = ModelSettings(
        name=MODEL_NAME,
        implementation=RecurrentRuntime,
        parameters=ModelParameters(
            uri=str(options.weights), extra={"redis_url": options.redis_url}
        ),
    )
    server = MLServer(settings)
    announcement = asyncio.create_task(_announce(server, port))
    await server.start([model])
    await announcement


def main() -> None:
    """Serve until SIGTERM, which MLServer handles itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    options = parser.parse_args()
    install_uvloop_event_loop()
    asyncio.run(_run(options))


if __name__ == "__main__":
    main()
