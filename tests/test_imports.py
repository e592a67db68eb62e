"""The one-way rule of docs/design.md: who may import whom, read from the source itself."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# By package: the packages of this project that it may import besides itself: those that the arrows lead to.
ALLOWED = {
    "streaming": {"modalities", "ar_core", "audio", "diffusion"},
    "modalities": {"ar_core", "audio"},
    "ar_core": set[str](),
    "audio": set[str](),
    "diffusion": set[str](),
}
NUMERIC = {"torch", "triton", "numpy", "safetensors", "gguf", "transformers"}
# What the engine and the codec may import when they are imported themselves, and what some files may besides.
NUMERIC_ONLY = ("ar_core", "audio")
MORE_IN = {
    "ar_core/models/transformers_support.py": {"huggingface_hub"},
    "audio/filters.py": {"av"},
    "audio/formats/": {"av", "soundfile"},
    "audio/reading.py": {"av", "soundfile"},
    "audio/voices.py": {"filelock"},
    "streaming/cli.py": {"benchmarks"},  # a verb of the command line, which stands above everything
}
# What another distribution brings as a part of itself.
PART_OF = {"starlette": "fastapi", "pydantic_core": "pydantic"}
PRESENT = sorted(name for name in ALLOWED if (ROOT / name).is_dir())


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    package: str  # the first part of the imported name
    at_module_level: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.package}"


def imports_of(package: str) -> list[Import]:
    """Every import in a package's files, also those in functions and for type checkers."""
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no files"
    return [found for file in files for found in imports_in(file.read_text(), str(file.relative_to(ROOT)))]


def imports_in(source: str, file: str) -> Iterator[Import]:
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays within its package.
            names = [file.split("/", maxsplit=1)[0] if node.level else str(node.module)]
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        for name in names:
            yield Import(file, node.lineno, name.split(".")[0], id(node) not in inside)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@pytest.mark.parametrize("package", PRESENT)
def test_packages_import_each_other_one_way(package: str) -> None:
    allowed = ALLOWED[package] | {package}
    others = (set(ALLOWED) | {"tests", "benchmarks", "demos"}) - allowed
    wrong = [str(found) for found in imports_of(package) if found.package in others - _more_in(found.file)]
    assert not wrong, f"{package} may import {sorted(allowed)} of this project; but {'; '.join(wrong)}"


@pytest.mark.parametrize("package", [name for name in NUMERIC_ONLY if name in PRESENT])
def test_engine_and_codec_need_few_libraries(package: str) -> None:
    wrong = [
        str(found)
        for found in imports_of(package)
        if found.at_module_level
        and found.package not in sys.stdlib_module_names
        and found.package not in {package} | NUMERIC | _more_in(found.file)
    ]
    assert not wrong, f"{package} may import {sorted(NUMERIC)} at module level; but {'; '.join(wrong)}"


def _more_in(file: str) -> set[str]:
    return {name for place, names in MORE_IN.items() if file.startswith(place) for name in names}


@pytest.mark.parametrize("package", PRESENT)
def test_whatever_is_imported_is_declared(package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {_normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for group in groups for line in group}
    installed = packages_distributions()
    wrong = []
    for found in imports_of(package):
        if found.package in sys.stdlib_module_names or found.package in {*ALLOWED, "benchmarks"}:
            continue
        package_of = PART_OF.get(found.package, found.package)
        providers = {_normal(name) for name in installed.get(package_of, [package_of])}
        if not providers & declared:
            wrong.append(str(found))
    assert not wrong, f"pyproject.toml does not name what {package} needs: {'; '.join(wrong)}"


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_package_is_there_or_has_not_begun() -> None:
    assert {"streaming", "modalities", "ar_core"} <= set(PRESENT)


def test_the_reader_finds_all_kinds_of_imports() -> None:
    source = """
import torch.nn as nn
from modalities import chat
from . import here
if TYPE_CHECKING:
    from streaming.worker import Worker
class A:
    import json
def f():
    import soundfile
    importlib.import_module("audio.codec")
"""
    found = {(entry.package, entry.at_module_level) for entry in imports_in(source, "ar_core/x.py")}
    assert found == {
        *(("torch", True), ("modalities", True), ("ar_core", True), ("streaming", True), ("json", True)),
        *(("soundfile", False), ("audio", False)),
    }
