"""Typed errors for users: each message says what is wrong, where, and what to do."""


class RareDistillError(Exception):
    """Bad input, explained in one message; the command line prints it and exits with code 2."""


class DataError(RareDistillError):
    """A source, a cohort or a predictions table cannot be used as it is."""


class SplitError(RareDistillError):
    """Patients cannot be divided as requested, or a division would leak."""


class ConfigError(RareDistillError):
    """A configuration names something unknown or contradictory."""


class CheckpointError(RareDistillError):
    """A checkpoint cannot be read, or does not fit its use."""
