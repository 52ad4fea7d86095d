"""`timernn backup` and `timernn restore`: the models of a tenant in a file, and back, over the API."""

# No postponed annotations here: Typer reads them when a command is made.
import io
from dataclasses import dataclass, field
from datetime import UTC, datetime
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.options import parse_file, parse_path
from service.cli.output import counted, fail, print_json, warn
from service.cli.remote import AsJson, Connection, Force, check_target, connects

if TYPE_CHECKING:
    import zipfile

    import timernn
    from service.cli.backup_file import Manifest, SavedModel, SavedSession, SavedVersion

_NEVER_SAVED = (
    "superseded versions without a checkpoint, tapes, the ids of requests, times of creation;"
    " versions are numbered anew when they are restored"
)


@dataclass
class Left:
    """What a backup leaves out, or a restore leaves as it was; one line each."""

    lines: list[str] = field(default_factory=list)


@connects(timeout=300.0)
def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=parse_path, help="Where to.")],
    *,
    sessions: Annotated[
        bool,
        typer.Option("--sessions", envvar="TIMERNN_SESSIONS", help="With live sessions' states."),
    ] = False,
    force: Force = False,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Save a tenant's models in a file: weights, optimizer state and checkpoints of each.

    The server goes on meanwhile: each model is saved whole, one after another. What is not saved is
    printed. A token needs the role `train`.

    Examples:
      timernn backup timernn.backup
      timernn backup timernn.backup --sessions --force
    """
    from service.cli.backup_file import write_backup, write_manifest  # noqa: PLC0415

    check_target(file, force=force)
    left = Left()
    with connection.open() as client, write_backup(file) as archive:
        manifest = _save(client, archive, left, with_sessions=sessions)
        write_manifest(archive, manifest)
    if not sessions:
        left.lines.append("sessions: --sessions saves them")
    left.lines.append(_NEVER_SAVED)
    size = file.stat().st_size
    saved = _counts(manifest.models, len(manifest.sessions))
    if json:
        print_json({"file": str(file), "bytes": size, **saved, "not_saved": left.lines})
        return
    shown = ", ".join(counted(count, what) for what, count in saved.items())
    print(f"wrote {shown} to {file}, {size:,} bytes")
    for line in left.lines:
        print(f"not saved: {line}")


@connects(timeout=300.0)
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=parse_file, help="Where from.")],
    *,
    sessions: Annotated[
        bool,
        typer.Option(
            "--sessions", envvar="TIMERNN_SESSIONS", help="Sessions too, each in a new epoch."
        ),
    ] = False,
    reset_sessions: Annotated[
        bool,
        typer.Option(
            "--reset-sessions",
            envvar="TIMERNN_RESET_SESSIONS",
            help="With --sessions: also those that are live, which then stand where they were saved.",
        ),
    ] = False,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Make the models of a backup again, with checkpoints and optimizer state.

    The whole file is checked first. A model that is there with the same content is left as it is; if one
    of the same name has another content, nothing is restored. A restored session begins a new epoch:
    programs that wrote to it are refused with EPOCH_FENCED. A token needs the role `admin`.

    Examples:
      timernn restore timernn.backup
      timernn restore timernn.backup --sessions
    """
    from service.cli.backup_file import read_backup  # noqa: PLC0415

    left = Left()
    with connection.open() as client, read_backup(file) as (archive, manifest):
        wanted = _wanted(client, manifest, left)
        _restore(client, archive, wanted, manifest)
        restored_sessions = 0
        if sessions:
            restored_sessions = _restore_sessions(
                client, archive, manifest, left, is_reset=reset_sessions
            )
    if manifest.sessions and not sessions:
        left.lines.append(
            f"{counted(len(manifest.sessions), 'sessions')}: --sessions restores them"
        )
    if json:
        print_json({"models": [m.model_id for m in wanted], "not_restored": left.lines})
    else:
        done = _counts(wanted, restored_sessions)
        saved = _counts(manifest.models, len(manifest.sessions))
        shown = ", ".join(
            f"{done[what]} of {counted(count, what)}" for what, count in saved.items()
        )
        print(f"restored {shown}, saved {manifest.create_time}")
        for line in left.lines:
            warn(f"not restored: {line}")


