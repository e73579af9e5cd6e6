"""Where the files of other pip packages are, without importing them."""

import importlib.util
from pathlib import Path


def file_in(package: str, inside: str, what: str, extra: str) -> Path:
    """A file inside an installed package. ModuleNotFoundError where it is not installed, FileNotFoundError where the
    file is missing; what: the file's contents, in words; extra: of pyseq, that installs the package."""
    found = importlib.util.find_spec(package)
    name = Path(inside).name
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{what} with the package {package}, which is not installed: "
            f"pip install 'pyseq[{extra}]', or pass the path of a copy of {name}",
            name=package,
        )
    path = Path(found.submodule_search_locations[0], inside)
    if not path.is_file():
        raise FileNotFoundError(
            f"{package} is installed, but {path} is missing; "
            f"reinstall it (pip install --force-reinstall {package}) or pass the path of a copy"
        )
    return path
