"""`python -m sdtrt`."""

from sdtrt.cli import main

if __name__ == "__main__":
    main()
