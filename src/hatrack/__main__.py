"""`python -m hatrack`: the commands, where their script is not on the path."""

from hatrack.cli.main import main

if __name__ == "__main__":
    main()
