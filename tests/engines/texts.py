"""Prompts of exact lengths, from text that is wherever Python is.

Upstairs:   `vllm_e2e.py`.
Downstairs: the sources of the standard library, and the model's own tokenizer.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

FILES = (
    "pydoc_data/topics.py",
    "argparse.py",
    "typing.py",
    "datetime.py",
    "tarfile.py",
    "subprocess.py",
    "turtle.py",
    "statistics.py",
    "inspect.py",
    "zipfile.py",
    "pickletools.py",
    "doctest.py",
)


class Texts:
    """Tokens of some long texts."""

    def __init__(self, tokenizer: Any) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        self._ids: list[list[int]] = []
        for name in FILES:
            path = folder / name
            if path.is_file():
                self._ids.append(tokenizer.encode(path.read_text(errors="replace")))
        if len(self._ids) < 3:
            raise SystemExit("the standard library's sources are not installed")

    def prompt(self, number: int, length: int, shared: int = 0) -> list[int]:
        """Prompt of `length` tokens; those of different numbers differ from the first token on,
        after `shared` tokens that all have in common."""
        prompt = self._ids[0][:shared]
        text, offset = number % len(self._ids), 101 * (1 + number // len(self._ids))
        # One token that no other prompt begins with.
        prompt = [*prompt, 1000 + number]
        while len(prompt) < length:
            prompt += self._ids[text][offset : offset + length - len(prompt)]
            text, offset = (text + 1) % len(self._ids), 0
        return prompt[:length]


def prompts(texts: Texts, lengths: list[int], each: int, first: int = 0) -> list[dict[str, Any]]:
    """`each` prompts of every length."""
    made = []
    for length in lengths:
        for _ in range(each):
            number = first + len(made)
            made.append({"name": f"{length}#{number}", "ids": texts.prompt(number, length)})
    return made
