"""`python -m bitsmith` is the `bitsmith` command."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
