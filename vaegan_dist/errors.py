"""Errors whose one-line message names the thing, the cause and the remedy, each with its process exit code."""

# Exit code of a run that was asked to stop and left a checkpoint (EX_TEMPFAIL): the same command continues it.
STOPPED = 75


class VaeganError(Exception):
    """A failure explained well enough that its traceback adds nothing; ends the process with code 1."""

    exit_code = 1


class ConfigError(VaeganError):
    """A wrong configuration: the message names the key, the value and the remedy. Exit code 2."""

    exit_code = 2


class InputError(VaeganError):
    """A wrong input: a missing data set, an unreadable source, an unusable checkpoint. Exit code 2."""

    exit_code = 2


class DataError(VaeganError):
    """A shard or a sample that breaks its promise: names shard, member, offset and remedy. Exit code 1."""
