"""`python -m instruct_ft` is `instruct-ft`"""

import sys

from instruct_ft.cli import main

if __name__ == "__main__":
    sys.exit(main())
