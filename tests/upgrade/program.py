"""What a user's program does with a server, in parts, as digests of all that it gets.

    python program.py ADDRESS MODEL

runs a part for each line that it reads from stdin, and then prints a line of JSON: names, and digests of
values. Each part goes on with what the one before has left on the server, which may be replaced by another
release in between. The digests are the same with the library of every release, so this calls only what all
of those in `wheels/` have.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from typing import Any

import numpy as np

import timernn
import timernn.aio

N, T, D, H = 2, 5, 3, 4


class Program:
    """One client with its models and sessions.

    Attributes:
        seen: The digest of each thing that this part has got so far, by name.
    """

    def __init__(self, client: timernn.Client, address: str, model: str) -> None:
        self._client, self._address, self._model = client, address, model
        self._double = f"{model}-double"
        self._rng = np.random.default_rng(11)
        self._part = 0
        self.seen: dict[str, str] = {}

    def run_part(self) -> dict[str, str]:
        """Go on from where the last part stopped; return what was seen, by name."""
        self.seen = {}
        if not self._part:
            self._begin()
        self._part += 1
        self._finish_what_waits()
        self._train()
        self._move_weights()
        self._stream()
        asyncio.run(self._stream_with_asyncio())
        self._misuse()
        self._leave_something()
        return self.seen

    def _begin(self) -> None:
        client, model = self._client, self._model
        client.create_model(
            model, input_size=D, hidden_size=H, seed=7, optimizer=timernn.Adam(lr=0.01)
        )
        client.create_model(
            self._double, input_size=D, hidden_size=H, seed=8, dtype="float64",
            optimizer=timernn.Momentum(lr=0.01),
        )  # fmt: skip
        self._trainer = client.session(model, f"{model}-trainer", batch_size=N, train=True)
        self._streamer = client.session(model, f"{model}-streamer")
        self._others = [client.session(model, f"{model}-other-{n}", train=True) for n in range(3)]
        self._leave_something()

    def _leave_something(self) -> None:
        """Leave a contribution and a tape that wait, and a checkpoint."""
        self._client.create_checkpoint(self._model, f"part-{self._part}")
        self._see("forward", self._trainer.forward(self._draw(N)))
        self._see("backward", self._trainer.backward(self._draw(N, H)))
        self._see("forward, its tape waits", self._trainer.forward(self._draw(N)))

    def _finish_what_waits(self) -> None:
        """Take what the part before has left."""
        kinds = [(one.kind, one.chunk_seq) for one in self._trainer.waiting]
        self._see("waiting", kinds)
        self._see("backward of the tape", self._trainer.backward(self._draw(N, H)))
        self._trainer.update(reduction="mean")
        self._see_step("update of both", self._trainer)
        kept = f"part-{self._part - 1}"
        self._see("restored", str(self._client.restore_checkpoint(self._model, kept)))

    def _train(self) -> None:
        """Steps apart from Backward and within it, of either dtype."""
        session = self._trainer
        session.forward(self._draw(N))
        self._see("gradients", session.backward(self._draw(N, H), return_gradients=True))
        self._see("their norm", session.gradient_norm)
        session.update(clip_norm=0.5)
        self._see_step("step", session)
        session.forward(self._draw(N))
        session.backward(self._draw(N, H), update=timernn.Step(lr=0.02))
        self._see_step("step within backward", session)
        double = self._client.session(
            self._double, f"{self._model}-float64", batch_size=N, train=True
        )
        self._see("float64", double.forward(self._draw(N).astype("f8")))
        double.backward(self._draw(N, H).astype("f8"))
        double.update()
        self._see_step("float64 step", double)

    def _move_weights(self) -> None:
        """Read weights, and upload others."""
        weights = self._client.get_weights(self._model)
        for name in ("Wx", "Wh", "b"):
            self._see(name, getattr(weights, name))
        self._see("without a session", self._client.forward(self._model, self._draw(1)))
        weights = self._client.get_weights(self._double)
        put = self._client.put_weights(
            self._double, Wx=weights.Wx * 0.5, Wh=weights.Wh, b=weights.b
        )
        self._see("uploaded", str(put))

    def _stream(self) -> None:
        """Stream one session, send frames of many, fork, set and read states."""
        self._see("stream", *self._streamer.stream([self._draw(1) for _ in range(8)]))
        for _ in range(3):
            frame = [(session, self._draw(1)) for session in self._others]
            # A chunk that leaves a tape is computed apart from others, and its bits repeat.
            self._see("frame", *self._client.frame(frame, train=True))
        for session in self._others:
            self._see("discarded", session.discard_gradients().tape_count)
        with self._streamer.fork(f"{self._model}-twin") as twin:
            self._see("fork", twin.forward(self._draw(1)))
            self._see("closed", twin.close())
        self._others[0].set_state(self._draw(1, H)[:, 0])
        self._others[1].reset_state()
        for session in (self._streamer, *self._others):
            self._see("state", session.state)
            self._see("position", session.chunk_seq)

    async def _stream_with_asyncio(self) -> None:
        """The asyncio frontend, by a client that opens the session again."""
        async with timernn.aio.connect(self._address) as client:
            session = await client.session(self._model, f"{self._model}-asyncio")
            self._see("resumed", session.resumed)
            chunks = [self._draw(1) for _ in range(4)]
            self._see("asyncio", *[hs async for hs in session.stream(chunks)])

    def _misuse(self) -> None:
        """Refusals are the same classes."""
        nan = np.full((1, 1, D), np.nan, "f4")
        for refused in (
            lambda: self._client.get_model("none"),
            lambda: self._client.create_model(self._model, input_size=D, hidden_size=H + 1),
            lambda: self._streamer.forward(nan),
            lambda: self._client.session(self._model, "none", must_exist=True),
            lambda: self._client.session(self._model, self._streamer.session_id, on_exists="fail"),
        ):
            try:
                refused()
            except timernn.Error as error:
                self._see("refused", [type(error).__name__, error.reason])

    def _draw(self, rows: int, width: int = D) -> Any:
        return self._rng.standard_normal((rows, T, width)).astype("f4")

    def _see_step(self, name: str, session: timernn.Session) -> None:
        step = session.last_update
        assert step is not None
        self._see(
            name, str(step.version), step.gradient_norm, step.clipped, step.contribution_count
        )

    def _see(self, name: str, *values: Any) -> None:
        """Note something; what bears the same name is noted in order."""
        said = hashlib.sha256(self.seen.get(name, "").encode())
        for value in values:
            is_array = isinstance(value, np.ndarray)
            said.update(value.tobytes() if is_array else repr(value).encode())
        self.seen[name] = said.hexdigest()[:16]


def main() -> None:
    """Run a part for each line of stdin."""
    address, model = sys.argv[1:]
    with timernn.connect(address) as client:
        program = Program(client, address, model)
        for _ in sys.stdin:
            print(json.dumps(program.run_part()), flush=True)


if __name__ == "__main__":
    main()
