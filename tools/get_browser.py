"""See to it that there is a Chromium for tests/test_results_page.py: `make browser`.

Where none is found it is installed from Debian's packages, which takes root; elsewhere this fails and says what to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.browser import executable


def main() -> int:
    """Return 0 if there is a browser in the end."""
    if executable() is None and shutil.which("apt-get") and os.geteuid() == 0:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], env=quiet, check=False)
        install = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
        subprocess.run(install, env=quiet, check=False)
    found = executable()
    if found is None:
        print(
            "error: no Chromium: install one (`apt-get install chromium` as root), or set CHROMIUM to its path",
            file=sys.stderr,
        )
        return 1
    print(f"browser: {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
