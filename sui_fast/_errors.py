"""Named errors and the one way to phrase them: which argument, what was expected, what came, what to do."""


class SuiError(Exception):
    """Base of every error that sui_fast raises on purpose."""


class ArgumentError(SuiError, ValueError):
    """An argument has a value that cannot give a right number."""


class DataError(ArgumentError):
    """The data (samples, targets, order, finiteness) cannot be scored as given."""


class ModelError(DataError, RuntimeError):
    """The model itself fails on the samples it is given."""


class StabilityError(ArgumentError):
    """Gradient descent with this learning rate diverges."""


class CoverageError(SuiError, RuntimeError):
    """A chosen parameter acts on the outputs in a way that no rule and no fallback accounts for."""


class BackendError(SuiError, RuntimeError):
    """A backend named by the user cannot run this call."""


class StoreError(SuiError):
    """A store on disk is damaged, belongs to another run, or is being written by another process."""


class SpectrumError(SuiError, ArithmeticError):
    """A kernel matrix is too large, not finite, or not positive semi-definite."""


def complaint(argument: str, expected: str, got: object, todo: str) -> str:
    """Four-part message: ``argument: expected ..., got .... What to do.``"""
    return f"{argument}: expected {expected}, got {got}. {todo}"
