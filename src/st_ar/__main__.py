"""`python -m st_ar`, for machines where the `st-ar` script is not on the path."""

from st_ar.cli import main

if __name__ == "__main__":
    main()
