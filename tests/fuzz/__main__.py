"""``python -m tests.fuzz bundles --seed 7 --cases 2000``; each kind of cases is a module that can be run alone too."""

import sys

from tests.fuzz.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
