"""What the command line names: functions of modules or files."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(name: str, what: str = "loader") -> Callable[..., Any]:
    """The function that a name refers to.

    Args:
        name: `package.module:function` or `path/to/file.py:function`.
        what: what it is for; errors begin with this word.

    Returns:
        The function.

    Raises:
        ValueError: the name has another form, or there is no such function.
        ImportError, OSError: the module or file cannot be read.
    """
    where, _, function = name.rpartition(":")
    if not where or not function:
        raise ValueError(f"{what}: expected package.module:function or path/to/file.py:function, got {name!r}")
    if where.endswith(".py"):
        path = Path(where).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.exists():
            raise FileNotFoundError(f"{what}: there is no file {where}")
        # As `python file.py` does: modules beside the file can be imported.
        sys.path.insert(0, str(path.parent))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(where)
    found: Any = module
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{what}: {where} has no function {function}")
    return found
