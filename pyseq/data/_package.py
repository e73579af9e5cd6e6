"""Where the files of other pip packages are, without importing them."""

import importlib.util
from pathlib import Path


def file_in(package: str, inside: str, what: str, extra: str, distribution: str = "") -> Path:
    """A file inside an installed package. ModuleNotFoundError where it is not installed, FileNotFoundError where the
    file is missing; what: the file's contents, in words; extra: of pyseq, that installs the package; distribution: its
    name for pip, where the package is a folder that it shares with others."""
    found = importlib.util.find_spec(package)
    name, inner = Path(inside).name, Path(inside)
    folders = [Path(folder) for folder in (found and found.submodule_search_locations) or ()]
    if distribution:
        folders = [folder for folder in folders if (folder / inner.parts[0]).is_dir()]
    if not folders:
        raise ModuleNotFoundError(
            f"{what} with the package {distribution or package}, which is not installed: "
            f"pip install 'pyseq[{extra}]', or pass the path of a copy of {name}",
            name=package,
        )
    path = folders[0] / inner
    if not path.is_file():
        raise FileNotFoundError(
            f"{distribution or package} is installed, but {path} is missing; "
            f"reinstall it (pip install --force-reinstall {distribution or package}) or pass the path of a copy"
        )
    return path
