"""``python -m trimtab`` is the program ``trimtab``."""

from trimtab.cli import main

if __name__ == "__main__":
    main()
