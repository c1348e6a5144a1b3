"""Finds a Chromium for the page's tests, or installs one where that is possible: python -m tests.browser.find"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
HOW = (
    "The page's tests need Chromium and found none: run `apt-get install chromium` (Debian, as root) or "
    "`python -m playwright install chromium`, or name one in the variable CHROMIUM."
)


class NoBrowser(RuntimeError):
    """One sentence that tells how to get one."""


def find_browser() -> str:
    """Path of a Chromium: $CHROMIUM, one on the PATH, or playwright's own; else installs one. Errors: NoBrowser."""
    with FileLock(Path(tempfile.gettempdir()) / "sotto-chromium.lock"):  # tests may run in several processes
        return present() or installed()


def present() -> str | None:
    named = os.environ.get("CHROMIUM")
    if named:
        if not shutil.which(named):
            raise NoBrowser(f"CHROMIUM names {named!r}, which can't be run.")
        return shutil.which(named)
    found = next(filter(None, map(shutil.which, (*NAMES, *PLACES))), None)
    return found or _playwrights()


def _playwrights() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).is_file() else None


def installed() -> str:
    """Installs one by apt where we are root on Debian or Ubuntu, else by playwright. Errors: NoBrowser."""
    attempts = [[sys.executable, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        apt = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
        attempts = [apt, ["apt-get", "update"], apt, *attempts]
    for command in attempts:
        print(" ".join(command), file=sys.stderr)
        try:
            subprocess.run(command, check=False, timeout=600, capture_output=True,
                           env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            continue
        if path := present():
            return path
    raise NoBrowser(HOW)


if __name__ == "__main__":
    try:
        print(find_browser())
    except NoBrowser as error:
        sys.exit(str(error))
