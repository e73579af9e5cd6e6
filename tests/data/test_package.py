"""Data of other packages: what is said where one, or its file, is missing."""

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pyseq.data import digits, people_daily


@pytest.mark.parametrize(("load", "extra"), [(digits, "study"), (people_daily, "demo")])
def test_what_is_missing_is_named(
    load: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = ModuleSpec("there", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(FileNotFoundError, match="reinstall it"):
        load()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'pyseq\[{extra}\]'"):
        load()
