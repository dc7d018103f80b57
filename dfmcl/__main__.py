"""`python -m dfmcl` is the console command, also in a checkout where nothing is installed."""

from dfmcl.cli import main

if __name__ == "__main__":
    main()
