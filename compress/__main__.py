"""``python -m compress``: the command line."""

from compress.cli import main

if __name__ == "__main__":
    main()
