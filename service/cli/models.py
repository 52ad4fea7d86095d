"""`timernn models`: create, show and delete models, export and import their weights."""

# No postponed annotations here: Typer reads them when a command is made.
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli.describe import (
    MODEL_HEADINGS,
    model_fields,
    model_json,
    model_row,
    version_json,
)
from service.cli.options import choice_option, number_option, parse_file, parse_path
from service.cli.output import print_fields, print_json, print_table
from service.cli.remote import (
    AsJson,
    Connection,
    ExpectVersion,
    Force,
    MissingOk,
    ModelId,
    check_target,
    connects,
)

if TYPE_CHECKING:
    import timernn

app = typer.Typer(
    help="Create, show and delete models, export and import their weights.", no_args_is_help=True
)


class DType(StrEnum):
    """Element types of weights, states and chunks."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


class OptimizerName(StrEnum):
    """The optimizers; each is a class of the client library."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    NESTEROV = "nesterov"
    ADAGRAD = "adagrad"
    RMSPROP = "rmsprop"
    ADAM = "adam"
    ADAMW = "adamw"


@app.command()
@connects()
def create(
    model: ModelId,
    *,
    input_size: Annotated[
        int,
        typer.Option(
            **number_option(int, 1), envvar="TIMERNN_INPUT_SIZE", help="D, the inputs a time step."
        ),
    ],
    hidden_size: Annotated[
        int,
        typer.Option(
            **number_option(int, 1), envvar="TIMERNN_HIDDEN_SIZE", help="H, the hidden units."
        ),
    ],
    dtype: Annotated[
        DType,
        typer.Option(
            **choice_option(DType),
            envvar="TIMERNN_DTYPE",
            help="Type of weights, states and inputs.",
        ),
    ] = DType.FLOAT32,
    seed: Annotated[
        int,
        typer.Option(
            **number_option(int, 0),
            envvar="TIMERNN_SEED",
            help="Seed that the first weights are drawn from.",
        ),
    ] = 0,
    optimizer: Annotated[
        OptimizerName,
        typer.Option(
            **choice_option(OptimizerName),
            envvar="TIMERNN_OPTIMIZER",
            help="What an update applies.",
        ),
    ] = OptimizerName.SGD,
    lr: Annotated[
        float | None,
        typer.Option(
            **number_option(float, 0),
            envvar="TIMERNN_LR",
            help="Learning rate; the optimizer's own if not given.",
        ),
    ] = None,
    hyperparameter: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            envvar="TIMERNN_SET",
            metavar="NAME=VALUE",
            help="Another hyperparameter of the optimizer; may be given again.",
        ),
    ] = None,
    exist_ok: Annotated[
        bool,
        typer.Option(
            "--exist-ok",
            envvar="TIMERNN_EXIST_OK",
            help="Succeed also when there is one of the same sizes, type and optimizer.",
        ),
    ] = False,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Create a model with weights drawn from a seed.

    Examples:
      timernn models create weather --input-size 8 --hidden-size 64 --exist-ok
      timernn models create lm --input-size 64 --hidden-size 128 --optimizer adam
    """
    chosen = make_optimizer(optimizer, lr, hyperparameter or [])
    with connection.open() as client:
        made = client.create_model(
            model,
            input_size=input_size,
            hidden_size=hidden_size,
            dtype=dtype.value,
            seed=seed,
            optimizer=chosen,
            exist_ok=exist_ok,
        )
    if json:
        print_json(model_json(made))
    else:
        # With --exist-ok the output does not say whether the model was created now or existed before.
        verb = "there is" if exist_ok else "created"
        print(f"{verb} {made.model_id}, weights version {made.head.number}")


@app.command("list")
@connects(for_operators=True)
def list_models(
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """List all models by name.

    Examples:
      timernn models list
      timernn models list --json
      timernn models list --tenant acme --token-file operator.token
    """
    with connection.open() as client:
        found = list(client.list_models())
    if json:
        print_json([model_json(model) for model in found])
    else:
        print_table(MODEL_HEADINGS, map(model_row, found))


@app.command()
@connects(for_operators=True)
def show(
    model: ModelId,
    *,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Show one model.

    Example:
      timernn models show weather
    """
    with connection.open() as client:
        found = client.get_model(model)
    if json:
        print_json(model_json(found))
    else:
        print_fields(model_fields(found))


