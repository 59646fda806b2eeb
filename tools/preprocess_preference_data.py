"""Tokenise preference pairs into training data; the same as ``megatron-longpo preprocess``."""

from __future__ import annotations

from megatron_longpo.cli import run


def main() -> None:
    run("preprocess", prog="preprocess_preference_data.py")


if __name__ == "__main__":
    main()
