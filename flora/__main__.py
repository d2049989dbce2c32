"""`python -m flora`: the same as the `flora` command."""

from flora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
