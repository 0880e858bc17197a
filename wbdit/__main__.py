"""The command line as a module: ``python -m wbdit``, which torchrun starts as ``torchrun -m wbdit``."""

from wbdit.cli import run

if __name__ == "__main__":
    run()