def _save(
    client: "timernn.Client", archive: "zipfile.ZipFile", left: Left, *, with_sessions: bool
) -> "Manifest":
    from service.cli.backup_file import Manifest  # noqa: PLC0415
    from service.cli.progress import bar  # noqa: PLC0415

    models = list(client.list_models())
    found = list(client.list_sessions()) if with_sessions else []
    saved, states = [], []
    with bar("models", len(models) + len(found)) as step:
        for index, model in enumerate(models):
            step(model.model_id)
            if (one := _save_model(client, archive, model, index, left)) is not None:
                saved.append(one)
        kept = {model.model_id for model in saved}
        for index, session in enumerate(each for each in found if each.model_id in kept):
            step(session.session_id)
            if (state := _save_session(client, archive, session, index, left)) is not None:
                states.append(state)
    return Manifest(
        create_time=datetime.now(UTC).isoformat(timespec="seconds"),
        server_version=client.server_info().server_version,
        models=saved,
        sessions=states,
    )


def _save_model(
    client: "timernn.Client",
    archive: "zipfile.ZipFile",
    model: "timernn.ModelInfo",
    index: int,
    left: Left,
) -> "SavedModel | None":
    """Save a model: the versions of its checkpoints, then its newest; None if it was deleted meanwhile."""
    import timernn  # noqa: PLC0415
    from service.cli.backup_file import SavedModel  # noqa: PLC0415

    model_id = model.model_id
    try:
        names: dict[timernn.Version, list[str]] = {}
        for checkpoint in client.list_checkpoints(model_id):
            names.setdefault(checkpoint.version, []).append(checkpoint.checkpoint_id)
        # The newest first: while it is fetched it cannot be superseded by less than a step.
        head = _save_version(client, archive, f"models/{index}", model_id, None, names)
        versions = [
            _save_version(client, archive, f"models/{index}", model_id, version, names)
            for version in sorted(names)
            if version.number != head.number
        ]
    except timernn.errors.ModelNotFound:
        left.lines.append(f"{model_id}: deleted meanwhile")
        return None
    if model.waiting_contribution_count:
        waiting = counted(model.waiting_contribution_count, "waiting gradients")
        left.lines.append(f"{model_id}: {waiting}")
    for version in versions:
        if not version.has_moments:
            text = f"{', '.join(version.checkpoints)} of {model_id}: the optimizer's state, which the server does not keep of it"
            left.lines.append(text)
    return SavedModel(
        model_id=model_id,
        input_size=model.input_size,
        hidden_size=model.hidden_size,
        dtype=model.dtype,
        optimizer={"kind": model.optimizer.KIND, **model.optimizer.given()},
        versions=sorted([*versions, head], key=lambda each: each.number),
    )


def _save_version(
    client: "timernn.Client",
    archive: "zipfile.ZipFile",
    folder: str,
    model_id: str,
    version: "timernn.Version | None",
    names: "dict[timernn.Version, list[str]]",
) -> "SavedVersion":
    from service.cli.backup_file import SavedVersion, write_entry  # noqa: PLC0415

    data = io.BytesIO()
    got = client.export_weights(model_id, data, version=version, include_moments=True)
    entry = f"{folder}/{got.number}.safetensors"
    write_entry(archive, entry, data.getbuffer())
    return SavedVersion(
        entry=entry,
        number=got.number,
        digest=got.digest.hex(),
        has_moments=_has_moments(data.getvalue()),
        checkpoints=names.get(got, []),
        is_head=version is None,
    )


def _has_moments(data: bytes) -> bool:
    """Return whether a safetensors file has the optimizer's step, which stands beside its state."""
    size = int.from_bytes(data[:8], "little")
    return "step" in loads(data[8 : 8 + size]).get("__metadata__", {})


def _save_session(
    client: "timernn.Client",
    archive: "zipfile.ZipFile",
    session: "timernn.SessionInfo",
    index: int,
    left: Left,
) -> "SavedSession | None":
    """Save where a session stands; None if it has ended meanwhile."""
    import safetensors.numpy  # noqa: PLC0415

    import timernn  # noqa: PLC0415
    from service.cli.backup_file import SavedSession, write_entry  # noqa: PLC0415

    try:
        now, state = client.get_state(session.session_id)
    except timernn.errors.NotFound:
        left.lines.append(f"session {session.session_id}: it has ended meanwhile")
        return None
    entry = f"sessions/{index}.safetensors"
    write_entry(archive, entry, safetensors.numpy.save({"state": state}))
    return SavedSession(
        entry=entry,
        session_id=now.session_id,
        model_id=now.model_id,
        batch_size=now.batch_size,
        ttl_s=now.ttl.total_seconds(),
        epoch=now.epoch,
        chunk_seq=now.chunk_seq,
    )


