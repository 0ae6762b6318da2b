"""Loads the compiled extension, or says which build of the package fits the installed torch."""

from pathlib import Path

import torch  # first: _C needs its libraries


def _minor(version: str) -> str:
    """2.13 of 2.13.0+cpu: an extension is loaded by any torch of the same minor release."""
    return ".".join(version.split(".")[:2])


def _installed_version() -> str | None:
    """The version of the installed package, such as 0.2.0+torch2.13cpu; None in a clone."""
    from importlib import metadata  # needed for messages only

    try:
        return metadata.version("dml_cuda")
    except metadata.PackageNotFoundError:
        return None


def _cannot_load(cause: object) -> ImportError:
    folder = Path(__file__).parent
    if all(path.suffix == ".pyi" for path in folder.glob("_C*")):
        return ImportError(
            f"{folder} has no compiled extension: it is the source of dml_cuda, which Python finds before "
            f'an installed one. Build it in place, pip install --no-build-isolation -e "{folder.parent}", '
            "or start Python in another folder."
        )
    installed = _installed_version()
    kernels = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu"
    public = installed.partition("+")[0] if installed else "VERSION"
    return ImportError(
        f"the compiled extension of dml_cuda {installed or ''} cannot be loaded ({cause}). It must be built "
        f"against the installed torch {torch.__version__}: install the wheel "
        f"dml_cuda-{public}+torch{_minor(torch.__version__)}{kernels}, or build it: "
        "in a clone of dml_cuda, pip install --no-build-isolation --force-reinstall --no-deps ."
    )


try:
    from . import _C
except ImportError as error:
    raise _cannot_load(error) from error
if _minor(_C.torch_version) != _minor(torch.__version__):  # it was loaded, but torch's classes may differ
    raise _cannot_load(f"it was built for torch {_C.torch_version}")
