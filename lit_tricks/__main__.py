"""``python -m lit_tricks`` is ``lit-tricks``."""

from lit_tricks.cli import main

if __name__ == "__main__":
    main()
