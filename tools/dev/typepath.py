"""Link the packages that setup.cfg lists into build/typepath, where mypy and pyright find them.

Type checkers do not run the import hook of setuptools, so they cannot see an editable install alone.
"""

from __future__ import annotations

import configparser
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TYPEPATH = ROOT / "build" / "typepath"


def package_dirs(root: Path = ROOT) -> dict[str, str]:
    """Return the folder of every package that the setup.cfg in `root` lists, by import name, parents first.

    `package_dir` of setup.cfg names the topmost packages only; a package below one of them lies in the folder below it.
    """
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    lines = config["options"]["package_dir"].strip().splitlines()
    topmost = {name.strip(): folder.strip() for name, folder in (line.split("=") for line in lines)}
    found = {}
    for name in sorted(config["options"]["packages"].split()):
        above = max((above for above in topmost if f"{name}.".startswith(f"{above}.")), key=len)
        found[name] = "/".join([topmost[above], *name[len(above) :].split(".")[1:]])
    return found


def main() -> None:
    """Make the links anew."""
    shutil.rmtree(TYPEPATH, ignore_errors=True)
    for name, folder in package_dirs().items():
        target = TYPEPATH.joinpath(*name.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted((ROOT / folder).iterdir()):
            if entry.suffix in {".py", ".pyi"} or entry.name == "py.typed":
                (target / entry.name).symlink_to(entry)


if __name__ == "__main__":
    main()
