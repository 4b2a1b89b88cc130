"""`python -m probmed` is the `probmed` command."""

from probmed.cli import main

if __name__ == "__main__":
    main()
