"""Prepare a data set on the cluster: `ray job submit --working-dir . -- python jobs/prepare.py SOURCE OUTPUT …`."""

import sys

from vaegan_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
