"""Compare the installed packages with known vulnerabilities: `python tools/audit.py`, or `make audit`.

pip-audit asks PyPI. Where PyPI's answers cannot be had, it passes over every package and calls that clean; here that is an error.
"""
from __future__ import annotations

import json
import subprocess
import sys

OURS = "qtseg"


def judge(packages: list[dict]) -> tuple[list[str], int]:
    """What to print about pip-audit's findings, and the exit status: 0 clean, 1 vulnerable, 2 not audited."""
    audited = [package for package in packages if "skip_reason" not in package]
    skipped = sorted(package["name"] for package in packages if "skip_reason" in package and package["name"] != OURS)
    found = [f"{package['name']} {package['version']}: {fault['id']}, fixed in {', '.join(fault['fix_versions']) or 'no version yet'}"
             for package in audited for fault in package["vulns"]]
    if not audited:
        return ["Not audited: the vulnerability service of PyPI cannot be reached from here, so nothing is known about any package"], 2
    if skipped:
        found.append(f"Not audited, because PyPI does not know these versions: {', '.join(skipped)}")
    vulnerable = any(package["vulns"] for package in audited)
    return [*found, f"{len(audited)} packages audited: " + ("vulnerable" if vulnerable else "no known vulnerability")], int(vulnerable)


def main() -> int:
    """Run pip-audit on this environment."""
    done = subprocess.run([sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner", "off", "--format", "json"],
                          capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print("Not audited: pip-audit failed (" + " ".join(done.stderr.split())[-300:] + ")", file=sys.stderr)
        return 2
    lines, status = judge(packages)
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
