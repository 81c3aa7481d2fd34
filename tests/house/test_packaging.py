"""What setup.py promises to pip."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

import distmuon

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    monkeypatch.chdir(REPO)
    runpy.run_path(str(REPO / "setup.py"))
    return given


def names(requirements: list[str]) -> set[str]:
    return {Requirement(item).name for item in requirements}


@pytest.mark.parametrize("name", ["benchmarks", "kernels"])
def test_linked_folders_are_part_of_the_package(name: str, package: dict[str, Any]) -> None:
    assert (REPO / "distmuon" / name).readlink() == Path("..") / name
    assert f"distmuon.{name}" in package["packages"]


def test_nothing_else_is_top_level(package: dict[str, Any]) -> None:
    assert {name.split(".")[0] for name in package["packages"]} == {"distmuon"}
    assert package["package_data"] == {"distmuon": ["py.typed"]}
    assert (REPO / "distmuon/py.typed").is_file()


def test_every_folder_with_code_is_a_package(package: dict[str, Any]) -> None:
    walked = os.walk(REPO / "distmuon", followlinks=True)
    folders = [Path(folder) for folder, _, files in walked if any(name.endswith(".py") for name in files)]
    assert {".".join(folder.relative_to(REPO).parts) for folder in folders} == set(package["packages"])


def test_the_core_needs_neither_deepspeed_nor_triton(package: dict[str, Any]) -> None:
    assert names(package["install_requires"]) == {"numpy", "pydantic", "safetensors", "torch", "wrapt"}
    (torch,) = [Requirement(item) for item in package["install_requires"] if item.startswith("torch")]
    assert {clause.operator for clause in torch.specifier} == {">="}


def test_extras(package: dict[str, Any]) -> None:
    extras = package["extras_require"]
    assert set(extras) == {"deepspeed", "dev", "hf", "train", "triton"}
    assert extras["deepspeed"] == ["deepspeed>=0.19.8"]
    assert set(extras["triton"]) < set(extras["dev"])
    assert names(extras["triton"]) == {"triton"}
    assert set(extras["deepspeed"]) < set(extras["train"]) < set(extras["dev"])
    assert "apex" not in names([*package["install_requires"], *sum(extras.values(), [])])


def test_version_is_the_one_the_package_reports(package: dict[str, Any]) -> None:
    assert package["version"] == distmuon.__version__


def test_command(package: dict[str, Any]) -> None:
    assert package["entry_points"] == {"console_scripts": ["distmuon = distmuon.cli:main"]}
    assert package["python_requires"] == ">=3.11"
