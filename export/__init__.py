"""From a teacher to a verified bundle; `docs/export.md` is the guide."""

import serve  # noqa: F401  (it sets what libraries read from the environment when they are loaded)
