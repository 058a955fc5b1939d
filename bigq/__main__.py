"""``python3 -m bigq``."""

from bigq.cli.main import program

if __name__ == "__main__":
    program()
