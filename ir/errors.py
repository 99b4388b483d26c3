"""Define every error that passopt raises on purpose; each class carries the exit code of the command line.

A message says what is wrong, where (pass, node, file), expected against found, and what to do.
"""

from __future__ import annotations


class PassoptError(Exception):
    """The base of all errors with a message for the user; `exit_code` is the exit status of the command line."""

    exit_code = 3


class UsageError(PassoptError):
    """The command line, a pass name or an option is wrong."""

    exit_code = 2


class ModelError(PassoptError):
    """A model, checkpoint or weight file is not what it should be."""

    exit_code = 2


class PassError(PassoptError):
    """A pass cannot do what its options ask of this model."""


class CalibrationError(PassError):
    """A calibration folder is missing, was made of another model, or lacks what a pass needs; no pass is to blame."""


class VerifyError(PassoptError):
    """The graph breaks an invariant: the defect is in a pass, not in the user's model."""


class PluginWarning(UserWarning):
    """An installed package offers a pass that cannot be used; everything else works."""


class CheckError(PassoptError):
    """A numerical check found a difference beyond its tolerance."""

    exit_code = 1


class ExpectationError(PassoptError):
    """A pipeline's expectation (`--expect PASS==N`) does not hold."""

    exit_code = 4