@app.command()
@connects()
def delete(
    model: ModelId,
    *,
    missing_ok: MissingOk = False,
    connection: Connection,
) -> None:
    """Delete a model with its weights, checkpoints and waiting gradients.

    Examples:
      timernn models delete weather
      timernn models delete weather --missing-ok
    """
    with connection.open() as client:
        deleted = client.delete_model(model, missing_ok=missing_ok)
    print(f"deleted {model}" if deleted else f"there was no {model}")


@app.command("export")
@connects(timeout=300.0)
def export_weights(
    model: ModelId,
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=parse_path, help="Where to.")],
    *,
    version: Annotated[
        int | None,
        typer.Option(
            **number_option(int, 1),
            envvar="TIMERNN_VERSION_NUMBER",
            help="A version; the newest if not given.",
        ),
    ] = None,
    moments: Annotated[
        bool,
        typer.Option("--moments", envvar="TIMERNN_MOMENTS", help="With the optimizer's state."),
    ] = False,
    force: Force = False,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Write a model's weights to a safetensors file: Wx, Wh and b.

    Examples:
      timernn models export weather weather.safetensors
      timernn models export weather at-12.safetensors --version 12 --force
    """
    from service.cli.weights import write_weights  # noqa: PLC0415 - not for --help

    check_target(file, force=force)
    with connection.open() as client:
        found, size = write_weights(client, model, file, version=version, moments=moments)
    if json:
        print_json({"file": str(file), "bytes": size, "version": version_json(found)})
    else:
        print(f"wrote version {found.number} of {model} to {file}, {size:,} bytes")


@app.command("import")
@connects(timeout=300.0)
def import_weights(
    model: ModelId,
    file: Annotated[Path, typer.Argument(metavar="FILE", parser=parse_file, help="Where from.")],
    *,
    expect_version: ExpectVersion = None,
    connection: Connection,
    json: AsJson = False,
) -> None:
    """Make the weights in a safetensors file the model's next version.

    The file holds Wx (D, H), Wh (H, H) and b (H); the model must exist and have these sizes. Moments
    in the file are kept, without them the optimizer starts anew.

    Example:
      timernn models import weather weather.safetensors
    """
    from service.cli.weights import read_weights  # noqa: PLC0415 - not for --help

    with connection.open() as client:
        made = read_weights(client, model, file, expected_version=expect_version)
    if json:
        print_json({"model_id": model, "version": version_json(made)})
    else:
        print(f"{model} has weights version {made.number} now")


def make_optimizer(
    name: OptimizerName, lr: float | None, settings: list[str]
) -> "timernn.Optimizer":
    """Return the client library's optimizer with its hyperparameters.

    Args:
        name: The optimizer's name.
        lr: The learning rate; None for the optimizer's default.
        settings: Further hyperparameters, each as NAME=VALUE.

    Raises:
        typer.BadParameter: If it has no such hyperparameter, or the value is no number.
    """
    import timernn  # noqa: PLC0415 - not for --help and usage errors

    kinds: dict[str, type[timernn.Optimizer]] = {
        "sgd": timernn.SGD,
        "momentum": timernn.Momentum,
        "nesterov": timernn.Nesterov,
        "adagrad": timernn.AdaGrad,
        "rmsprop": timernn.RMSprop,
        "adam": timernn.Adam,
        "adamw": timernn.AdamW,
    }
    kind = kinds[name.value]
    known = [f.name for f in fields(kind)]
    values = {} if lr is None else {"lr": lr}
    for setting in settings:
        key, _, text = setting.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = None
        if key not in known or value is None:
            raise typer.BadParameter(
                f"expected NAME=VALUE with a NAME of {', '.join(known)}, got {setting!r}",
                param_hint="'--set'",
            )
        values[key] = value
    return kind(**values)
