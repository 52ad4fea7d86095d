"""`timernn checkpoints`: keep versions of a model under names, and bring them back."""

# No postponed annotations here: Typer reads them when a command is made.
from typing import Annotated, Any

import typer

from service.cli.describe import format_time, version_json
from service.cli.options import number_option
from service.cli.output import print_json, print_table
from service.cli.remote import AsJson, Connection, ExpectVersion, MissingOk, ModelId, connects

app = typer.Typer(
    help="Keep versions of a model under names, and bring them back.", no_args_is_help=True
)

CheckpointId = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", show_default=False, help="The checkpoint's name.")
]


@app.command()
@connects()
def create(
    model: ModelId,
    checkpoint: CheckpointId,
    *,
    version: Annotated[
        int | None,
        typer.Option(
            **number_option(int, 1),
            envvar="TIMERNN_VERSION_NUMBER",
            help="A version, without the optimizer's state; the newest with it if not given.",
        ),
    ] = None,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Keep a version of a model under a name, with the optimizer's state if it is the newest.

    Example:
      timernn checkpoints create weather before-tuning
    """
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    named = None if version is None else timernn.Version(version)
    with connection.open() as client:
        made = client.create_checkpoint(model, checkpoint, version=named)
    if json:
        print_json(_json(made))
    else:
        print(f"{made.checkpoint_id} keeps version {made.version.number} of {model}")


@app.command("list")
@connects(for_operators=True)
def list_checkpoints(
    model: ModelId,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """List a model's checkpoints by name.

    Example:
      timernn checkpoints list weather
    """
    with connection.open() as client:
        found = client.list_checkpoints(model)
    if json:
        print_json([_json(each) for each in found])
    else:
        rows = [
            (each.checkpoint_id, each.version.number, format_time(each.create_time))
            for each in found
        ]
        print_table(("checkpoint", "version", "created"), rows)


@app.command()
@connects(timeout=300.0)
def restore(
    model: ModelId,
    checkpoint: CheckpointId,
    *,
    expect_version: ExpectVersion = None,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Make a checkpoint's weights and optimizer state the model's next version.

    Example:
      timernn checkpoints restore weather before-tuning
    """
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    named = None if expect_version is None else timernn.Version(expect_version)
    with connection.open() as client:
        made = client.restore_checkpoint(model, checkpoint, expected_version=named)
    if json:
        print_json({"model_id": model, "version": version_json(made)})
    else:
        print(f"{model} has weights version {made.number} now")


@app.command()
@connects()
def delete(
    model: ModelId,
    checkpoint: CheckpointId,
    *,
    missing_ok: MissingOk = False,
    connection: Connection,
) -> None:
    """Delete a checkpoint; its version then goes like any superseded one.

    Example:
      timernn checkpoints delete weather before-tuning
    """
    with connection.open() as client:
        deleted = client.delete_checkpoint(model, checkpoint, missing_ok=missing_ok)
    print(f"deleted {checkpoint}" if deleted else f"there was no {checkpoint}")


def _json(found: Any) -> dict[str, Any]:
    return {
        "checkpoint_id": found.checkpoint_id,
        "version": version_json(found.version),
        "create_time": found.create_time.isoformat(),
    }
