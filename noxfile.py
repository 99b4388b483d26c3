"""Run the tests on every Python that passopt supports: `nox`, or `nox -s tests-3.12`.

All versions run the passes, the text, the weights and the command line. What needs a package that a version cannot have
is skipped by its tests, which say so: on 3.10 the newest onnxruntime is an older one, which cannot load every int8 or
fused graph; torch and TVM are tested where their wheels exist.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

#: Everything on the version that the pinned packages were chosen for; elsewhere what needs neither torch nor TVM.
FULL = "3.11"
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
CORE = ("tests/ir", "tests/passes", "tests/commands", "tests/testing")


@nox.session(python=VERSIONS)
def tests(session: nox.Session) -> None:
    """Run the tests that this version can run."""
    extras = "export,gguf,run,guests,fast,docs,dev" if session.python == FULL else "guests,fast,dev"
    session.env["PIP_CONSTRAINT"] = "constraints.txt"
    session.install("--editable", f".[{extras}]")
    folders = session.posargs or (() if session.python == FULL else CORE)
    session.run("pytest", "-q", *folders)


@nox.session(python=FULL)
def check(session: nox.Session) -> None:
    """Run every gate of `make check`."""
    session.env["PIP_CONSTRAINT"] = "constraints.txt"
    session.install("--editable", ".[export,gguf,run,guests,fast,docs,dev]")
    session.run("python", "tools/dev/check.py")
