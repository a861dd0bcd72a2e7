"""Report dependencies, with versions, licenses and known vulnerabilities: `python -m tests.audit PIP_AUDIT`.

The report covers what a user installs, not the development tools. Exits with 1 if a vulnerability is known, and says so
if the vulnerabilities could not be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement

_SERVICE = "https://pypi.org/pypi/{}/{}/json"
_PATIENCE = 20.0  # seconds
_NONE = "none known"
_UNCHECKED = "NOT CHECKED"


def installed(name: str, extras: set[str]) -> dict[str, Distribution]:
    """The distribution *name* and its dependencies, by name."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(name, frozenset(extras))]
    while todo:
        this = todo.pop()
        if this in seen:
            continue
        seen.add(this)
        try:
            package = distribution(this[0])
        except PackageNotFoundError:  # needed only on another platform or Python version
            continue
        found[package.name.lower().replace("_", "-")] = package
        for line in package.requires or ():
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *this[1]}):
                todo.append((needed.name, frozenset(needed.extras)))
    return found


def licence(package: Distribution) -> str:
    metadata = package.metadata
    classifiers = [
        value.rpartition(" :: ")[2]
        for value in metadata.get_all("Classifier") or ()
        if value.startswith("License :: ") and not value.endswith("OSI Approved")
    ]
    told = metadata.get("License-Expression") or ", ".join(classifiers) or metadata.get("License") or "not said"
    return told.splitlines()[0][:40]


def silence(package: Distribution) -> str | None:
    """Why PyPI's vulnerability service has no result for *package*; None if it has one.

    pip-audit itself skips packages without a result, and reports success.
    """
    try:
        with urllib.request.urlopen(_SERVICE.format(package.name, package.version), timeout=_PATIENCE) as answer:
            known: dict[str, Any] = json.load(answer)
            return None if "vulnerabilities" in known else "its answer has no vulnerabilities"
    except (OSError, ValueError) as error:
        return str(error)


def audited(tool: str, packages: dict[str, Distribution]) -> dict[str, str]:
    """The vulnerabilities of each package, by name."""
    with TemporaryDirectory() as folder:
        pins = Path(folder) / "pins.txt"
        # A local version, such as torch's +cpu, is unknown to the service; the public one has the same source.
        pins.write_text("".join(f"{name}=={p.version.partition('+')[0]}\n" for name, p in packages.items()))
        command = [tool, "--requirement", str(pins), "--no-deps", "--disable-pip", "--format=json"]
        result = subprocess.run([*command, "--progress-spinner=off"], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode not in (0, 1):
        raise SystemExit(f"pip-audit ended with {result.returncode}")
    report = json.loads(result.stdout)["dependencies"]
    return {entry["name"].lower().replace("_", "-"): verdict(entry) for entry in report}


def verdict(entry: dict[str, Any]) -> str:
    if "skip_reason" in entry:
        return _UNCHECKED
    return ", ".join(each["id"] for each in entry["vulns"]) or _NONE


def main(tool: str) -> int:
    packages = installed("azstoragetorch", {"cli"})
    own = packages.pop("azstoragetorch")
    reason = silence(packages["azure-core"])
    verdicts = {} if reason else audited(tool, packages)
    sys.stdout.write(f"azstoragetorch {own.version} needs, with its extra cli:\n")
    for name, package in sorted(packages.items()):
        found = verdicts.get(name, _UNCHECKED)
        sys.stdout.write(f"{name:20} {package.version:14} {licence(package):42} {found}\n")
    if reason:
        sys.stdout.write(f"VULNERABILITIES WERE NOT CHECKED: PyPI's service gives no answer here ({reason}).\n")
    return int(any(found not in (_NONE, _UNCHECKED) for found in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
