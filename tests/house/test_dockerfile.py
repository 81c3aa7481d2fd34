"""The Dockerfile, read instruction by instruction; no image is built here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from packaging.requirements import InvalidRequirement, Requirement

REPO = Path(__file__).resolve().parents[2]


def instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, rest) for keyword, rest in found]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    return instructions((REPO / "Dockerfile").read_text())


def of(dockerfile: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for name, rest in dockerfile if name == keyword]


def test_base_is_nvidias_pytorch_with_a_tag_from_an_argument(dockerfile: list[tuple[str, str]]) -> None:
    assert of(dockerfile, "FROM") == ["nvcr.io/nvidia/pytorch:${PYTORCH_TAG}"]
    assert dockerfile[0][0] == "ARG"
    assert re.fullmatch(r"PYTORCH_TAG=\d\d\.\d\d-py3", dockerfile[0][1])


def test_pip_keeps_the_torch_of_the_image_and_asks_for_no_apex(dockerfile: list[tuple[str, str]]) -> None:
    installs = [command for run in of(dockerfile, "RUN") for command in run.split("&&") if "pip install" in command]
    assert len(installs) == 1
    words = shlex.split(installs[0])
    assert words[words.index("--constraint") + 1] == "constraints.txt"
    named = set()
    for word in words[words.index("install") + 1 :]:
        try:
            named.add(Requirement(word).name.lower())
        except InvalidRequirement:
            continue
    assert named & {"apex", "torch", "triton"} == set()
    (run,) = [run for run in of(dockerfile, "RUN") if "pip install" in run]
    assert run.index("grep -q '^torch=='") < run.index("pip install")
    pattern = re.search(r"grep -iE '([^']*)' >constraints.txt", run)
    assert pattern is not None
    assert re.match(pattern.group(1), "torch==2.9.0a0+145a3a7bda.nv25.10")


def test_the_container_does_not_run_as_root(dockerfile: list[tuple[str, str]]) -> None:
    assert of(dockerfile, "USER") == ["distmuon"]
    assert any("useradd" in run and run.endswith(" distmuon") for run in of(dockerfile, "RUN"))
    after = [name for name, _ in dockerfile[dockerfile.index(("USER", "distmuon")) :]]
    assert "RUN" not in after
    assert after[-1] == "CMD"


def test_everything_copied_exists_and_is_in_the_build_context(dockerfile: list[tuple[str, str]]) -> None:
    ignore = (REPO / ".dockerignore").read_text().split()
    assert ignore[0] == "*"
    copied = [word for rest in of(dockerfile, "COPY") for word in rest.split()[:-1] if not word.startswith("--")]
    assert {"setup.py", "distmuon", "benchmarks", "kernels", "configs", "launch"} <= set(copied)
    for name in copied:
        assert (REPO / name).exists(), name
        assert f"!{name}" in ignore
