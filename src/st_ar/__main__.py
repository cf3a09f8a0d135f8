"""`python -m st_ar`, for torchrun and for machines where the script is not on the path."""

from st_ar.cli import main

if __name__ == "__main__":
    main()
