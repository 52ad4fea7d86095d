"""A token is revoked between two attempts of a call: what the first has done is not denied."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import timernn
from secured import Secured, secured_process, write_files
from service.security.tokens import revoke_tokens

if TYPE_CHECKING:
    from pathlib import Path

XS = np.ones((1, 2, 3), np.float32)


@pytest.mark.parametrize("way", ["forward", "stream", "frame"])
def test_a_revocation_between_two_attempts_leaves_the_call_in_doubt(
    store_url: str, tmp_path: Path, way: str
) -> None:
    """The first was carried out and its answer lost: a refused second one does not deny it."""
    authority, known = write_files(tmp_path)
    dies = ("--testing", "--failpoints", "after_commit=exit@1")
    with ExitStack() as stack:
        process = stack.enter_context(secured_process(store_url, tmp_path, *dies))
        process.command = process.command[: -len(dies)]  # once
        tokens = [known]
        options: Any = {"tls": timernn.TLS(ca=authority.cert_pem.bytes())}
        client = timernn.connect(process.address, token=lambda: tokens[-1], **options)
        stack.enter_context(client)
        model_id = f"{way}-{process.port}"
        client.create_model(model_id, input_size=3, hidden_size=2)
        session = client.session(model_id)

        def call() -> object:
            if way == "forward":
                return session.forward(XS)
            if way == "stream":
                return next(session.stream([XS]))
            (outcome,) = client.frame([(session, XS)])
            if isinstance(outcome, timernn.Error):
                raise outcome
            return outcome

        def revoke_and_restart() -> None:
            process.wait()
            revoke_tokens(tmp_path / "tokens.toml", name="known")
            process.start()

        restarting = threading.Thread(target=revoke_and_restart)
        restarting.start()
        with pytest.raises(timernn.BadCredentials) as caught:
            call()
        restarting.join()
        assert caught.value.is_outcome_unknown
        assert session.in_doubt
        secured = Secured(process, tmp_path, authority)
        tokens.append(secured.issue()[1])
        assert isinstance(call(), np.ndarray)
        assert (session.chunk_seq, session.in_doubt) == (1, False)
        assert session.get_info().chunk_seq == 1
