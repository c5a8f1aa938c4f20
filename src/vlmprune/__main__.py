"""`python -m vlmprune` is the command `vlmprune`."""

from vlmprune.cli import main

if __name__ == "__main__":
    main()
