"""Makes the virtual environment that MLServer needs for itself: its dependencies contradict this project's."""

import os
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-mlserver"
# uvloop 0.22 dropped what MLServer 1.7.1 asks of it; its generated stubs need protobuf 6.
REQUIREMENTS = ("mlserver==1.7.1", "uvloop<0.22", "protobuf<7", "redis>=8.1.0", "hiredis")


class SetupError(RuntimeError):
    """MLServer cannot be installed here; the message says why."""


def mlserver_python() -> Path:
    """Return the interpreter of MLServer's environment, making the environment at the first call.

    PyTorch comes in the version of this environment; TORCH_PIP_ARGS is passed to pip, as in
    scripts/torch.sh.

    Raises:
        SetupError: If it cannot be installed.
    """
    python = FOLDER / "bin" / "python"
    requirements = [*REQUIREMENTS, _torch_requirement()]
    stamp = FOLDER / ".requirements"
    if stamp.is_file() and stamp.read_text() == "\n".join(requirements):
        return python
    print(f"Installing MLServer into {FOLDER.name}, once", file=sys.stderr)
    venv.create(FOLDER, with_pip=True, clear=True)
    (FOLDER / ".gitignore").write_text("*\n")
    _install(python, requirements)
    stamp.write_text("\n".join(requirements))
    return python


def _torch_requirement() -> str:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise SetupError("PyTorch is not installed here, so not for MLServer either") from None
    return "torch==" + version.split("+")[0]


def _install(python: Path, requirements: list[str]) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    extra = os.environ.get("TORCH_PIP_ARGS", "").split()
    done = subprocess.run(  # noqa: S603 - pip, with the requirements above
        [*pip, *extra, *requirements], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SetupError(f"pip failed: {lines[-1] if lines else 'no message'}")
