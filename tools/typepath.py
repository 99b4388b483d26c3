"""Link the folders named by setup.cfg's package_dir into build/typepath, where mypy and pyright find them.

Type checkers do not run setuptools' import hook, so an editable install alone is invisible to them.
"""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPEPATH = ROOT / "build" / "typepath"


def package_dirs() -> dict[str, str]:
    """Import name → folder, as setup.cfg states it, parents first."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["package_dir"].strip().splitlines()
    pairs = (line.split("=") for line in lines)
    return dict(sorted((name.strip(), folder.strip()) for name, folder in pairs))


def main() -> None:
    shutil.rmtree(TYPEPATH, ignore_errors=True)
    for name, folder in package_dirs().items():
        target = TYPEPATH.joinpath(*name.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted((ROOT / folder).iterdir()):
            if entry.suffix in {".py", ".pyi"} or entry.name == "py.typed":
                (target / entry.name).symlink_to(entry)


if __name__ == "__main__":
    main()
