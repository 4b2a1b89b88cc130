"""The code of the project's pages, to be run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def page(name: str) -> str:
    """The text of a page, by its path in the project."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    """What is fenced in a page as ``kind``: python, sh, or nothing."""
    return [block for name, block in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if name == kind]
