"""`python -m keural`, which is what `torchrun -m keural` starts on every rank."""

from keural.cli.app import main

if __name__ == "__main__":
    main()
