"""The command `tandem` where some packages are missing.

python -m tests.support.without_packages torch,onnx serve --help
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder


class Missing(MetaPathFinder):
    """Packages that are installed, but not for this process."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


if __name__ == "__main__":
    sys.meta_path.insert(0, Missing(set(sys.argv[1].split(","))))
    from tandem.cli import main

    main(sys.argv[2:])
