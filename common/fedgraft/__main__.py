"""``python -m fedgraft`` is the ``fedgraft`` command."""

from fedgraft.common.cli import main

if __name__ == "__main__":
    main()
