"""Models, sessions and servers as rows of a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import timernn

MODEL_HEADINGS = ("model", "D", "H", "dtype", "optimizer", "version", "waiting", "created")
SESSION_HEADINGS = ("session", "model", "N", "epoch", "chunks", "version", "expires in")


def model_row(model: timernn.ModelInfo) -> tuple[object, ...]:
    """Return a model's line for `MODEL_HEADINGS`."""
    return (
        model.model_id,
        model.input_size,
        model.hidden_size,
        model.dtype,
        model.optimizer.KIND,
        model.head.number,
        model.waiting_contribution_count,
        format_time(model.create_time),
    )


def model_fields(model: timernn.ModelInfo) -> dict[str, object]:
    """Return all that is known of a model, named for people."""
    return {
        "model": model.model_id,
        "input size (D)": model.input_size,
        "hidden size (H)": model.hidden_size,
        "dtype": model.dtype,
        "optimizer": format_optimizer(model.optimizer),
        "weights version": f"{model.head.number} ({model.head.digest.hex()})",
        "waiting gradients": f"{model.waiting_contribution_count}"
        f" ({model.waiting_contribution_bytes:,} bytes)",
        "created": format_time(model.create_time),
        "incarnation": model.incarnation,
    }


def model_json(model: timernn.ModelInfo) -> dict[str, Any]:
    """Return all that is known of a model, for programs."""
    return {
        "model_id": model.model_id,
        "input_size": model.input_size,
        "hidden_size": model.hidden_size,
        "dtype": model.dtype,
        "optimizer": {"kind": model.optimizer.KIND, **_set_values(model.optimizer)},
        "head": version_json(model.head),
        "waiting_contribution_count": model.waiting_contribution_count,
        "waiting_contribution_bytes": model.waiting_contribution_bytes,
        "create_time": model.create_time.isoformat(),
        "incarnation": model.incarnation,
    }


def session_row(session: timernn.SessionInfo) -> tuple[object, ...]:
    """Return a session's line for `SESSION_HEADINGS`."""
    return (
        session.session_id,
        session.model_id,
        session.batch_size,
        session.epoch,
        session.chunk_seq,
        session.version.number if session.version else "-",
        format_span(session.expire_time - datetime.now(UTC)),
    )


def session_fields(session: timernn.SessionInfo) -> dict[str, object]:
    """Return all that is known of a session, named for people."""
    version = session.version
    return {
        "session": session.session_id,
        "model": session.model_id,
        "rows (N)": session.batch_size,
        "epoch": session.epoch,
        "chunks applied": session.chunk_seq,
        "weights version": f"{version.number} ({version.digest.hex()})" if version else "-",
        "state token": session.state_token.hex() or "-",
        "time to live": format_span(session.ttl),
        "expires": f"{format_time(session.expire_time)}, in"
        f" {format_span(session.expire_time - datetime.now(UTC))}",
    }


def session_json(session: timernn.SessionInfo) -> dict[str, Any]:
    """Return all that is known of a session, for programs."""
    return {
        "session_id": session.session_id,
        "model_id": session.model_id,
        "batch_size": session.batch_size,
        "epoch": session.epoch,
        "chunk_seq": session.chunk_seq,
        "weights_version": version_json(session.version) if session.version else None,
        "state_token": session.state_token.hex(),
        "ttl_s": session.ttl.total_seconds(),
        "expire_time": session.expire_time.isoformat(),
    }


def server_json(info: timernn.ServerInfo, ping: timernn.Ping) -> dict[str, Any]:
    """Return what a server reports about itself, for programs; durations in seconds."""
    limits = {
        name: value.total_seconds() if isinstance(value, timedelta) else value
        for name, value in info.limits.items()
    }
    return {
        **ping_json(ping),
        "server_version": info.server_version,
        "replica_id": info.replica_id,
        "start_time": info.start_time.isoformat(),
        "durability": info.durability,
        "limits": limits,
    }


def ping_json(ping: timernn.Ping) -> dict[str, Any]:
    """Return what a server answers to everybody, for programs."""
    return {
        "serving": ping.serving,
        "address": ping.address,
        "latency_ms": round(ping.latency_s * 1000, 3),
    }


def version_json(version: timernn.Version) -> dict[str, Any]:
    """Return a weights version, its digest in hexadecimal."""
    return {"number": version.number, "digest": version.digest.hex()}


def format_time(moment: datetime) -> str:
    """Format a time in UTC to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def format_span(span: timedelta) -> str:
    """Format a duration with its two largest units, such as 59m 58s."""
    seconds = max(0, round(span.total_seconds()))
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def format_optimizer(optimizer: timernn.Optimizer) -> str:
    """Format an optimizer with its hyperparameters, such as adam (lr 0.001, beta1 0.9)."""
    values = ", ".join(f"{name} {value:g}" for name, value in _set_values(optimizer).items())
    return f"{optimizer.KIND} ({values})" if values else optimizer.KIND


def _set_values(optimizer: timernn.Optimizer) -> dict[str, float]:
    return {name: value for name, value in asdict(optimizer).items() if value is not None}
