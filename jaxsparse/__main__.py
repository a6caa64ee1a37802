"""`python -m jaxsparse`: the command line."""

from jaxsparse.cli import console

if __name__ == "__main__":
    console()
