"""What lies behind an error that Ray raises, and whether a restart would meet it again.

Imports neither Ray nor torch: the driver, the Train controller and the commands use it.
"""

from __future__ import annotations

MISTAKE = 2
"""The `exit_code` of errors that the user can correct. The same command meets them again."""
ADVICE = "\nFailed to apply UDF transform after"
"""The text that Ray Data appends to the message of any error: advice on its own settings."""
BUGS = (AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)
"""Python's errors for wrong code. What a lost worker causes in the others is none of these."""

DEATH = "The actor is dead because"
"""Begins the line of Ray's message on a lost worker that says how it ended."""


class WorkersLost(RuntimeError):
    """Raised if a training lost its workers too often without a finished epoch in between."""

    def __init__(self, times: int, cause: BaseException) -> None:
        again = f"{times} times without a finished epoch in between" if times > 1 else "once"
        super().__init__(
            f"its workers were lost {again}, and cluster.max_failures allows no further restart; "
            f"the last time by {type(cause).__name__}: {_in_short(cause)}"
        )
        self.times = times
        self.last = cause

    def __reduce__(self) -> tuple[type[WorkersLost], tuple[int, BaseException]]:
        return WorkersLost, (self.times, self.last)


def _in_short(error: BaseException) -> str:
    """Returns the first line of Ray's message on a lost worker, and what it says of the death."""
    first, *others = str(error).splitlines() or [""]
    return " ".join([first, *(line for line in others if line.startswith(DEATH))])


def is_mistake(error: BaseException) -> bool:
    """Returns whether the user can correct the error: its `exit_code` is 2."""
    return getattr(error, "exit_code", None) == MISTAKE


def is_interrupt(error: BaseException) -> bool:
    """Returns whether an error was raised because the user had interrupted what raised it.

    A second Ctrl-C within a library's lock comes out as an error of that lock.
    """
    inner = error.__context__
    return isinstance(error, KeyboardInterrupt) or (inner is not None and is_interrupt(inner))


def ends_training(error: BaseException) -> bool:
    """Returns whether a restarted training would meet the error again.

    Errors of data, config and numbers are such, and wrong code. A worker that is lost, the errors
    of the others that wait for it, and storage that cannot be written are not.
    """
    from pipelines.storage import StorageError  # here, because `mantis --help` needs no pyarrow

    if isinstance(error, StorageError):
        return False
    return is_mistake(error) or isinstance(error, BUGS)


def first_cause(error: BaseException) -> BaseException:
    """Returns the error of the task or worker inside the error that Ray raises elsewhere.

    Of several workers' errors it is one that ends the training, if there is one: the other workers
    may only have lost the connection to that worker.
    """
    failures = getattr(error, "worker_failures", None)
    if failures:
        causes = [first_cause(each) for each in failures.values()]
        return next(filter(ends_training, causes), causes[0])
    inner = getattr(error, "cause", None) or getattr(error, "controller_failure", None)
    if inner is None and type(error).__module__.partition(".")[0] == "ray":
        inner = error.__cause__  # Ray Data says only that a block failed
    return first_cause(inner) if isinstance(inner, BaseException) else _without_advice(error)


def _without_advice(error: BaseException) -> BaseException:
    if is_mistake(error) and error.args and isinstance(error.args[0], str):
        error.args = (error.args[0].partition(ADVICE)[0], *error.args[1:])
    return error
