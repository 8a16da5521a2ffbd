"""Loads the native module, or says what to run."""

try:
    from pybackdoor import _C
except ImportError as error:
    raise ImportError(
        "pybackdoor: the native module pybackdoor._C cannot be loaded "
        f"({error}). If you import from the source tree, run `pip install -e .` "
        "(or `python setup.py build_ext --inplace`) there first; else reinstall pybackdoor."
    ) from error

__all__ = ["_C"]


def cuda_status() -> str | None:
    """Why native CUDA cannot run; None if it can."""
    return "this build has no CUDA"
