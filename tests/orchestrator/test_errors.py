from __future__ import annotations

import inspect

from orchestrator import errors


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every error is drawn there, with the exit code it has."""
    drawn = (errors.__doc__ or "").splitlines()
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if not issubclass(kind, errors.EspalierError) or kind is errors.EspalierError:
            continue
        (line,) = [line for line in drawn if f"── {name} " in line]
        if kind.__base__ is errors.EspalierError:
            assert f" {kind.exit_code}  " in line
