"""``python -m tests.attack``: see `tests.attack.attack`."""

from tests.attack.attack import main

if __name__ == "__main__":
    main()
