"""Fetch as wheels what vlbench needs and an image with torch lacks: for a GPU without an index.

    python benchmarks/fetch_wheels.py [to=wheels] [python=3.12] [image=FILE] [dry_run=true]
    python -m pip install --no-index --no-deps wheels/*.whl    # on the machine with the GPU

Run it where vlbench is installed: which packages are needed follows from pyproject.toml and from
what those packages ask for in turn. `image` lists the packages that are there, one a line; by
default torch_image_packages.txt, a usual image with torch, transformers, lightning and scipy.
Versions are the installed ones; wheels are for Linux on x86-64.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
GLIBC_VERSIONS = ("2_17", "2_24", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35", "2_39")
PLATFORMS = [f"manylinux_{version}_x86_64" for version in GLIBC_VERSIONS]
PLATFORMS += ["manylinux2014_x86_64", "manylinux1_x86_64"]


def project_requirements() -> list[str]:
    """Return what pyproject.toml asks for, and pytest with it."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tests = [one for one in project["optional-dependencies"]["test"] if "pytest" in one]
    return [*project["dependencies"], *tests]


def missing_packages(requirements: Iterable[str], present: set[str], python: str) -> dict[str, str]:
    """Return what is not `present`, of requirements and what they require: version by name.

    Raises `PackageNotFoundError` for a requirement that is not installed here.
    """
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    environment |= {"platform_machine": "x86_64", "implementation_name": "cpython"}
    missing: dict[str, str] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        is_wanted = requirement.marker is None or requirement.marker.evaluate(environment)
        if not is_wanted or name in present or name in missing:
            continue
        missing[name] = metadata.version(name)
        waiting += [Requirement(text) for text in metadata.requires(name) or ()]
    return dict(sorted(missing.items()))


def read_package_list(file: Path) -> set[str]:
    """Return the names in a file, one a line; what follows # is a comment."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").split("\n"))
    return {canonicalize_name(re.split(r"[=<>~ ]", line)[0]) for line in lines if line}


def main() -> None:
    """Fetch the wheels, or with `dry_run=true` only name them."""
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    unknown = given.keys() - {"to", "python", "image", "dry_run"}
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}; allowed are to, python, image, dry_run")
    python, folder = given.get("python", "3.12"), given.get("to", "wheels")
    image = Path(given.get("image", HERE / "torch_image_packages.txt"))
    wanted = missing_packages(project_requirements(), read_package_list(image), python)
    pinned = [f"{name}=={version}" for name, version in wanted.items()]
    print("\n".join(pinned))
    if given.get("dry_run") == "true":
        return
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", folder]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    sys.exit(subprocess.run([*command, *pinned]).returncode)


if __name__ == "__main__":
    main()
