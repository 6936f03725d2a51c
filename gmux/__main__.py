"""`python -m gmux` is `gmux`."""

from gmux.cli import main

if __name__ == "__main__":
    main()