def _wanted(client: "timernn.Client", manifest: "Manifest", left: Left) -> "list[SavedModel]":
    """Return the models that are not there; refuse all if one is there with another content."""
    wanted, taken = [], []
    there = {model.model_id: model for model in client.list_models()}
    for model in manifest.models:
        found = there.get(model.model_id)
        if found is None:
            wanted.append(model)
        elif found.head.digest.hex() == _head(model).digest:
            left.lines.append(
                f"{model.model_id}: it is there with the same weights; its checkpoints are left as they are"
            )
        else:
            taken.append(model.model_id)
    if taken:
        fail(
            f"nothing was restored: there with other weights: {', '.join(taken)};"
            " delete them, or restore into another server or tenant"
        )
        raise typer.Exit(1)
    return wanted


def _restore(
    client: "timernn.Client",
    archive: "zipfile.ZipFile",
    wanted: "list[SavedModel]",
    manifest: "Manifest",
) -> None:
    from service.cli.progress import bar  # noqa: PLC0415

    with bar("models", len(manifest.models)) as step:
        for model in wanted:
            step(model.model_id)
            _restore_model(client, archive, model)


def _restore_model(
    client: "timernn.Client", archive: "zipfile.ZipFile", model: "SavedModel"
) -> None:
    """Make a model from its oldest saved version, and the others on it, the newest last."""
    kind = dict(model.optimizer)
    first, *later = sorted(model.versions, key=lambda each: (each.is_head, each.number))
    made = client.import_model(
        model.model_id,
        io.BytesIO(archive.read(first.entry)),
        input_size=model.input_size,
        hidden_size=model.hidden_size,
        dtype=model.dtype,  # type: ignore[arg-type]  # the library checks it
        optimizer=_optimizer(kind),
    )
    _keep(client, model, first, made.head)
    for version in later:
        _keep(
            client,
            model,
            version,
            client.import_weights(model.model_id, io.BytesIO(archive.read(version.entry))),
        )


def _keep(
    client: "timernn.Client", model: "SavedModel", saved: "SavedVersion", made: "timernn.Version"
) -> None:
    """Check that a version has the content that was saved, and give it its names."""
    if saved.has_moments and made.digest.hex() != saved.digest:
        text = f"{model.model_id}: version {saved.number} came out with another content"
        fail(f"{text}; the model is not complete: delete it")
        raise typer.Exit(1)
    for name in saved.checkpoints:
        client.create_checkpoint(model.model_id, name, version=made)


def _restore_sessions(
    client: "timernn.Client",
    archive: "zipfile.ZipFile",
    manifest: "Manifest",
    left: Left,
    *,
    is_reset: bool,
) -> int:
    """Open the saved sessions in new epochs; return how many were."""
    import safetensors.numpy  # noqa: PLC0415

    import timernn  # noqa: PLC0415
    from service.cli.progress import bar  # noqa: PLC0415

    restored = 0
    with bar("sessions", len(manifest.sessions)) as step:
        for session in manifest.sessions:
            step(session.session_id)
            try:
                client.session(
                    session.model_id,
                    session.session_id,
                    batch_size=session.batch_size,
                    initial_state=safetensors.numpy.load(archive.read(session.entry))["state"],
                    ttl=session.ttl_s,
                    on_exists="reset" if is_reset else "fail",
                )
            except timernn.errors.SessionExists:
                left.lines.append(
                    f"session {session.session_id}: it is live; --reset-sessions resets it"
                )
            except (
                timernn.errors.FailedPrecondition,
                timernn.errors.InvalidArgument,
                timernn.errors.NotFound,
            ) as error:
                # Its model is another one there, or was already another one where it was saved.
                left.lines.append(f"session {session.session_id}: {error.message}")
            else:
                restored += 1
    return restored


def _optimizer(saved: dict[str, Any]) -> "timernn.Optimizer":
    from timernn.optimizers import KINDS  # noqa: PLC0415

    kind = saved.pop("kind", "")
    if kind not in KINDS:
        raise typer.BadParameter(f"an optimizer that this timernn does not know: {kind!r}")
    return KINDS[kind](**saved)


def _head(model: "SavedModel") -> "SavedVersion":
    return next(version for version in model.versions if version.is_head)


def _counts(models: "list[SavedModel]", sessions: int) -> dict[str, int]:
    versions = [version for model in models for version in model.versions]
    return {
        "models": len(models),
        "checkpoints": sum(len(each.checkpoints) for each in versions),
        "sessions": sessions,
    }
