"""Numbers and text out of a `.pt` file, quickly.

`torch.load(weights_only=True)` reads pickles in Python, an instruction at a time, which is slow for the S3 units of 100
hours: 18 million numbers in lists. A file without tensors needs nothing of it.
"""

import io
import os
import pickle
import zipfile
from typing import Any, NoReturn


class _PlainUnpickler(pickle.Unpickler):
    """Builds None, numbers, text, lists, tuples, dicts and sets; refuses all else, and so all that could run code.

    Tensors are refused too: they are made by a function, from a storage that only `torch.load` finds.
    """

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse every class and function."""
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")


def load_plain(path: str | os.PathLike[str]) -> Any:
    """Read a file that `torch.save` wrote, if it holds numbers and text only.

    Args:
        path: the .pt file.

    Returns:
        what was saved.

    Raises:
        ValueError: it holds a tensor or another object, or is no readable file of this kind; `torch.load` may read it,
            or says what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (record,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            return _PlainUnpickler(io.BytesIO(archive.read(record))).load()
    except Exception as error:  # reading damaged archives and pickles raises nearly anything
        raise ValueError(f"{path} is no file of plain data ({error})") from error
